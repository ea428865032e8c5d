"""A model for executors that do not read it."""

from __future__ import annotations

from pathlib import Path

from pi2rt.formats import ModelFile, TensorInfo
from pi2rt.models import Linear, ModelDescription, Norm

STAND_IN_MODEL = ModelDescription(
    architecture="llama",
    name="stand-in",
    dim=32,
    vocab_size=512,
    context_length=1024,
    embedding="token_embd.weight",
    layers=(),
    final_norm=Norm("output_norm.weight", 1e-5),
    head=Linear("token_embd.weight"),
)


class StandInFile(ModelFile):
    """A model file without a tensor."""

    def __init__(self) -> None:
        self.path = Path("stand-in")
        self.architecture = "llama"
        self.metadata = {}
        self.tensors = {}

    def read_into(self, tensor: TensorInfo, start: int, buffer: memoryview) -> None:
        raise AssertionError(f"nobody may read {tensor}")

    def close(self) -> None:
        pass
