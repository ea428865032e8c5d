"""What one rendering of a chat template may use up: time, memory, output.

A template is a program from a model file, so from anywhere. Jinja's sandbox keeps it away from Python, but
not from loops, nor from ``'a' * 10**9``. A thread cannot be stopped from outside and a process per chat turn
is too slow; instead everything a template does that can loop or grow goes through here
(``template_sandbox``), and each single operation is small enough to check the clock between two.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from itertools import islice
from types import GeneratorType
from typing import Any, TypeVar

from jinja2.utils import Namespace

from pi2rt._errors import TemplateError
from pi2rt.tokenizer.marked_text import run_count

T = TypeVar("T")

MAX_CHARACTERS = 8 << 20  # of one string, and of the output: some two million tokens
MAX_ITEMS = 1 << 17  # of one list, and of all lists in it; Jinja's range() ends at 100,000
MAX_DEPTH = 64  # of lists in lists; schemas of tools stay far below
MAX_ALLOCATED_BYTES = 128 << 20  # made while rendering, whether still in use or not
MAX_INTEGER_BITS = 4096

_BYTES_PER_ITEM = 24  # of a list; most items are numbers and short strings that it alone holds
_BYTES_PER_RUN = 8  # of trusted characters
_RUNS_PER_TICK = 16
_NUMBERS = (int, float, type(None))
_CHARACTERS_OF_OTHERS = 8
_CHARACTERS_PER_TICK = 1 << 14
_TICKS_PER_LOOK = 16  # looking at the clock costs about as much as a small operation


class Budget:
    """Counts what a rendering uses. One per rendering.

    Args:
        seconds: processor time of the thread that renders; a busy machine takes nothing away.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._deadline = time.thread_time() + seconds
        self._ticks = 0
        self._allocated = 0
        self.characters = 0  # of the output so far

    def tick(self, work: int = 1) -> None:
        """Counts work, in units of about a microsecond.

        Raises:
            TemplateError: the time is over.
        """
        self._ticks += work
        if self._ticks >= _TICKS_PER_LOOK:
            self._ticks = 0
            if time.thread_time() > self._deadline:
                raise TemplateError(
                    f"the chat template ran for over {self._seconds:g} s; it probably never ends"
                )

    def allocate(self, n_bytes: int) -> None:
        """Counts memory about to be taken, or just taken.

        Raises:
            TemplateError: it is too much.
        """
        self._allocated += n_bytes
        if self._allocated > MAX_ALLOCATED_BYTES:
            raise TemplateError(f"the chat template used over {MAX_ALLOCATED_BYTES >> 20} MiB of memory")

    def check_characters(self, count: int) -> None:
        """Raises:
        TemplateError: a string of this length is too long.
        """
        if count > MAX_CHARACTERS:
            raise TemplateError(
                f"the chat template makes a string of {count} characters; {MAX_CHARACTERS} are allowed"
            )

    def check_items(self, count: int) -> None:
        """Raises:
        TemplateError: a list of this length is too long.
        """
        if count > MAX_ITEMS:
            raise TemplateError(f"the chat template makes a list of {count} items; {MAX_ITEMS} are allowed")

    def emit(self, text: str) -> str:
        """Counts text of the output."""
        self.tick()
        self.characters += len(text)
        if self.characters > MAX_CHARACTERS:
            raise TemplateError(f"the chat template's output has more than {MAX_CHARACTERS} characters")
        return text

    def charge(self, value: T) -> T | Iterator[Any]:
        """Counts a value the template just made, and returns it; of a generator, one that counts its
        items."""
        kind = type(value)
        if kind is bool or value is None or kind is float:
            return value
        if isinstance(value, str):
            self.check_characters(len(value))
            runs = run_count(value)
            self.tick(len(value) // _CHARACTERS_PER_TICK + runs // _RUNS_PER_TICK)
            self.allocate(sys.getsizeof(value) + runs * _BYTES_PER_RUN)
        elif isinstance(value, int):
            if value.bit_length() > MAX_INTEGER_BITS:
                raise TemplateError(f"the chat template makes an integer of over {MAX_INTEGER_BITS} bits")
        elif isinstance(value, (list, tuple, dict, set, frozenset, Namespace)):
            self.weigh(value)
            items = 0 if isinstance(value, Namespace) else len(value)
            self.allocate(sys.getsizeof(value) + items * _BYTES_PER_ITEM)
        elif isinstance(value, GeneratorType):
            return self.counted(value)
        return value

    def counted(self, items: Iterable[Any]) -> Iterator[Any]:
        """The items, each of them counted as it comes."""
        for item in items:
            self.tick()
            self.allocate(64 if isinstance(item, (int, float, Mapping)) else sys.getsizeof(item))
            yield item

    def bounded(self, items: Iterable[Any]) -> list[Any]:
        """The items as a list.

        Raises:
            TemplateError: there are too many.
        """
        listed = list(islice(items, MAX_ITEMS + 1))
        self.check_items(len(listed))
        self.tick(len(listed) // 16)
        return listed

    def weigh(self, value: object) -> int:
        """About how many characters ``str(value)`` has. A list that holds another one twice is twice as
        heavy, since whoever prints, compares or serialises it walks it twice: sixty lists that each hold the
        last one twice would otherwise take for ever.

        Raises:
            TemplateError: it is too heavy, or nested too deeply.
        """
        if isinstance(value, str):
            return len(value)
        characters, items = 0, 0
        pending: list[tuple[object, int]] = [(value, 0)]
        while pending:
            current, depth = pending.pop()
            children = _children(current)
            if children is None:
                characters += _CHARACTERS_OF_OTHERS
                continue
            if depth == MAX_DEPTH:
                raise TemplateError(f"the chat template nests lists more than {MAX_DEPTH} deep")
            items += len(children)
            if items > MAX_ITEMS:
                raise TemplateError(f"the chat template makes lists of over {MAX_ITEMS} items in all")
            for child in children:
                if isinstance(child, str):
                    characters += len(child)
                elif isinstance(child, _NUMBERS):
                    characters += _CHARACTERS_OF_OTHERS
                else:
                    pending.append((child, depth + 1))
            characters += 4 * len(children)
        self.check_characters(characters)
        self.tick(items // 8)
        return characters


def _children(value: object) -> Collection[object] | None:
    """What printing a value prints too, or None if it is no container."""
    if isinstance(value, Mapping):
        return [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple, set, frozenset, KeysView, ValuesView, ItemsView)):
        return value
    return None
