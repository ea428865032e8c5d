"""Answers in a form that a program can read: one of several texts, and a number of at most four digits.

``token_mask`` is called with the tokens generated so far, while the model computes, and says which may come next.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

import pi2rt


class Form:
    """Which bytes each token spells, and which tokens end a text."""

    def __init__(self, engine: pi2rt.Engine) -> None:
        tokenizer, self.vocabulary = engine.tokenizer, engine.model.vocab_size
        plain = (token for token in range(self.vocabulary) if not tokenizer.is_special(token))
        self.spelling = {token: tokenizer.token_bytes(token) for token in plain}
        self.ends = tokenizer.eos_ids

    def written(self, generated: Sequence[int]) -> bytes:
        return b"".join(self.spelling[token] for token in generated)

    def mask(self, tokens: Iterable[int]) -> np.ndarray:
        """uint32, a bit for each token: bit i % 32 of word i // 32 allows token i."""
        bits = np.zeros(-(-self.vocabulary // 32) * 32, np.bool_)
        bits[list(tokens)] = True
        return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32)


class OneOf(Form):
    """One of these texts, in whatever tokens."""

    def __init__(self, engine: pi2rt.Engine, *choices: str) -> None:
        super().__init__(engine)
        self.choices = [choice.encode() for choice in choices]
        self.tokens = defaultdict(list)  # by what they spell
        for token, spelling in self.spelling.items():
            self.tokens[spelling].append(token)

    def __call__(self, generated: Sequence[int]) -> np.ndarray:
        written = self.written(generated)
        left = [choice[len(written) :] for choice in self.choices if choice.startswith(written)]
        beginnings = {rest[:length] for rest in left for length in range(1, len(rest) + 1)}
        allowed = {token for beginning in beginnings for token in self.tokens.get(beginning, ())}
        return self.mask(allowed | self.ends if b"" in left else allowed)


class Digits(Form):
    """The regular expression [0-9]{1,most}."""

    def __init__(self, engine: pi2rt.Engine, most: int) -> None:
        super().__init__(engine)
        digits = {token: text for token, text in self.spelling.items() if text.isdigit()}
        self.masks = []  # by the number of digits that are there
        for there in range(most + 1):
            allowed = {token for token, text in digits.items() if there + len(text) <= most}
            self.masks.append(self.mask(allowed | self.ends if there else allowed))

    def __call__(self, generated: Sequence[int]) -> np.ndarray:
        return self.masks[len(self.written(generated))]


with pi2rt.Engine("smollm2") as engine:
    cities = OneOf(engine, " Paris", " Berlin", " Rome", " Madrid")
    for country in ("France", "Germany", "Italy", "Spain"):
        answer = engine.generate(f"The capital of {country} is", token_mask=cities).text
        assert answer.encode() in cities.choices
        print(f"The capital of {country}:{answer}")

    year = Digits(engine, 4)
    for event in ("The first man landed on the moon", "The Berlin Wall fell"):
        answer = engine.generate(f"{event} in the year ", token_mask=year).text
        print(f"{event}: {int(answer)}")
