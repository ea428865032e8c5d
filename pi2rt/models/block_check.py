"""Whether an executor runs every kind of block of a model.

An executor has one table, from the class of a block to a function of its own: all that branches on kinds.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable

from pi2rt._errors import UnsupportedModelError
from pi2rt.models.blocks import Block
from pi2rt.models.description import ModelDescription


def kinds_of(table: Iterable[type[Block]]) -> frozenset[str]:
    """Names of the kinds that are in a table."""
    return frozenset(each.kind for each in table)


def check_blocks(
    path: str | os.PathLike[str], model: ModelDescription, kinds: Collection[str], executor: str
) -> None:
    """Refuses a model at its opening.

    Args:
        path: of the model file, for the message.
        kinds: names of those that the executor runs (``Block.kind``).
        executor: its name.

    Raises:
        UnsupportedModelError: names the first block whose kind is not among them.
    """
    for number, layer in enumerate(model.layers):
        for block in layer.blocks:
            if block.kind not in kinds:
                raise UnsupportedModelError(
                    path,
                    f"layer {number}",
                    f"has a block of the kind {block.kind!r}, which the executor {executor!r} does not run; it runs "
                    f"{', '.join(sorted(map(repr, kinds))) or 'none'}",
                )
