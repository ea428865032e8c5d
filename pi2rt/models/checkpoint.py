"""A model file as an architecture sees it: the same hyperparameters and tensor roles for both containers.

Roles carry GGUF's short names (``attn_q``); ``huggingface_names`` maps them to a Hugging Face checkpoint's.
Every number is checked against sane bounds here, before anything is built from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from pi2rt._errors import ModelFormatError, UnsupportedModelError
from pi2rt.formats.model_file import ModelFile, printable
from pi2rt.models.parts import Linear, Norm

MAX_LAYERS = 1024
MAX_WIDTH = 1 << 22  # of any dimension but the vocabulary's
MAX_CONTEXT = 1 << 30
MAX_HEAD_DIM = 1 << 14
"""Elements of a head. Frequencies of the rotation take about 40 us for each pair of these (``rope_scaling.py``)."""

# (GGUF's key without the architecture, config.json's)
_HEADS = "attention.head_count", "num_attention_heads"
_KV_HEADS = "attention.head_count_kv", "num_key_value_heads"
_HIDDEN = "feed_forward_length", "intermediate_size"

_HUGGINGFACE_NAMES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_HUGGINGFACE_PREFIXES = ("model.", "language_model.model.", "model.language_model.", "")


def is_gguf(file: ModelFile) -> bool:
    """Whether metadata and names are GGUF's; else they are a Hugging Face directory's."""
    return "general.architecture" in file.metadata


def layer_prefix(file: ModelFile) -> str:
    """What the names of all tensors inside layers start with."""
    return "blk." if is_gguf(file) else f"{_huggingface_prefix(file)}layers."


def _huggingface_prefix(file: ModelFile) -> str:
    for prefix in _HUGGINGFACE_PREFIXES:
        if f"{prefix}embed_tokens.weight" in file.tensors:
            return prefix
    return _HUGGINGFACE_PREFIXES[0]


class Checkpoint:
    """Hyperparameters and tensor names of one model file.

    Args:
        file: the open model file.
        defaults: what the Hugging Face configuration class of the architecture assumes for keys that
            config.json leaves out (a key that is there and null stays None, as it does there).
        huggingface_names: roles that this architecture names otherwise than most.
        norm_offset: what Hugging Face checkpoints of this architecture add to norm weights.
        context: positions that the model will be opened for, None for all it was trained for.

    Raises:
        ModelFormatError: a hyperparameter is missing, of the wrong kind or out of bounds.
    """

    def __init__(
        self,
        file: ModelFile,
        *,
        defaults: Mapping[str, Any] | None = None,
        huggingface_names: Mapping[str, str] | None = None,
        norm_offset: float = 0.0,
        context: int | None = None,
    ) -> None:
        self.file = file
        self.gguf = is_gguf(file)
        self.architecture = file.architecture
        self._config = dict(defaults or {}) | self._read_config()
        self._names = _HUGGINGFACE_NAMES | dict(huggingface_names or {})
        self._prefix = "" if self.gguf else _huggingface_prefix(file)
        self._norm_offset = 0.0 if self.gguf else norm_offset

        self.n_layers = self.integer("block_count", "num_hidden_layers", high=MAX_LAYERS)
        self.dim = self.integer("embedding_length", "hidden_size")
        self.trained_context = self.integer("context_length", "max_position_embeddings", high=MAX_CONTEXT)
        self.context = context or self.trained_context
        self.eps = self.number("attention.layer_norm_rms_epsilon", "rms_norm_eps", low=0.0, high=1.0)

    # -- hyperparameters, each read and checked when an architecture asks for it: not every one has attention

    @cached_property
    def hidden(self) -> int:
        """Neurons of every feed-forward block."""
        return self._same(*_HIDDEN)

    @cached_property
    def n_heads(self) -> int:
        """Query heads of every layer that has attention."""
        return self._same(*_HEADS)

    @cached_property
    def n_kv_heads(self) -> int:
        """KV heads of every layer that has attention."""
        kv_heads = self._same(*_KV_HEADS, default=self.n_heads)
        self._check_sharing(self.n_heads, kv_heads)
        return kv_heads

    @cached_property
    def head_dim(self) -> int:
        """Elements of every head; even."""
        given = self.value("attention.key_length", "head_dim") is not None
        default = None if given else self._default_head_dim()
        head_dim = self.integer("attention.key_length", "head_dim", default=default, high=MAX_HEAD_DIM)
        if head_dim % 2:
            raise self.error(
                "attention.key_length", "head_dim", f"{head_dim} is odd; the rotation needs pairs"
            )
        value_dim = self.integer("attention.value_length", None, default=head_dim)
        if value_dim != head_dim:
            raise self.unsupported(
                "attention.value_length", None, f"values of {value_dim} beside keys of {head_dim} elements"
            )
        return head_dim

    @cached_property
    def layer_heads(self) -> tuple[tuple[int, int], ...]:
        """(query heads, KV heads) of each layer; (0, 0) of one without attention. Hybrid files have either as an array,
        with zeros."""
        heads = self.integers(*_HEADS, default=0)
        kv_heads = self.integers(*_KV_HEADS, default=heads)
        found = tuple((each, kv) if each and kv else (0, 0) for each, kv in zip(heads, kv_heads, strict=True))
        for each, kv in found:
            if kv:
                self._check_sharing(each, kv)
        return found

    @cached_property
    def layer_hidden(self) -> tuple[int, ...]:
        """Neurons of each layer's feed-forward block; 0 of one without."""
        return self.integers(*_HIDDEN, default=0)

    def heads_of(self, layer: int) -> tuple[int, int]:
        """(query heads, KV heads) of a layer that has to have attention.

        Raises:
            ModelFormatError: the file does not say how many, or says 0 for all layers.
            UnsupportedModelError: the layer has none.
        """
        if not any(kv_heads for _, kv_heads in self.layer_heads):
            return self.n_heads, self.n_kv_heads
        heads, kv_heads = self.layer_heads[layer]
        if not kv_heads:
            raise self.unsupported(*_KV_HEADS, f"layer {layer} without attention")
        return heads, kv_heads

    def hidden_of(self, layer: int) -> int:
        """Neurons of the feed-forward block that a layer has to have.

        Raises:
            ModelFormatError: the file does not say how many, or says 0 for all layers.
            UnsupportedModelError: the layer has none.
        """
        if not any(self.layer_hidden):
            return self.hidden
        if not self.layer_hidden[layer]:
            raise self.unsupported(*_HIDDEN, f"layer {layer} without a feed-forward block")
        return self.layer_hidden[layer]

    def _same(self, gguf: str, huggingface: str, default: int | None = None) -> int:
        """The number of all layers that have one above 0."""
        found = self.value(gguf, huggingface)
        if isinstance(found, (list, tuple)):
            numbers = set(self.integers(gguf, huggingface, default=0)) - {0}
            if len(numbers) == 1:
                return numbers.pop()
        return self.integer(gguf, huggingface, default=default)  # and of others it says what is wrong

    def integers(
        self,
        gguf: str | None,
        huggingface: str | None,
        *,
        default: int | Sequence[int],
        high: int = MAX_WIDTH,
    ) -> tuple[int, ...]:
        """A whole number from 0 on for each layer: of one number for all, or of an array with one for each.

        Raises:
            ModelFormatError: it is neither, or the array has not as many as there are layers.
        """
        value = self.value(gguf, huggingface)
        if value is None:
            value = default
        if not isinstance(value, list | tuple):
            return (self.integer(gguf, huggingface, default=value, low=0, high=high),) * self.n_layers
        if len(value) != self.n_layers:
            raise self.error(gguf, huggingface, f"has {len(value)} values for {self.n_layers} layers")
        for each in value:
            whole = isinstance(each, int | np.integer) and not isinstance(each, bool | np.bool_)
            if not whole or not 0 <= each <= high:
                raise self.error(
                    gguf, huggingface, f"{printable(repr(each))} is not an integer between 0 and {high}"
                )
        return tuple(int(each) for each in value)

    def _check_sharing(self, heads: int, kv_heads: int) -> None:
        if heads % kv_heads:
            raise self.error(
                *_KV_HEADS,
                f"{heads} query heads cannot share {kv_heads} key-value heads evenly",
            )

    def value(self, gguf: str | None, huggingface: str | None) -> Any:
        """The raw value under the key of this container, None where there is none. Keys of GGUF are given
        without the architecture; None stands for a container that has no such key."""
        key = gguf if self.gguf else huggingface
        if key is None:
            return None
        if not self.gguf:
            return self._config.get(key)
        value = self._config.get(f"{self.architecture}.{key}")
        if isinstance(value, np.ndarray):
            value = value.tolist()
        if isinstance(value, (list, tuple)) and len(value) and all(v == value[0] for v in value):
            return value[0]  # GGUF lets some numbers be given per layer
        return value

    def integer(
        self,
        gguf: str | None,
        huggingface: str | None,
        *,
        default: int | None = None,
        low: int = 1,
        high: int = MAX_WIDTH,
    ) -> int:
        value = self.value(gguf, huggingface)
        if value is None:
            value = default
        if value is None:
            raise self.error(gguf, huggingface, "missing")
        if isinstance(value, (list, tuple)):
            raise self.unsupported(gguf, huggingface, "a different value for each layer")
        if (
            isinstance(value, (bool, np.bool_))
            or not isinstance(value, (int, np.integer))
            or not low <= value <= high
        ):
            raise self.error(
                gguf, huggingface, f"{printable(repr(value))} is not an integer between {low} and {high}"
            )
        return int(value)

    def number(
        self,
        gguf: str | None,
        huggingface: str | None,
        *,
        default: float | None = None,
        low: float = 0.0,
        high: float = 1e15,
    ) -> float:
        """A finite number with ``low < number <= high``."""
        value = self.value(gguf, huggingface)
        if value is None:
            value = default
        if value is None:
            raise self.error(gguf, huggingface, "missing")
        return self.check_number(gguf, huggingface, value, low=low, high=high)

    def check_number(
        self,
        gguf: str | None,
        huggingface: str | None,
        value: object,
        *,
        low: float = 0.0,
        high: float = 1e15,
    ) -> float:
        if (
            isinstance(value, (bool, np.bool_))
            or not isinstance(value, (int, float, np.number))
            or not low < value <= high
        ):
            raise self.error(
                gguf,
                huggingface,
                f"{printable(repr(value))} is not a number above {low:g} and at most {high:g}",
            )
        return float(value)

    def optional_number(self, gguf: str | None, huggingface: str | None) -> float | None:
        """As ``number``, but None where it is missing, null or 0 (how files say "off")."""
        value = self.value(gguf, huggingface)
        if value is None or (isinstance(value, (int, float, np.number)) and value == 0):
            return None
        return self.number(gguf, huggingface)

    def text(self, gguf: str | None, huggingface: str | None) -> str | None:
        """None where it is missing, null or empty."""
        value = self.value(gguf, huggingface)
        if value is None or isinstance(value, str):
            return value or None
        raise self.error(gguf, huggingface, f"{printable(repr(value))} is not a name")

    def windows(self, *, period: int = 1, first: int = 0) -> tuple[int | None, ...]:
        """The attention window of every layer, None for full attention.

        ``layer_types`` of config.json or the per-layer flags of a GGUF file decide; without them every
        ``period``-th layer is full where ``period`` > 1, and else all layers from ``first`` on have the
        window.
        """
        if self.optional_number("attention.sliding_window", "sliding_window") is None:
            return (None,) * self.n_layers
        window = self.integer("attention.sliding_window", "sliding_window", high=MAX_CONTEXT)
        local = self._local_layers()
        if local is None:
            local = [i >= first and (period == 1 or (i + 1) % period != 0) for i in range(self.n_layers)]
        return tuple(window if is_local else None for is_local in local)

    # -- tensors

    def has(self, role: str, layer: int | None = None, kind: str = "weight") -> bool:
        return self.tensor(role, layer, kind) in self.file.tensors

    def tensor(self, role: str, layer: int | None = None, kind: str = "weight") -> str:
        """The file's name of a tensor, whether it is there or not."""
        if self.gguf:
            return f"{role}.{kind}" if layer is None else f"blk.{layer}.{role}.{kind}"
        name = self._names[role]
        return (
            f"{self._prefix}{name}.{kind}" if layer is None else f"{self._prefix}layers.{layer}.{name}.{kind}"
        )

    def norm(self, role: str, layer: int | None = None) -> Norm:
        return Norm(self.tensor(role, layer), self.eps, self._norm_offset)

    def linear(self, role: str, layer: int, *, bias: bool | None = False) -> Linear:
        """``bias``: True where the architecture always has one, None where it is up to the file."""
        if bias is None:
            bias = self.has(role, layer, "bias")
        return Linear(self.tensor(role, layer), self.tensor(role, layer, "bias") if bias else None)

    def head(self, *, tied: bool) -> Linear:
        """The output projection; ``tied`` is what config.json means where it says nothing."""
        embedding = Linear(self.tensor("token_embd"))
        if self.gguf:
            return Linear("output.weight") if "output.weight" in self.file.tensors else embedding
        says = self._config.get("tie_word_embeddings")
        if tied if says is None else says:
            return embedding
        # A checkpoint of text and vision keeps the head below its language model.
        inner = "language_model.lm_head.weight"
        return Linear(inner if inner in self.file.tensors else "lm_head.weight")

    # -- errors

    def error(self, gguf: str | None, huggingface: str | None, problem: str) -> ModelFormatError:
        return ModelFormatError(self.file.path, self._field(gguf, huggingface), problem)

    def unsupported(self, gguf: str | None, huggingface: str | None, problem: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            self.file.path, self._field(gguf, huggingface), f"{problem} is not supported by pi2rt"
        )

    def _field(self, gguf: str | None, huggingface: str | None) -> str:
        return f"{self.architecture}.{gguf}" if self.gguf else f"config.json: {huggingface}"

    # -- reading

    def _read_config(self) -> dict[str, Any]:
        config = dict(self.file.metadata)
        text = config.get("text_config")  # of a checkpoint for text and vision
        if not self.gguf and isinstance(text, Mapping):
            config.update(text)
        return config

    def _default_head_dim(self) -> int:
        if self.dim % self.n_heads:
            raise self.error(*_HEADS, f"{self.dim} is not divisible by {self.n_heads} heads")
        return max(1, self.dim // self.n_heads)

    def _local_layers(self) -> Sequence[bool] | None:
        gguf, huggingface = "attention.sliding_window_pattern", "layer_types"
        flags = self._config.get(f"{self.architecture}.{gguf}" if self.gguf else huggingface)
        if not isinstance(flags, (list, tuple, np.ndarray)):
            return None  # GGUF may also give the period as a number; see gemma3.py
        if len(flags) != self.n_layers:
            raise self.error(gguf, huggingface, f"{len(flags)} entries for {self.n_layers} layers")
        if self.gguf:
            return [bool(flag) for flag in flags]
        for kind in flags:
            if kind not in ("full_attention", "sliding_attention"):
                raise self.unsupported(gguf, huggingface, printable(repr(kind)))
        return [kind == "sliding_attention" for kind in flags]
