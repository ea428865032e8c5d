from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Bytes: TypeAlias = npt.NDArray[np.uint8]
Floats: TypeAlias = npt.NDArray[np.float32]
BundleLayout: TypeAlias = tuple[int, int, int, int]

def up_quants(type_name: str, k: int) -> int: ...
def down_quants(type_name: str, rows: int) -> int: ...
def up_scales(type_name: str, k: int) -> int: ...
def down_scales(type_name: str, rows: int) -> int: ...
def bundle_up(
    type_name: str,
    source: Bytes,
    n: int,
    k: int,
    layout: BundleLayout,
    to: Bytes | None,
    scales: Bytes | None,
    *,
    at_byte: int = 0,
) -> int | None: ...
def bundle_down(
    type_name: str,
    source: Bytes,
    rows: int,
    hidden: int,
    first: int,
    count: int,
    layout: BundleLayout,
    to: Bytes | None,
    scales: Bytes | None,
) -> int | None: ...
def unbundle_up(
    type_name: str, pages: Bytes, scales: Bytes, n: int, k: int, layout: BundleLayout, *, at_byte: int = 0
) -> Floats: ...
def unbundle_down(
    type_name: str, pages: Bytes, scales: Bytes, rows: int, n: int, layout: BundleLayout
) -> Floats: ...
