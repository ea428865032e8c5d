"""The books of a simulated KV cache: which token lies at which position of which page, and who wrote it.

Every rule that a caller breaks is an InternalError, because callers are pi2rt's own engine or a test.
"""

from __future__ import annotations

import numpy as np

from pi2rt._errors import InternalError
from pi2rt.runtime.step import PAGE_TOKENS, Bind, Int32s, Slice, Step

_EMPTY = -1  # no token was written here


class SimulatedSequence:
    """What a slot belongs to since its last ``Bind``."""

    __slots__ = (
        "bound",
        "first_sample",
        "owned",
        "prompt",
        "sampled",
        "sampled_at",
        "slot",
        "tokens",
        "written",
    )

    def __init__(self, bind: Bind) -> None:
        self.slot = bind.slot
        self.bound = bind
        self.tokens: list[int] = bind.history.tolist()  # by position, as far as they are known
        self.prompt = len(self.tokens)  # of those, how many must not change
        self.written: int | None = None  # positions up to here; None: nothing yet, a prefix may be shared
        self.owned: set[int] = set()  # pages it has written
        self.sampled, self.sampled_at = 0, -1  # the token sampled last, and the position it will have
        self.first_sample: int | None = None


class SimulatedCache:
    """``pages`` pages of ``PAGE_TOKENS`` positions for ``slots`` sequences of at most ``context``
    positions."""

    def __init__(self, slots: int, pages: int, context: int, vocab_size: int) -> None:
        self._slots, self._context, self._vocab_size = slots, context, vocab_size
        self._tokens = np.full((pages, PAGE_TOKENS), _EMPTY, np.int32)
        self._owners: list[SimulatedSequence | None] = [None] * pages
        self._sequences: dict[int, SimulatedSequence] = {}  # by slot

    @property
    def nbytes(self) -> int:
        return self._tokens.nbytes

    def begin(self, step: Step) -> None:
        """Checks what concerns the step as a whole, and binds its slots."""
        slots = [piece.slot for piece in step.slices]
        if len(set(slots)) != len(slots):
            raise InternalError(f"{step}: two slices share a slot: {sorted(slots)}")
        binds = [bind.slot for bind in step.binds]
        if len(set(binds)) != len(binds):
            raise InternalError(f"{step}: two binds of one slot: {sorted(binds)}")
        for bind in step.binds:
            if not 0 <= bind.slot < self._slots:
                raise InternalError(f"{step}: bind of slot {bind.slot}, but there are {self._slots}")
            self._sequences[bind.slot] = SimulatedSequence(bind)
        writers: dict[int, int] = {}
        for piece in step.slices:
            self._check_slice(piece)
            for page in _written(piece).tolist():
                if page in writers:
                    raise InternalError(
                        f"{step}: slots {writers[page]} and {piece.slot} both write page {page}"
                    )
                writers[page] = piece.slot
        for piece in step.slices:
            for page in piece.pages[: piece.start // PAGE_TOKENS].tolist():
                if page in writers:
                    raise InternalError(
                        f"{step}: slot {piece.slot} reads page {page}, which slot {writers[page]} writes"
                    )

    def write(self, piece: Slice) -> tuple[SimulatedSequence, Int32s]:
        """Writes a slice's tokens.

        Returns:
            The sequence, and all its tokens up to the slice's last, int32 (start + count,), read through the
            page table.
        """
        start, end = piece.start, piece.start + piece.count
        sequence = self._sequences[piece.slot]
        where = f"slot {piece.slot}, positions {start} to {end - 1}"
        table = piece.pages[: _pages_for(end)]
        context = self._tokens[table].reshape(-1)[:start]
        self._check_read(sequence, table[: _pages_for(start)].tolist(), context, start, where)
        tokens = self._tokens_of(piece, sequence, where)
        for offset, token in enumerate(tokens.tolist()):
            self._note(sequence, start + offset, token, where)
        for page in _written(piece).tolist():
            self._owners[page] = sequence
            sequence.owned.add(page)
        positions = np.arange(start, end)
        self._tokens[table[positions // PAGE_TOKENS], positions % PAGE_TOKENS] = tokens
        if end % PAGE_TOKENS:  # what the page held for somebody else, or before a rewind
            self._tokens[table[-1], end % PAGE_TOKENS :] = _EMPTY
        sequence.written = end
        sequence.sampled_at = -1
        return sequence, np.concatenate((context, tokens))

    def sample(self, sequence: SimulatedSequence, position: int, token: int) -> None:
        """Notes that ``token`` was sampled, to stand at ``position``."""
        sequence.sampled, sequence.sampled_at = token, position
        if sequence.first_sample is None:
            sequence.first_sample = position

    def undo(self, sequence: SimulatedSequence, piece: Slice) -> None:
        """The slice was stopped on its way: what it wrote is undefined from now on."""
        start, end = piece.start, piece.start + piece.count
        for position in range(start, end):
            page = int(piece.pages[position // PAGE_TOKENS])
            if self._owners[page] is sequence:
                self._tokens[page, position % PAGE_TOKENS] = _EMPTY
        if sequence.written is not None:
            sequence.written = min(sequence.written, start)
        del sequence.tokens[max(sequence.prompt, start) :]
        sequence.sampled_at = -1

    def readable(self, piece: Slice) -> bool:
        """Whether all that the slice reads is defined."""
        tokens = self._tokens[piece.pages[: _pages_for(piece.start)]].reshape(-1)[: piece.start]
        return not bool((tokens == _EMPTY).any())

    def _check_slice(self, piece: Slice) -> None:
        start, end, pages = piece.start, piece.start + piece.count, piece.pages
        where = f"slot {piece.slot}, positions {start} to {end - 1}"
        if not 0 <= piece.slot < self._slots:
            raise InternalError(f"{where}: there are {self._slots} slots")
        if piece.slot not in self._sequences:
            raise InternalError(f"{where}: the slot was never bound")
        if start < 0 or end > self._context:
            raise InternalError(f"{where}: outside the context of {self._context} positions")
        for what, array in ("pages", pages), ("tokens", piece.tokens), ("targets", piece.targets):
            if array is not None and (array.dtype != np.int32 or array.ndim != 1):
                raise InternalError(
                    f"{where}: {what} are {array.dtype} {array.shape}, not int32 in one dimension"
                )
        needed = pages[: _pages_for(end)]
        if len(needed) < _pages_for(end):
            raise InternalError(f"{where}: {len(pages)} pages in the table, {_pages_for(end)} needed")
        if int(needed.min()) < 0 or int(needed.max()) >= len(self._owners):
            raise InternalError(f"{where}: pages {needed.tolist()}, but there are {len(self._owners)}")
        if len(np.unique(needed)) != len(needed):
            raise InternalError(f"{where}: a page stands twice in the table {needed.tolist()}")
        if piece.targets is not None and len(piece.targets) != piece.count:
            raise InternalError(f"{where}: {len(piece.targets)} targets for {piece.count} tokens")
        if piece.targets is not None and int(piece.targets.max()) >= self._vocab_size:
            raise InternalError(
                f"{where}: target {piece.targets.max()} of a vocabulary of {self._vocab_size}"
            )
        tokens = piece.tokens
        if len(tokens) and not (tokens.min() >= 0 and tokens.max() < self._vocab_size):
            raise InternalError(
                f"{where}: tokens from {tokens.min()} to {tokens.max()}, vocabulary of {self._vocab_size}"
            )

    def _check_read(
        self, sequence: SimulatedSequence, pages: list[int], context: Int32s, start: int, where: str
    ) -> None:
        if sequence.written is not None and start > sequence.written:
            raise InternalError(f"{where}: positions {sequence.written} to {start - 1} were never written")
        for page in pages:
            owner = self._owners[page]
            if page in sequence.owned and owner is not sequence and owner is not None:
                raise InternalError(f"{where}: its page {page} was written by slot {owner.slot} since")
        empty = np.flatnonzero(context == _EMPTY)
        if len(empty):
            raise InternalError(
                f"{where}: reads position {empty[0]} in page {pages[empty[0] // PAGE_TOKENS]}, "
                f"which nobody has written"
            )
        known = np.array(sequence.tokens[:start], np.int32)
        wrong = np.flatnonzero(known != context[: len(known)])
        if len(wrong):
            position = int(wrong[0])
            raise InternalError(
                f"{where}: page {pages[position // PAGE_TOKENS]} holds token {context[position]} at position "
                f"{position}, but the sequence has {known[position]} there"
            )
        sequence.tokens.extend(context[len(known) :].tolist())

    def _tokens_of(self, piece: Slice, sequence: SimulatedSequence, where: str) -> Int32s:
        if len(piece.tokens):
            return piece.tokens
        if sequence.sampled_at != piece.start:
            had = "none was sampled" if sequence.sampled_at < 0 else f"the last is for {sequence.sampled_at}"
            raise InternalError(f"{where}: follows on a sampled token, but {had}")
        return np.array([sequence.sampled], np.int32)

    def _note(self, sequence: SimulatedSequence, position: int, token: int, where: str) -> None:
        """Keeps the sequence's own list of tokens, which its reads are checked against."""
        if position < len(sequence.tokens):
            if sequence.tokens[position] == token:
                return
            if position < sequence.prompt:
                raise InternalError(
                    f"{where}: token {token} at position {position}, but the prompt given to Bind has "
                    f"{sequence.tokens[position]} there"
                )
            del sequence.tokens[position:]
        sequence.tokens.append(token)


def _pages_for(positions: int) -> int:
    return -(-positions // PAGE_TOKENS)


def _written(piece: Slice) -> Int32s:
    """Pages that the slice writes to."""
    return piece.pages[piece.start // PAGE_TOKENS : _pages_for(piece.start + piece.count)]
