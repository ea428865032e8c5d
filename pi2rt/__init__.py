"""pi2rt: language models larger than the memory they are given, inside your own Python service.

Three APIs of one runtime, with the same names, the same ``SamplingParams`` and the same errors (docs/api.md)::

    async with pi2rt.open_runtime("smollm2") as runtime:      # Trio
        async with runtime.stream("Why is the sky blue?") as chunks:
            async for chunk in chunks: ...

    async with pi2rt.AsyncEngine("smollm2") as engine:        # asyncio
        async for chunk in engine.stream("Why is the sky blue?"): ...

    with pi2rt.Engine("smollm2") as engine:                   # neither
        for chunk in engine.stream("Why is the sky blue?"): ...
"""

from __future__ import annotations

TYPE_CHECKING = False  # known to type checkers; importing typing would take longer than all the rest
if TYPE_CHECKING:
    from pi2rt import catalogue
    from pi2rt._errors import (
        BusyError,
        ClosedError,
        ContextOverflowError,
        ConversionError,
        DownloadError,
        ExecutorError,
        InternalError,
        KernelUnavailableError,
        MemoryBudgetError,
        ModelFormatError,
        ModelNotFoundError,
        OutputError,
        Pi2rtError,
        PluginError,
        RequestError,
        SystemLimitError,
        TemplateError,
        UnsupportedModelError,
    )
    from pi2rt.api.async_engine import AsyncEngine, AsyncStream
    from pi2rt.api.runtime import Prompt, Runtime, RuntimeStatistics, open_runtime
    from pi2rt.api.sync_engine import Engine, Stream
    from pi2rt.catalogue import pull
    from pi2rt.engine import Chunk, Completion, SamplingParams, Timing, TokenStream
    from pi2rt.opening.model_info import ModelInfo
    from pi2rt.opening.pack_cache import ensure_pack

__version__ = "0.1.0"

__all__ = [
    "AsyncEngine",
    "AsyncStream",
    "BusyError",
    "Chunk",
    "ClosedError",
    "Completion",
    "ContextOverflowError",
    "ConversionError",
    "DownloadError",
    "Engine",
    "ExecutorError",
    "InternalError",
    "KernelUnavailableError",
    "MemoryBudgetError",
    "ModelFormatError",
    "ModelInfo",
    "ModelNotFoundError",
    "OutputError",
    "Pi2rtError",
    "PluginError",
    "Prompt",
    "RequestError",
    "Runtime",
    "RuntimeStatistics",
    "SamplingParams",
    "Stream",
    "SystemLimitError",
    "TemplateError",
    "Timing",
    "TokenStream",
    "UnsupportedModelError",
    "__version__",
    "catalogue",
    "ensure_pack",
    "open_runtime",
    "pull",
]

# Imported at first use: 'import pi2rt' takes a millisecond, so a command that only prints help is quick.
_MODULES = {
    "AsyncEngine": "pi2rt.api.async_engine",
    "AsyncStream": "pi2rt.api.async_engine",
    "Chunk": "pi2rt.engine",
    "Completion": "pi2rt.engine",
    "Engine": "pi2rt.api.sync_engine",
    "ModelInfo": "pi2rt.opening.model_info",
    "Prompt": "pi2rt.api.runtime",
    "Runtime": "pi2rt.api.runtime",
    "RuntimeStatistics": "pi2rt.api.runtime",
    "SamplingParams": "pi2rt.engine",
    "Stream": "pi2rt.api.sync_engine",
    "Timing": "pi2rt.engine",
    "TokenStream": "pi2rt.engine",
    "ensure_pack": "pi2rt.opening.pack_cache",
    "open_runtime": "pi2rt.api.runtime",
    "pull": "pi2rt.catalogue",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    if name == "catalogue":  # a module; importing it sets the attribute
        return import_module("pi2rt.catalogue")
    value: object = getattr(import_module(_MODULES.get(name, "pi2rt._errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
