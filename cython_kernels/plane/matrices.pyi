from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.float32]
Scales: TypeAlias = tuple[int, int, int]

class Matrix:
    def __init__(
        self,
        type_id: int,
        rows: int,
        k: int,
        address: int,
        bias: Floats | None = None,
        *,
        piece: tuple[int, int] | None = None,
        region: int = -1,
        page_blocks: int = 0,
    ) -> None: ...

class Bundles:
    def __init__(
        self,
        region: int,
        up: Scales | None,
        down: Scales,
        *,
        down_plane: int,
        neurons: int,
        per_page: int,
        neuron_bytes: int,
        up_bytes: int,
        gate: Scales | None = None,
        gate_bytes: int = 0,
        gate_bias: Floats | None = None,
        up_bias: Floats | None = None,
        down_bias: Floats | None = None,
        thresholds: Floats | None = None,
        order: npt.NDArray[np.uint16] | None = None,
        elsewhere: npt.NDArray[np.uint8] | None = None,
    ) -> None: ...
