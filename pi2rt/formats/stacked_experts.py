"""The matrices of a mixture's experts, which GGUF files stack in one tensor of three dimensions, as one matrix each.

They get the names that the oldest files gave them, which had no stacks: of 8 experts, ``blk.0.ffn_up_exps.weight``
becomes ``blk.0.ffn_up.0.weight`` to ``blk.0.ffn_up.7.weight``. So whatever is done to a matrix (loaded, streamed,
stored by neuron) is done to one expert's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from pi2rt._errors import ModelFormatError
from pi2rt.formats.model_file import TensorInfo

MAX_EXPERTS = 4096
MAX_MATRICES = 1 << 18
"""Of all experts. The largest known model has 70,000; stacks of unknown types have no bytes that would bound them."""

_STACK = re.compile(r"(.+\.ffn_(?:gate|up|down))_exps\.weight")


def split_experts(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Replaces every stack by its matrices, in their order.

    Raises:
        ModelFormatError: a stack or the model has too many, or one of them is there by itself as well.
    """
    matrices = sum(
        info.shape[0] for name, info in tensors.items() if len(info.shape) == 3 and _STACK.fullmatch(name)
    )
    split: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        stack = _STACK.fullmatch(name) if len(info.shape) == 3 else None
        if stack is None:
            split[name] = info
            continue
        experts, each = info.shape[0], info.nbytes // info.shape[0]
        if experts > MAX_EXPERTS:
            raise ModelFormatError(
                info.path, f"tensor {name}", f"has {experts} experts; at most {MAX_EXPERTS} are allowed"
            )
        if matrices > MAX_MATRICES:
            problem = f"the experts of the model have {matrices} matrices; at most {MAX_MATRICES} are allowed"
            raise ModelFormatError(info.path, f"tensor {name}", problem)
        for expert in range(experts):
            part = f"{stack[1]}.{expert}.weight"
            if part in tensors:
                raise ModelFormatError(info.path, f"tensor {part}", f"is there twice: {name} has it, too")
            split[part] = replace(
                info, name=part, shape=info.shape[1:], offset=info.offset + expert * each, nbytes=each
            )
    return split
