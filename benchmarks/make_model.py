"""Writes a synthetic model: random weights in a known shape, for speed and memory; its text is noise.

    python benchmarks/make_model.py bamboo-7b bamboo.gguf
    python benchmarks/make_model.py bamboo-7b bamboo.pi2
    python benchmarks/make_model.py custom tiny.gguf --dim 512 --hidden 2048 --layers 4 --heads 8 --activity 0.05

PATH ends in .gguf, or in .pi2 for a pack, which is written directly, without a GGUF file, and has the same weights.
Models are Q4_0, and their gates are active as a trained ReLU model's are (synthetic_model.py); tinyllama-1.1b and
llama-0.5b are plain Q4_K_M, to a .gguf only. llama.cpp loads every GGUF file, and runs SiLU whatever the activation is:
other results, the same work.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from synthetic_gguf import write_gguf
from synthetic_k_quants import write_model
from synthetic_model import SyntheticModel
from synthetic_shape import K_QUANT_SHAPES, SHAPES, Shape

CUSTOM = Shape(1024, 3584, 8, 8, 8, 32000, "drelu")
"""What the options of the shape "custom" change."""


def main(arguments: Sequence[str] | None = None) -> None:
    formatter = partial(argparse.RawDescriptionHelpFormatter, width=110)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("shape", choices=[*sorted((*SHAPES, *K_QUANT_SHAPES)), "custom"])
    parser.add_argument("path", type=Path, help="a name that ends in .gguf or .pi2")
    numbers = ("dim", "hidden", "layers", "heads", "kv-heads", "vocab", "experts", "experts-used")
    for name in numbers:
        parser.add_argument(f"--{name}", type=int, help="instead of the shape's")
    parser.add_argument("--activation", choices=("silu", "relu", "drelu"), help="instead of the shape's")
    parser.add_argument(
        "--activity", type=float, default=0.1, help="mean share of gates that are active (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--force", action="store_true", help="replace the file if it is there")
    options = parser.parse_args(arguments)
    fields = [*(name.replace("-", "_") for name in numbers), "activation"]
    changes = {name: value for name in fields if (value := getattr(options, name)) is not None}

    if options.path.suffix not in (".gguf", ".pi2"):
        parser.error(f"{options.path} ends neither in .gguf nor in .pi2")
    if options.path.exists() and not options.force:
        parser.error(f"{options.path} is there already; remove it or add --force")
    begun = time.perf_counter()
    if options.shape in K_QUANT_SHAPES:
        if options.path.suffix != ".gguf" or changes:
            parser.error(
                f"{options.shape} is Q4_K_M, which goes to a .gguf, and has no options (pi2rt convert makes a pack)"
            )
        write_model(options.path, K_QUANT_SHAPES[options.shape], options.shape)
    else:
        if "heads" in changes:
            changes.setdefault("kv_heads", changes["heads"])
        try:
            shape = replace(SHAPES.get(options.shape, CUSTOM), **changes)
            model = SyntheticModel(options.shape, shape, activity=options.activity, seed=options.seed)
        except ValueError as error:
            parser.error(str(error))
        if options.path.suffix == ".gguf":
            write_gguf(model, options.path)
        else:
            from pi2rt import Pi2rtError
            from pi2rt.planner.pack.convert import (
                convert_file,
            )  # needs the native module, which a GGUF file does not

            try:
                convert_file(model, options.path, overwrite=options.force)
            except Pi2rtError as error:
                parser.error(str(error))
    seconds, size = time.perf_counter() - begun, options.path.stat().st_size
    print(
        f"{options.path}: {size / 1e6:.1f} MB in {seconds:.1f} s ({size / 1e6 / seconds:.0f} MB/s)",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
