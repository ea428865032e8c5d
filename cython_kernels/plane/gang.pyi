from collections.abc import Sequence

class Gang:
    cores: tuple[int, ...]
    event_fd: int
    def __init__(self, cores: Sequence[int], *, spin_ns: int = 50_000) -> None: ...
    def close(self) -> None: ...
