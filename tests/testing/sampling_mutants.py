"""Executors that sample otherwise than the specification says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from pi2rt.executors.reference.sampling import log_softmax, penalised
from pi2rt.runtime.step import Bind, Floats, Int32s, Sampled, Sampling, Unusable
from tests.testing.mutant import Mutant
from tests.testing.wrappers import Resampling


class Samples(Resampling):
    """By other options than those given."""

    def options(self, sampling: Sampling, logits: Floats, counts: Int32s) -> Sampling:
        return sampling

    def pick(
        self, logits: Floats, sampling: Sampling, counts: Int32s, position: int, place: int
    ) -> Sampled | Unusable:
        return super().pick(logits, self.options(sampling, logits, counts), counts, position, place)

    def probabilities(self, sampling: Sampling, logits: Floats, counts: Int32s) -> Floats:
        """Descending, after penalties and temperature."""
        changed = penalised(logits, sampling, counts)
        assert not isinstance(changed, Unusable)
        return np.sort(np.exp(log_softmax(changed / np.float32(sampling.temperature or 1.0))))[::-1]


class IgnoresAllOptions(Samples):
    def options(self, sampling: Sampling, logits: Floats, counts: Int32s) -> Sampling:
        return Sampling(logprobs=sampling.logprobs)


class Ignores(Samples):
    """One of them."""

    def __init__(self, field: str) -> None:
        super().__init__()
        self.ignored = field

    def options(self, sampling: Sampling, logits: Floats, counts: Int32s) -> Sampling:
        changes: dict[str, Any] = {self.ignored: getattr(Sampling(), self.ignored)}
        return replace(sampling, **changes)


class AlwaysDraws(Samples):
    """Also where the temperature is 0."""

    def options(self, sampling: Sampling, logits: Floats, counts: Int32s) -> Sampling:
        return replace(sampling, temperature=sampling.temperature or 1.0)


class TemperatureInverted(Samples):
    def options(self, sampling: Sampling, logits: Floats, counts: Int32s) -> Sampling:
        return replace(sampling, temperature=1 / sampling.temperature if sampling.temperature else 0.0)


class SeedOf32Bits(Samples):
    def options(self, sampling: Sampling, logits: Floats, counts: Int32s) -> Sampling:
        return replace(sampling, seed=sampling.seed % 2**32)


class PositionOffByOne(Samples):
    """Of the last token, not of the one that is sampled."""

    def pick(
        self, logits: Floats, sampling: Sampling, counts: Int32s, position: int, place: int
    ) -> Sampled | Unusable:
        return super().pick(logits, sampling, counts, position - 1, place)


class SamplesByPlace(Samples):
    def pick(
        self, logits: Floats, sampling: Sampling, counts: Int32s, position: int, place: int
    ) -> Sampled | Unusable:
        return super().pick(logits, sampling, counts, position + 1000 * place, place)


class TopKOneMore(Samples):
    def options(self, sampling: Sampling, logits: Floats, counts: Int32s) -> Sampling:
        return replace(sampling, top_k=sampling.top_k + 1 if sampling.top_k else 0)


class TopPWithoutTheLast(Samples):
    """The token that crosses the sum is not kept."""

    def options(self, sampling: Sampling, logits: Floats, counts: Int32s) -> Sampling:
        if sampling.top_p == 1.0:
            return sampling
        mass = np.cumsum(self.probabilities(sampling, logits, counts))
        return replace(sampling, top_p=1.0, top_k=max(1, int(np.count_nonzero(mass <= sampling.top_p))))


class TopPBeforeTemperature(Samples):
    def options(self, sampling: Sampling, logits: Floats, counts: Int32s) -> Sampling:
        if sampling.top_p == 1.0:
            return sampling
        mass = np.cumsum(self.probabilities(replace(sampling, temperature=1.0), logits, counts))
        return replace(sampling, top_p=1.0, top_k=1 + int(np.count_nonzero(mass < sampling.top_p)))


class TopPBeforeTopK(Samples):
    """Of the whole vocabulary, not of those that top_k keeps."""

    def options(self, sampling: Sampling, logits: Floats, counts: Int32s) -> Sampling:
        mass = np.cumsum(self.probabilities(sampling, logits, counts))
        kept = 1 + int(np.count_nonzero(mass < sampling.top_p))
        return replace(sampling, top_p=1.0, top_k=min(kept, sampling.top_k or kept))


class MinPOfOne(Samples):
    """Not of the most likely token's probability."""

    def options(self, sampling: Sampling, logits: Floats, counts: Int32s) -> Sampling:
        found = self.probabilities(sampling, logits, counts)
        kept = max(1, int(np.count_nonzero(found >= sampling.min_p)))
        return replace(sampling, min_p=0.0, top_k=kept)


class RepetitionDividesAll(Samples):
    """Negative logits too, which makes them more likely."""

    def pick(
        self, logits: Floats, sampling: Sampling, counts: Int32s, position: int, place: int
    ) -> Sampled | Unusable:
        penalty = np.float32(sampling.repetition_penalty)
        changed = np.where(counts > 0, logits / penalty, logits)
        return super().pick(changed, replace(sampling, repetition_penalty=1.0), counts, position, place)


class PresenceByCount(Samples):
    def options(self, sampling: Sampling, logits: Floats, counts: Int32s) -> Sampling:
        return replace(
            sampling,
            presence_penalty=0.0,
            frequency_penalty=sampling.frequency_penalty + sampling.presence_penalty,
        )


class FrequencyOnce(Samples):
    def options(self, sampling: Sampling, logits: Floats, counts: Int32s) -> Sampling:
        return replace(
            sampling,
            frequency_penalty=0.0,
            presence_penalty=sampling.frequency_penalty + sampling.presence_penalty,
        )


class BiasAfterTemperature(Samples):
    def options(self, sampling: Sampling, logits: Floats, counts: Int32s) -> Sampling:
        factor = sampling.temperature or 1.0
        bias = tuple((token, value * factor) for token, value in sampling.logit_bias)
        return replace(sampling, logit_bias=bias)


class FirstBiasOnly(Samples):
    def options(self, sampling: Sampling, logits: Floats, counts: Int32s) -> Sampling:
        return replace(sampling, logit_bias=sampling.logit_bias[:1])


class NoHistory(Resampling):
    def count_history(self, slot: int, history: Int32s) -> Int32s:
        return super().count_history(slot, history[:0])


class HistoryOnce(Resampling):
    """Each token, however often it is there."""

    def count_history(self, slot: int, history: Int32s) -> Int32s:
        return super().count_history(slot, np.unique(history))


class HistoryTwice(Resampling):
    """From the bind, and from the slices again."""

    def count_history(self, slot: int, history: Int32s) -> Int32s:
        return 2 * super().count_history(slot, history)


class LastOfHistory(Resampling):
    def count_history(self, slot: int, history: Int32s) -> Int32s:
        return super().count_history(slot, history[-64:])


class CountsNoGeneratedToken(Resampling):
    def count(self, slot: int, token: int) -> None:
        pass


class KeepsCounts(Resampling):
    """Of the sequence that the slot had before."""

    def count_history(self, slot: int, history: Int32s) -> Int32s:
        before = self.counts.get(slot, np.int32(0))
        return super().count_history(slot, history) + before


class KeepsOptions(Resampling):
    def bind(self, bind: Bind) -> None:
        super().bind(replace(bind, sampling=self.bound.get(bind.slot, bind.sampling)))


class KeepsBias(Resampling):
    def bind(self, bind: Bind) -> None:
        before = self.bound.get(bind.slot, Sampling()).logit_bias
        super().bind(
            replace(bind, sampling=replace(bind.sampling, logit_bias=before + bind.sampling.logit_bias))
        )


_FIELDS = (
    "temperature",
    "seed",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
)
_PICKS = r"token \d+ at position \d+, but from the executor's own logits .* picks"


def ignoring(field: str) -> Mutant:
    return Mutant(lambda: Ignores(field), f"test_{field}", f"{field}: {_PICKS}", name=f"Ignores {field}")


MUTANTS = [
    Mutant(IgnoresAllOptions, "test_temperature", f"temperature: {_PICKS}"),
    Mutant(IgnoresAllOptions, "test_all_cuts_at_once", f"top_k, top_p and min_p together: {_PICKS}"),
    *(ignoring(field) for field in _FIELDS),
    Mutant(AlwaysDraws, "test_greedy", f"temperature 0: {_PICKS}"),
    Mutant(TemperatureInverted, "test_temperature", f"temperature: {_PICKS}"),
    Mutant(SeedOf32Bits, "test_seed", f"seed: {_PICKS}"),
    Mutant(PositionOffByOne, "test_seed", f"seed: {_PICKS}"),
    Mutant(
        SamplesByPlace,
        "test_random_numbers_depend_on_seed_and_position_alone",
        "the random number of a token depends on seed and position alone: tokens are",
    ),
    Mutant(TopKOneMore, "test_top_k", f"top_k: {_PICKS}"),
    Mutant(TopPWithoutTheLast, "test_top_p", f"top_p: {_PICKS}"),
    Mutant(TopPBeforeTemperature, "test_all_cuts_at_once", f"together: {_PICKS}"),
    Mutant(TopPBeforeTopK, "test_all_cuts_at_once", f"together: {_PICKS}"),
    Mutant(MinPOfOne, "test_min_p", f"min_p: {_PICKS}"),
    Mutant(RepetitionDividesAll, "test_repetition_penalty", f"repetition_penalty: {_PICKS}"),
    Mutant(PresenceByCount, "test_presence_penalty", f"presence_penalty: {_PICKS}"),
    Mutant(FrequencyOnce, "test_frequency_penalty", f"frequency_penalty: {_PICKS}"),
    Mutant(BiasAfterTemperature, "test_logit_bias", f"logit_bias: {_PICKS}"),
    Mutant(FirstBiasOnly, "test_logit_bias", f"logit_bias: {_PICKS}"),
    Mutant(NoHistory, "test_history_counts", f"penalties of Bind.history: {_PICKS}"),
    Mutant(HistoryOnce, "test_history_counts", f"penalties of Bind.history: {_PICKS}"),
    Mutant(HistoryTwice, "test_history_counts", f"penalties of Bind.history: {_PICKS}"),
    Mutant(LastOfHistory, "test_history_counts", f"penalties of Bind.history: {_PICKS}"),
    Mutant(CountsNoGeneratedToken, "test_generated_tokens_count", f"penalties of generated tokens: {_PICKS}"),
    Mutant(
        KeepsCounts, "test_a_bind_replaces_what_the_slot_counted", f"a slot that was bound again: {_PICKS}"
    ),
    Mutant(
        KeepsOptions, "test_a_bind_replaces_what_the_slot_counted", f"a slot that was bound again: {_PICKS}"
    ),
    Mutant(KeepsBias, "test_a_bind_replaces_what_the_slot_counted", f"a slot that was bound again: {_PICKS}"),
]
