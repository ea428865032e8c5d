"""What a runtime says about its model."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from pi2rt.formats import ModelFile
from pi2rt.models import ModelDescription
from pi2rt.models.tensors import iterate_tensors


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """``parameters``: numbers in the tensors that are used, shared ones once. ``file_bytes``: bytes of
    these tensors in the file. ``quantisation``: the types that make up at least a hundredth of them, the
    largest first ("Q4_1 71 %, Q8_0 29 %"). ``context``: positions per sequence, as opened;
    ``model_context``: as trained. ``sparsity``: "exact", or what of the model is left out and what that costs.
    """

    name: str
    path: Path
    architecture: str
    parameters: int
    file_bytes: int
    quantisation: str
    vocab_size: int
    layers: int
    context: int
    model_context: int
    sparsity: str = "exact"


def model_info(file: ModelFile, model: ModelDescription, context: int, model_context: int) -> ModelInfo:
    """Sums up an open model."""
    sizes = {name: math.prod(shape) for name, shape in iterate_tensors(model)}
    types: Counter[str] = Counter()
    for name in sizes:
        types[file.tensors[name].type] += file.tensors[name].nbytes
    total = types.total()
    shares = [(kind, round(100 * size / total)) for kind, size in types.most_common()]
    shares = [(kind, share) for kind, share in shares if share]
    only = len(shares) == 1
    return ModelInfo(
        name=model.name,
        path=Path(file.path),
        architecture=model.architecture,
        parameters=sum(sizes.values()),
        file_bytes=total,
        quantisation=shares[0][0] if only else ", ".join(f"{kind} {share} %" for kind, share in shares),
        vocab_size=model.vocab_size,
        layers=len(model.layers),
        context=context,
        model_context=model_context,
    )
