"""Measures what the synthetic models promise, by running them in plain numpy float32.

python benchmarks/synthetic_activity.py bamboo-small --tokens 512
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt
from synthetic_model import SPECIALS, STAY, TOPICS, SyntheticModel
from synthetic_shape import SHAPES
from synthetic_tensors import topic_of

from pi2rt._errors import UnsupportedModelError
from pi2rt.executors.reference.model import ReferenceModel
from pi2rt.formats import ModelFile
from pi2rt.formats.quants import dequantize
from pi2rt.memory import StateLayout, StateStore
from pi2rt.models import FeedForward, describe
from pi2rt.models.states import PAGE_TOKENS
from pi2rt.runtime.step import Floats, Int32s

WINDOW = 5
"""Tokens whose neurons are taken to be in memory still, as in LLM in a flash."""


@dataclass(frozen=True, slots=True)
class LayerActivity:
    """Of one layer, over the tokens of a text; shares between 0 and 1.

    Args:
        active: gates that are active, of all.
        share_of_80: the smallest part of the neurons that makes 80 % of the activations.
        hottest, coldest: how often neurons of the hottest hundredth and of the coldest tenth are active.
        overlap: of a token's active neurons, those that were active at the token before it.
        new: of a token's active neurons, those that were active at none of the ``WINDOW`` tokens before it.
        rms: of the stream that the feed-forward block reads, over what the model's biases count on.
    """

    active: float
    share_of_80: float
    hottest: float
    coldest: float
    overlap: float
    new: float
    rms: float


@dataclass(frozen=True, slots=True)
class Activity:
    """``stay``: mean probability of the words of the current token's topic, after all layers; else None."""

    layers: tuple[LayerActivity, ...]
    stay: float | None


def activity(model: SyntheticModel, tokens: Int32s, layers: int | None = None) -> Activity:
    """Measures the first ``layers`` layers (None: all) over a text, int32 (tokens,), of more than ``WINDOW`` tokens.

    Raises:
        UnsupportedModelError: a mixture of experts, whose gates are not those of one block.
    """
    description = describe(model)
    if model.shape.experts:
        raise UnsupportedModelError(
            model.path, "experts", "activity is measured of plain feed-forward blocks only"
        )
    description = replace(description, layers=description.layers[:layers])
    pages = -(-len(tokens) // PAGE_TOKENS)
    recorder = _Recorder(
        description, _Dequantised(model), StateStore(StateLayout.of(description, "f32"), pages)
    )
    recorder.fired, recorder.rms = [], []
    stream = recorder.forward(tokens, 0, np.arange(pages, dtype=np.int32))
    found = [
        _summary(fired, rms / model.expected_rms(layer))
        for layer, (fired, rms) in enumerate(zip(recorder.fired, recorder.rms, strict=True))
    ]
    complete = len(description.layers) == model.shape.layers
    return Activity(tuple(found), _stay(recorder.logits(stream), tokens) if complete else None)


def wandering_text(vocab: int, count: int, seed: int = 0) -> Int32s:
    """A text as the models write it, int32 (count,): the topic changes with probability 1 - ``STAY``, and words of a
    topic are equally likely."""
    random = np.random.RandomState(seed)
    words = np.arange(SPECIALS, vocab)
    topics = topic_of(words, vocab, TOPICS)
    known = np.unique(topics)
    text = np.empty(count, np.int32)
    topic = random.choice(known)
    for i in range(count):
        if random.random_sample() > STAY:
            topic = random.choice(known)
        text[i] = random.choice(words[topics == topic])
    return text


class _Dequantised(Mapping[str, Floats]):
    """Tensors as float32, each made when it is asked for: layers take turns in memory."""

    def __init__(self, file: ModelFile) -> None:
        self._file = file

    def __getitem__(self, name: str) -> Floats:
        info = self._file.tensors[name]
        return dequantize(info.type, self._file.read(name), info.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.tensors)

    def __len__(self) -> int:
        return len(self._file.tensors)


class _Recorder(ReferenceModel):
    """Keeps which gates were active, bool (tokens, hidden) for each layer, and the stream's mean rms."""

    fired: list[npt.NDArray[np.bool_]]
    rms: list[float]

    def factors(self, block: FeedForward, x: Floats) -> tuple[Floats, Floats | None]:
        y, product = self.gate_product(block, x)
        self.fired.append(product > 0)
        self.rms.append(float(np.mean(1 / y[:, 0])))  # the constant 1, normalised
        return super().factors(block, x)


def _summary(fired: npt.NDArray[np.bool_], rms: float) -> LayerActivity:
    counts = np.sort(fired.sum(0))[::-1]
    neurons = len(counts)
    often = counts / len(fired)
    active = fired.sum()
    before = np.zeros_like(fired[WINDOW:])
    for back in range(1, WINDOW + 1):
        before |= fired[WINDOW - back : len(fired) - back]
    return LayerActivity(
        active=float(fired.mean()),
        share_of_80=float(np.searchsorted(np.cumsum(counts), 0.8 * active) / neurons),
        hottest=float(often[: max(1, neurons // 100)].mean()),
        coldest=float(often[-max(1, neurons // 10) :].mean()),
        overlap=float((fired[1:] & fired[:-1]).sum() / fired[1:].sum()),
        new=float((fired[WINDOW:] & ~before).sum() / fired[WINDOW:].sum()),
        rms=rms,
    )


def _stay(logits: Floats, tokens: Int32s) -> float:
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    vocab = logits.shape[1]
    same = (
        topic_of(np.arange(vocab), vocab, TOPICS) == topic_of(tokens.astype(np.int64), vocab, TOPICS)[:, None]
    )
    return float(np.mean((weights * same).sum(-1) / weights.sum(-1)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", choices=[name for name, shape in SHAPES.items() if not shape.experts])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--layers", type=int, help="only the first ones")
    parser.add_argument("--activity", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    model = SyntheticModel(options.shape, shape, activity=options.activity, seed=options.seed)
    found = activity(model, wandering_text(shape.vocab, options.tokens), options.layers)
    names = [each.name for each in fields(LayerActivity)]
    print("| layer |", " | ".join(names), "|")
    print("|---" * (len(names) + 1) + "|")
    for number, layer in enumerate(found.layers):
        print(f"| {number} |", " | ".join(f"{getattr(layer, name):.3f}" for name in names), "|")
    if found.stay is not None:
        print(f"stays in its topic: {found.stay:.3f}")


if __name__ == "__main__":
    main()
