"""Whether an executor runs every kind of block of a model."""

from __future__ import annotations

import os
from collections.abc import Collection

from pi2rt._errors import UnsupportedModelError
from pi2rt.models.blocks import Block
from pi2rt.models.description import ModelDescription


def check_blocks(
    path: str | os.PathLike[str], model: ModelDescription, kinds: Collection[type[Block]], executor: str
) -> None:
    """Refuses a model at its opening.

    Args:
        path: of the model file, for the message.
        kinds: those that the executor has in its table.
        executor: its name.

    Raises:
        UnsupportedModelError: names the first block whose kind is not among them.
    """
    for number, layer in enumerate(model.layers):
        for block in layer.blocks:
            if type(block) not in kinds:
                raise UnsupportedModelError(
                    path,
                    f"layer {number}",
                    f"has a block of the kind {block.kind!r}, which the executor {executor!r} does not run; it runs "
                    f"{', '.join(sorted(repr(kind.kind) for kind in kinds))}",
                )
