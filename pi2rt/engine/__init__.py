"""Sequences, scheduler, prefix reuse: the step loop."""

from pi2rt.engine.chunk import Chunk, Completion, FinishDetail, FinishReason, Timing, TopLogprobs
from pi2rt.engine.engine import Engine
from pi2rt.engine.options import EngineOptions
from pi2rt.engine.queue import QueueStatistics, Ticket
from pi2rt.engine.sampling_params import SamplingParams
from pi2rt.engine.statistics import EngineStatistics
from pi2rt.engine.token_stream import TokenStream

__all__ = [
    "Chunk",
    "Completion",
    "Engine",
    "EngineOptions",
    "EngineStatistics",
    "FinishDetail",
    "FinishReason",
    "QueueStatistics",
    "SamplingParams",
    "Ticket",
    "Timing",
    "TokenStream",
    "TopLogprobs",
]
