"""Matrix products of one core, by type of the weights and of the activations: rows one block at a time, and in panels.

    python benchmarks/kernels.py [--columns 64] [--kernels NAME]

Billions of operations a second (a multiplication and an addition are two), the best of many repetitions, weights in
L2; quantising the activations is part of it, as in a model.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from pi2rt.cython_kernels.kernels import native
from pi2rt.formats.quants import TYPES

ROWS, K = 256, 1536
WAYS = (("int16", False), ("int16", True), ("mixed", True), ("int8", False), ("int8", True))


def rate(
    kernels: native.Kernels, type_name: str, columns: int, activations: str, panels: bool, repeat: int
) -> float:
    memory = native.Memory(native.matrix_bytes(type_name, ROWS, K))
    x = np.random.default_rng(0).standard_normal((columns, K)).astype(np.float32)
    wide, mixed = activations != "int8", activations == "mixed"
    best = float("inf")
    for _ in range(repeat):
        begin = time.perf_counter()
        kernels.gemm(type_name, memory.address, ROWS, K, x, wide=wide, mixed=mixed, panels=panels)
        best = min(best, time.perf_counter() - begin)
    memory.close()
    return 2 * ROWS * K * columns / best / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--columns", type=int, default=64)
    parser.add_argument("--kernels", help="a variant, see 'pi2rt info'; default: the best")
    parser.add_argument("--repeat", type=int, default=300)
    options = parser.parse_args()
    kernels = native.Kernels(native.current(options.kernels))
    print(f"{native.current(options.kernels)}, {options.columns} columns, GOP/s\n")
    print("| weights | int16 | int16 panels | mixed panels | int8 | int8 panels |\n|---|---|---|---|---|---|")
    for name in TYPES:
        if name in ("F32", "F16", "BF16"):
            continue
        rates = [
            rate(kernels, name, options.columns, activations, panels, options.repeat)
            for activations, panels in WAYS
        ]
        print(f"| {name} | " + " | ".join(f"{each:.0f}" for each in rates) + " |", flush=True)


if __name__ == "__main__":
    main()
