"""Executors that compute another model than the one they were given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from pi2rt.models import Attention, Block, FeedForward, MixtureOfExperts, ModelDescription
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


MUTANTS = [computing(*each) for each in _CHANGES]
