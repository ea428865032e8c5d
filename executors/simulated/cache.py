"""The books of a simulated KV cache: which token lies at which position of which page, and who wrote it.

Every rule that a caller breaks is an InternalError, because callers are pi2rt's own engine or a test.
"""

from __future__ import annotations

import numpy as np

from pi2rt._errors import InternalError
from pi2rt.models.states import PAGE_TOKENS
from pi2rt.runtime.step import Bind, Int32s, Slice, StateCopy, Step

_EMPTY = -1  # no token was written here


class SimulatedSequence:
    """What a slot belongs to since its last ``Bind``."""

    __slots__ = (
        "bound",
        "ended_at",
        "first_sample",
        "known",
        "length",
        "owned",
        "prompt",
        "sampled",
        "sampled_at",
        "slot",
        "written",
    )

    def __init__(self, bind: Bind, context: int) -> None:
        self.slot = bind.slot
        self.bound = bind
        self.known = np.empty(context, np.int32)  # tokens by position,
        self.prompt = self.length = min(
            len(bind.history), context
        )  # so many of them; the prompt must not change
        self.known[: self.length] = bind.history[: self.length]
        self.written: int | None = None  # positions up to here; None: nothing yet, a prefix may be shared
        self.owned: set[int] = set()  # pages it has written
        self.sampled, self.sampled_at = 0, -1  # the token sampled last, and the position it will have
        self.first_sample: int | None = None
        self.ended_at: int | None = None  # the position of the token that ended it


class SimulatedPages:
    """``pages`` pages of ``PAGE_TOKENS`` positions. Executors of several lanes may share them; each then sees what
    another is still writing."""

    def __init__(self, pages: int) -> None:
        self.tokens = np.full((pages, PAGE_TOKENS), _EMPTY, np.int32)
        self.owners: list[SimulatedSequence | None] = [None] * pages
        self.writers: dict[
            int, tuple[SimulatedCache, int]
        ] = {}  # of pages: which cache writes, and in how many steps


class SimulatedCache:
    """What ``slots`` sequences of at most ``context`` positions have in ``pages``."""

    def __init__(self, slots: int, pages: SimulatedPages, context: int, vocab_size: int) -> None:
        self._slots, self._context, self._vocab_size = slots, context, vocab_size
        self._pages = pages
        self._tokens, self._owners = pages.tokens, pages.owners
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
            self._sequences[bind.slot] = SimulatedSequence(bind, self._context)
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
            for page in piece.pages[: _pages_for(piece.start + piece.count)].tolist():
                if self._pages.writers.get(page, (self, 0))[0] is not self:
                    raise InternalError(
                        f"{step}: slot {piece.slot} uses page {page}, which another executor is still writing"
                    )
        copies = [copy for copy in step.copies if copy.kind == "page"]  # it has no fixed arrays
        for copy in copies:
            self._check_copy(step, copy)
        for page in _written_by(step):
            steps = self._pages.writers.get(page, (self, 0))[1]
            self._pages.writers[page] = self, steps + 1
        for copy in copies:
            self._tokens[copy.target] = self._tokens[copy.source]
            self._owners[copy.target] = None

    def end(self, step: Step) -> None:
        """The step writes no more."""
        for page in _written_by(step):
            steps = self._pages.writers[page][1]
            if steps > 1:
                self._pages.writers[page] = self, steps - 1
            else:
                del self._pages.writers[page]

    def skips(self, piece: Slice) -> bool:
        """Whether the slice comes behind the end of its sequence, and so does nothing."""
        sequence = self._sequences.get(piece.slot)
        return not len(piece.tokens) and sequence is not None and sequence.ended_at is not None

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
        self._note(sequence, start, tokens, where)
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
        if sequence.ended_at is None and sequence.bound.ended(token, position):
            sequence.ended_at = position

    def undo(self, sequence: SimulatedSequence, piece: Slice, lost: dict[int, int]) -> None:
        """The slice was stopped on its way: what it wrote is undefined from now on. ``lost``: learns of each page the
        first position in it that is."""
        start, end = piece.start, piece.start + piece.count
        for position in range(start, end):
            page = int(piece.pages[position // PAGE_TOKENS])
            lost.setdefault(page, position % PAGE_TOKENS)
            if self._owners[page] is sequence:
                self._tokens[page, position % PAGE_TOKENS] = _EMPTY
        if sequence.written is not None:
            sequence.written = min(sequence.written, start)
        sequence.length = min(sequence.length, max(sequence.prompt, start))
        sequence.sampled_at = -1
        if sequence.ended_at is not None and start < sequence.ended_at:
            sequence.ended_at = None

    def undo_copies(self, step: Step, lost: dict[int, int], *, stopped: bool) -> None:
        """What the step copied is undefined where it was ``stopped``, or as far as the page that it copied is
        (``lost``) and no slice of it wrote something else there."""
        for copy in step.copies:
            if copy.kind != "page":
                continue
            if stopped or copy.source in lost:
                first = lost[copy.target] = 0 if stopped else lost[copy.source]
                end = min(
                    (
                        piece.start % PAGE_TOKENS
                        for piece in step.slices
                        if not stopped and _written(piece)[0] == copy.target
                    ),
                    default=PAGE_TOKENS,
                )
                self._tokens[copy.target, first:end] = _EMPTY
            else:
                lost.pop(copy.target, None)

    def readable(self, piece: Slice) -> bool:
        """Whether all that the slice reads is defined."""
        tokens = self._tokens[piece.pages[: _pages_for(piece.start)]].reshape(-1)[: piece.start]
        return int(tokens.min(initial=0)) >= 0

    def _check_copy(self, step: Step, copy: StateCopy) -> None:
        for page in copy.source, copy.target:
            if not 0 <= page < len(self._owners):
                raise InternalError(f"{step}: {copy}, but there are {len(self._owners)} pages")
            if self._pages.writers.get(page, (self, 0))[0] is not self:
                raise InternalError(f"{step}: {copy}, but another executor is still writing page {page}")

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
        if len(set(needed.tolist())) != len(needed):
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
        if int(context.min(initial=0)) < 0:
            position = int(context.argmin())
            raise InternalError(
                f"{where}: reads position {position} in page {pages[position // PAGE_TOKENS]}, "
                f"which nobody has written"
            )
        both = min(start, sequence.length)
        wrong = _first_difference(sequence.known[:both], context[:both])
        if wrong is not None:
            raise InternalError(
                f"{where}: page {pages[wrong // PAGE_TOKENS]} holds token {context[wrong]} at position "
                f"{wrong}, but the sequence has {sequence.known[wrong]} there"
            )
        sequence.known[both:start] = context[both:]
        sequence.length = max(sequence.length, start)

    def _tokens_of(self, piece: Slice, sequence: SimulatedSequence, where: str) -> Int32s:
        if len(piece.tokens):
            return piece.tokens
        if sequence.sampled_at != piece.start:
            had = "none was sampled" if sequence.sampled_at < 0 else f"the last is for {sequence.sampled_at}"
            raise InternalError(f"{where}: follows on a sampled token, but {had}")
        return np.array([sequence.sampled], np.int32)

    def _note(self, sequence: SimulatedSequence, start: int, tokens: Int32s, where: str) -> None:
        """Keeps the sequence's own tokens, which its reads are checked against."""
        end = start + len(tokens)
        both = min(end, sequence.prompt) - start
        wrong = _first_difference(sequence.known[start : start + both], tokens[:both]) if both > 0 else None
        if wrong is not None:
            raise InternalError(
                f"{where}: token {tokens[wrong]} at position {start + wrong}, but the prompt given to "
                f"Bind has {sequence.known[start + wrong]} there"
            )
        sequence.known[start:end] = tokens
        sequence.length = max(end, sequence.prompt)  # what was sampled behind a rewind is void


def _first_difference(a: Int32s, b: Int32s) -> int | None:
    if np.array_equal(a, b):
        return None
    return int(np.flatnonzero(a != b)[0])


def _pages_for(positions: int) -> int:
    return -(-positions // PAGE_TOKENS)


def _written(piece: Slice) -> Int32s:
    """Pages that the slice writes to."""
    return piece.pages[piece.start // PAGE_TOKENS : _pages_for(piece.start + piece.count)]


def _written_by(step: Step) -> set[int]:
    """Pages that the step writes to."""
    copied = {copy.target for copy in step.copies if copy.kind == "page"}
    return copied.union(*(_written(piece).tolist() for piece in step.slices))
