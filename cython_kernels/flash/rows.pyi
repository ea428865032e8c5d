def memory_bytes(type_id: int, k: int) -> int: ...

class Rows:
    path: str
    deadline: float | None
    ended_at: int
    reads: int
    def __init__(
        self,
        path: str,
        type_id: int,
        k: int,
        offset: int,
        memory: int,
        *,
        name: str | None = None,
        deadline: float | None = None,
    ) -> None: ...
    def close(self) -> int: ...
