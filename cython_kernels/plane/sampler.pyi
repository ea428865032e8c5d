import numpy as np
import numpy.typing as npt

from pi2rt.cython_kernels.kernels.variants import Variant
from pi2rt.runtime.step import Sampling, Unusable
from pi2rt.runtime.token_mask import TokenMask

def unusable(token: int) -> Unusable: ...
def sample(
    kernels: Variant,
    logits: npt.NDArray[np.float32],
    sampling: Sampling,
    counts: npt.NDArray[np.int32],
    position: int,
    allowed: TokenMask | None = None,
) -> tuple[int, float]: ...
