"""Which variant runs: by name, by environment, or the best."""

from __future__ import annotations

import platform

import pytest

from pi2rt._errors import KernelUnavailableError
from pi2rt.cython_kernels.kernels import native


def test_scalar_comes_first_and_the_best_that_runs_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PI2RT_KERNELS", raising=False)
    names = [name for name, _, _ in native.variants()]
    running = [name for name, runs, _ in native.variants() if runs]
    assert names[0] == running[0] == "scalar"
    assert native.current() == running[-1]
    expected = {"x86_64": ["scalar", "avx2", "avx512", "avx512vnni"], "aarch64": ["scalar", "neon"]}
    if platform.machine() in expected:
        assert names == expected[platform.machine()]


def test_the_environment_chooses_unless_the_caller_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PI2RT_KERNELS", "scalar")
    assert native.current() == "scalar"
    best = [name for name, runs, _ in native.variants() if runs][-1]
    assert native.current(best) == best
    assert native.Kernels(best).name == best
    assert native.Variant().name == native.Variant("scalar").name


def test_unknown_and_unusable_variants_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        KernelUnavailableError, match=r"no kernel variant 'mmx' in this build; it has: scalar"
    ):
        native.current("mmx")
    monkeypatch.setenv("PI2RT_KERNELS", "altivec")
    with pytest.raises(KernelUnavailableError, match="'altivec'"):
        native.Variant()
    for name, runs, _ in native.variants():
        if not runs:
            with pytest.raises(KernelUnavailableError, match=f"{name!r} is built in, but this processor"):
                native.Variant(name)
