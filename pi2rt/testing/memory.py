"""What an executor says that it needs is enough: a memory budget holds by it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from dataclasses import replace
from pathlib import Path

import pytest

from pi2rt.formats import ModelFile, open_model_file
from pi2rt.host.memory import peak_rss_bytes
from pi2rt.models import ModelDescription, describe
from pi2rt.runtime.executor import Measured
from pi2rt.testing.harness import Harness, in_trio
from pi2rt.testing.tiny_models import TINY_MODELS, large_model_path

_M_MMAP_THRESHOLD = -3  # of malloc.h
_NOISE = 16 << 20  # what interpreter, pytest and Trio take meanwhile


class Memory(Harness):
    """``Measured.need``."""

    def open_large_model(self) -> tuple[ModelFile, ModelDescription]:
        """One whose weights are tens of megabytes, so that they show in what a process takes. Override it together with
        ``open_model``."""
        name = self.models[0]
        if name not in TINY_MODELS:
            pytest.skip("models are the author's own, and open_large_model was not overridden")
        file = open_model_file(large_model_path(self.folder, name))
        return file, describe(file)

    @in_trio
    async def test_need_is_enough(self) -> None:
        """For opening and a step of ``max_tokens``, by the peak of the whole process."""
        executor = self.make_executor()
        if not isinstance(executor, Measured):
            pytest.skip(
                "the executor does not say what it needs, so it is refused where there is a memory budget"
            )
        file, description = self.open_large_model()
        options = replace(self.options, slots=1, pages=self.options.pages // self.options.slots)
        need = executor.need(file, description, replace(options, pages=1))
        before = _reset_peak()
        async with self._opened(executor, file, description, options):
            await self.run(executor, self.prefill(1, self.prompt(options.max_tokens)))
        took = peak_rss_bytes() - before
        said = need.weights + need.activations + options.pages * need.page
        assert took <= said + _NOISE, (
            f"need says {said >> 20} MiB ({need}), but opening a model and a step of {options.max_tokens} tokens took "
            f"{took >> 20} MiB"
        )


def _reset_peak() -> int:
    """Returns what the process has now, which is its new peak. From now on large arrays take memory of the system:
    what was freed before would be used again unseen."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):  # not glibc
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 17)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return peak_rss_bytes()
    except OSError:
        pytest.skip("this system does not tell the peak memory of a part of a program")
