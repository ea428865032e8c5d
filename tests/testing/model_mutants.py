"""Executors that compute another model than the one they were given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from pi2rt._errors import UnsupportedModelError
from pi2rt.formats import ModelFile
from pi2rt.memory import MemoryNeed, StateStore
from pi2rt.models import Attention, Block, FeedForward, MixtureOfExperts, ModelDescription
from pi2rt.runtime.executor import ExecutorOptions, Progress
from tests.testing.mutant import Mutant
from tests.testing.wrappers import Wrapper


class ComputesAnother(Wrapper):
    """Described by ``change``."""

    def __init__(self, change: Callable[[ModelDescription], ModelDescription]) -> None:
        super().__init__()
        self.change = change

    def change_model(self, model: ModelDescription) -> ModelDescription:
        return self.change(model)


def blocks(change: Callable[[Block], Block]) -> Callable[[ModelDescription], ModelDescription]:
    """A change of every block."""

    def changed(model: ModelDescription) -> ModelDescription:
        layers = (replace(layer, blocks=tuple(map(change, layer.blocks))) for layer in model.layers)
        return replace(model, layers=tuple(layers))

    return changed


def attention(change: Callable[[Attention], Attention]) -> Callable[[ModelDescription], ModelDescription]:
    return blocks(lambda block: change(block) if isinstance(block, Attention) else block)


def mixture(
    change: Callable[[MixtureOfExperts], MixtureOfExperts],
) -> Callable[[ModelDescription], ModelDescription]:
    return blocks(lambda block: change(block) if isinstance(block, MixtureOfExperts) else block)


def without_later_layers(model: ModelDescription) -> ModelDescription:
    return replace(model, layers=model.layers[:-3])


def without_query_bias(block: Attention) -> Attention:
    return replace(block, q=replace(block.q, bias=None))


def with_other_activation(block: Block) -> Block:
    return replace(block, activation="relu") if isinstance(block, FeedForward) else block


def with_first_window(model: ModelDescription) -> ModelDescription:
    """In all layers, where only some have one."""
    windows = [
        block.window for layer in model.layers for block in layer.blocks if isinstance(block, Attention)
    ]
    return attention(lambda block: replace(block, window=windows[0]))(model)


def with_window_one_less(block: Attention) -> Attention:
    return replace(block, window=None if block.window is None else block.window - 1)


def with_other_rope(block: Attention) -> Attention:
    assert block.rope is not None
    other = "interleaved" if block.rope.style == "halves" else "halves"
    return replace(block, rope=replace(block.rope, style=other))


class SkipsUnknownBlocks(Wrapper):
    def change_model(self, model: ModelDescription) -> ModelDescription:
        known = (Attention, FeedForward, MixtureOfExperts)
        layers = (
            replace(layer, blocks=tuple(each for each in layer.blocks if isinstance(each, known)))
            for layer in model.layers
        )
        return replace(model, layers=tuple(layers))


class RefusesWithoutAName(Wrapper):
    async def open(
        self,
        file: ModelFile,
        model: ModelDescription,
        options: ExecutorOptions,
        store: StateStore | None,
        progress: Progress,
    ) -> None:
        try:
            await super().open(file, model, options, store, progress)
        except UnsupportedModelError:
            raise UnsupportedModelError(file.path, "layers", "not supported") from None


class CountsWeightsAsInTheFile(Wrapper):
    """A quarter of what they are as float32, and nothing that a step needs."""

    def need(self, file: ModelFile, model: ModelDescription, options: ExecutorOptions) -> MemoryNeed:
        need = super().need(file, model, options)
        return replace(need, weights=need.weights // 4, activations=0)


_PROMPT = "test_logits_of_a_prompt_are_those_of_the_reference"
_SINGLE = "test_logits_of_single_tokens_are_those_of_the_reference"
_CHANGES: list[tuple[str, str, str, Callable[[ModelDescription], ModelDescription]]] = [
    ("the last three layers dropped", "llama", _PROMPT, without_later_layers),
    ("pairs of RoPE swapped", "llama", _PROMPT, attention(with_other_rope)),
    ("no RoPE", "llama", _SINGLE, attention(lambda block: replace(block, rope=None))),
    ("ReLU for SiLU", "llama", _PROMPT, blocks(with_other_activation)),
    ("attention not scaled", "llama", _SINGLE, attention(lambda block: replace(block, scale=1.0))),
    ("the window ignored", "mistral", _PROMPT, attention(lambda block: replace(block, window=None))),
    ("the window one less", "mistral", _SINGLE, attention(with_window_one_less)),
    ("biases dropped", "qwen2", _PROMPT, attention(without_query_bias)),
    ("norms of heads dropped", "qwen3", _PROMPT, attention(lambda block: replace(block, q_norm=None))),
    ("the embedding's scale dropped", "gemma3", _PROMPT, lambda model: replace(model, embedding_scale=1.0)),
    ("norms after blocks dropped", "gemma3", _PROMPT, blocks(lambda block: replace(block, post_norm=None))),
    ("one window for all layers", "gemma3", _PROMPT, with_first_window),
    ("one expert less", "mixtral", _PROMPT, mixture(lambda block: replace(block, n_used=block.n_used - 1))),
    (
        "weights of experts normalised otherwise",
        "qwen2_moe",
        _PROMPT,
        mixture(lambda block: replace(block, normalized=not block.normalized)),
    ),
    ("the shared expert dropped", "qwen2_moe", _SINGLE, mixture(lambda block: replace(block, shared=None))),
]


def computing(
    name: str, model: str, test: str, change: Callable[[ModelDescription], ModelDescription]
) -> Mutant:
    says = f"{model}, .*: logits of .* positions are not the reference's"
    return Mutant(lambda: ComputesAnother(change), test, says, {"model": model}, name=name)


_UNKNOWN = "test_an_unknown_kind_of_block_is_refused"

MUTANTS = [
    *(computing(*each) for each in _CHANGES),
    Mutant(SkipsUnknownBlocks, _UNKNOWN, "a model with an unknown kind of block was opened"),
    Mutant(RefusesWithoutAName, _UNKNOWN, "the error does not name the block"),
    Mutant(CountsWeightsAsInTheFile, "test_need_is_enough", r"need says \d+ MiB .* tokens took \d+ MiB"),
]
