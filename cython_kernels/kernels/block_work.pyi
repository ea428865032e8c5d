from pi2rt.cython_kernels.kernels.bundles import BundleLayout
from pi2rt.cython_kernels.kernels.memory import Memory

class BlockWork:
    nbytes: int
    def __init__(
        self,
        up_type: str | None,
        down_type: str,
        dim: int,
        neurons: int,
        layout: BundleLayout,
        every: int,
        name: str | None = None,
    ) -> None: ...
    def compute(self, weights: Memory, copies: int) -> None: ...
