"""The sizes an engine is built with."""

from __future__ import annotations

from dataclasses import dataclass

from pi2rt._errors import RequestError
from pi2rt.memory import PAGE_TOKENS


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """``slots``, ``pages``, ``context``, ``max_tokens``: as the executor was told. ``mixed_chunk``: prompt
    tokens in a step that also decodes, at most. ``stream_buffer``: chunks that wait for a slow consumer
    before its sequence is paused. ``max_queue``: requests that wait for a slot, at most. ``mask_deadline``: seconds
    that the executor waits for a token mask, for messages."""

    vocab_size: int
    slots: int
    pages: int
    context: int
    max_tokens: int = 512
    mixed_chunk: int = 64
    stream_buffer: int = 1024
    max_queue: int = 128
    mask_deadline: float = 10.0

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__.keys() - {"mask_deadline"}:
            least = 0 if name == "max_queue" else 1
            if getattr(self, name) < least:
                raise RequestError(f"{name}={getattr(self, name)}: at least {least} is needed")
        if self.pages * PAGE_TOKENS < self.context:
            raise RequestError(
                f"pages={self.pages}: fewer than a context of {self.context} tokens needs, "
                f"{-(-self.context // PAGE_TOKENS)}"
            )
        if self.max_tokens < self.slots:
            raise RequestError(
                f"max_tokens={self.max_tokens}: a step needs room for a token of each of "
                f"{self.slots} sequences"
            )
