"""Reads how a file wants positions rotated, and folds it into a ``Rope``.

GGUF: ``{arch}.rope.freq_base``, ``.rope.dimension_count``, ``.rope.scaling.*`` and the tensors ``rope_freqs``
(Llama 3.1's stretch, as divisors) and ``rope_factors_long`` / ``rope_factors_short``. Hugging Face:
``rope_theta`` with ``rope_scaling``, or the newer ``rope_parameters`` (which may be given per layer type).

Two kinds depend on how long the text gets: LongRoPE takes the long factors, and dynamic NTK a larger base,
when the context the model is opened for exceeds the one it was trained for. Transformers decides that by the
length of each text; a KV cache cannot follow it, so here the context decides once, as in llama.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from pi2rt._errors import ModelFormatError
from pi2rt.formats.model_file import printable
from pi2rt.models import rope_scaling
from pi2rt.models.checkpoint import MAX_CONTEXT, Checkpoint
from pi2rt.models.parts import Rope


def read_rope(
    checkpoint: Checkpoint,
    style: Literal["interleaved", "halves"],
    *,
    layer_type: str = "full_attention",
    base: float = 10_000.0,
) -> Rope:
    """The rotation of one model.

    Args:
        checkpoint: the file.
        style: how its q and k rows are ordered.
        layer_type: which entry of a ``rope_parameters`` that has one for each layer type.
        base: used where the file names none.

    Raises:
        ModelFormatError: a parameter is missing or out of bounds.
        UnsupportedModelError: a scaling pi2rt does not have.
    """
    with np.errstate(all="ignore"):  # what overflows is found in the end
        if checkpoint.gguf:
            base = checkpoint.number("rope.freq_base", None, default=base, low=1.0)
            return _from_gguf(checkpoint, style, base)
        return _from_huggingface(checkpoint, style, _HuggingFaceParameters(checkpoint, layer_type, base))


def plain_rope(
    checkpoint: Checkpoint, dims: int, base: float, style: Literal["interleaved", "halves"]
) -> Rope:
    return _rope(checkpoint, style, rope_scaling.plain(dims, base))


def _rope(
    c: Checkpoint,
    style: Literal["interleaved", "halves"],
    frequencies: rope_scaling.Frequencies,
    magnitude: float = 1.0,
) -> Rope:
    if not np.isfinite(frequencies).all() or not math.isfinite(magnitude):
        raise c.error("rope", "rope_parameters", "the numbers together give frequencies that are not finite")
    return Rope(style, tuple(float(f) for f in frequencies), magnitude)


# -- GGUF


def _from_gguf(c: Checkpoint, style: Literal["interleaved", "halves"], base: float) -> Rope:
    dims = c.integer("rope.dimension_count", None, default=c.head_dim, low=2, high=c.head_dim)
    if dims % 2:
        raise c.error("rope.dimension_count", None, f"{dims} is odd; the rotation needs pairs")
    frequencies = rope_scaling.plain(dims, base)
    kind = c.text("rope.scaling.type", None)
    factor = (
        c.optional_number("rope.scaling.factor", None) or c.optional_number("rope.scale_linear", None) or 1.0
    )
    original = c.integer(
        "rope.scaling.original_context_length", None, default=c.trained_context, high=MAX_CONTEXT
    )
    magnitude = c.optional_number("rope.scaling.attn_factor", None) or 1.0
    if kind in (None, "none", "linear"):
        frequencies = rope_scaling.linear(frequencies, 1.0 if kind == "none" else factor)
    elif kind == "yarn":
        frequencies = rope_scaling.yarn(
            dims,
            base,
            factor,
            original,
            beta_fast=c.optional_number("rope.scaling.yarn_beta_fast", None) or 32.0,
            beta_slow=c.optional_number("rope.scaling.yarn_beta_slow", None) or 1.0,
            extrapolation=c.number("rope.scaling.yarn_ext_factor", None, default=1.0, low=-1e-9, high=1.0),
        )
        # Converters write Transformers' attention_factor here.
        attention_factor = c.optional_number("rope.scaling.yarn_attn_factor", None)
        magnitude *= attention_factor or rope_scaling.yarn_magnitude(factor)
    elif kind != "longrope":
        raise c.unsupported("rope.scaling.type", None, printable(repr(kind)))

    long = c.context > original
    for role in ("rope_freqs", "rope_factors_long" if long else "rope_factors_short"):
        if c.has(role):
            frequencies = frequencies / _gguf_factors(c, role, dims)
            break
    else:
        if kind == "longrope":
            raise ModelFormatError(
                c.file.path,
                "rope.scaling.type",
                "'longrope' without the tensors rope_factors_long and _short",
            )
    return _rope(c, style, frequencies, magnitude)


def _gguf_factors(c: Checkpoint, role: str, dims: int) -> rope_scaling.Frequencies:
    info = c.file.tensors[c.tensor(role)]
    if info.type != "F32" or info.shape != (dims // 2,):
        raise ModelFormatError(
            c.file.path, f"tensor {info.name}", f"{info.type} {info.shape}; F32 ({dims // 2},) expected"
        )
    factors = c.file.read(info.name).view(np.float32).astype(np.float64)
    if not (np.isfinite(factors) & (factors > 0)).all():
        raise ModelFormatError(c.file.path, f"tensor {info.name}", "factors must be finite and positive")
    return factors


# -- Hugging Face


class _HuggingFaceParameters:
    """``rope_parameters`` in any of the shapes config.json has had."""

    def __init__(self, c: Checkpoint, layer_type: str, base: float) -> None:
        self.c = c
        self.key = "rope_parameters"
        given = c.value(None, self.key)
        if not given:
            self.key = "rope_scaling"
            given = c.value(None, self.key) or {}
        if not isinstance(given, Mapping):
            raise c.error(None, self.key, f"{printable(repr(given))} is not an object")
        nested = given.get(layer_type)
        self._given: Mapping[str, Any] = nested if isinstance(nested, Mapping) else given
        kind = self._given.get("rope_type", self._given.get("type", "default"))
        if not isinstance(kind, str):
            raise c.error(None, f"{self.key}.rope_type", f"{printable(repr(kind))} is not a name")
        self.kind = "longrope" if kind == "su" else kind
        self.base = self.number("rope_theta", c.number(None, "rope_theta", default=base, low=1.0), low=1.0)
        share = self.number(
            "partial_rotary_factor", c.number(None, "partial_rotary_factor", default=1.0), high=1.0
        )
        self.dims = int(c.head_dim * share)
        if self.dims < 2 or self.dims % 2:
            raise c.error(
                None, "partial_rotary_factor", f"rotates {self.dims} elements; an even number expected"
            )

    def get(self, name: str) -> Any:
        return self._given.get(name)

    def number(
        self, name: str, default: float | None = None, *, low: float = 0.0, high: float = 1e15
    ) -> float:
        value = self._given.get(name)
        if value is None:
            value = default
        if value is None:
            raise self.c.error(
                None, f"{self.key}.{name}", f"missing; rope type {printable(repr(self.kind))} needs it"
            )
        return self.c.check_number(None, f"{self.key}.{name}", value, low=low, high=high)

    @property
    def original_context(self) -> int:
        """Positions the model was trained for before it was stretched."""
        name = "original_max_position_embeddings"
        outer = self.c.optional_number(None, name)  # Phi-3's place for it
        value = outer or self.number(name, self.c.trained_context, high=MAX_CONTEXT)
        if not 2 <= value <= MAX_CONTEXT:
            raise self.c.error(None, f"{self.key}.{name}", f"{value:g} is not between 2 and {MAX_CONTEXT}")
        return int(value)

    def factors(self, name: str) -> rope_scaling.Frequencies:
        values = self.get(name)
        if not isinstance(values, list) or len(values) != self.dims // 2:
            raise self.c.error(None, f"{self.key}.{name}", f"a list of {self.dims // 2} numbers expected")
        return np.array([self.c.check_number(None, f"{self.key}.{name}", v) for v in values])


def _from_huggingface(
    c: Checkpoint, style: Literal["interleaved", "halves"], p: _HuggingFaceParameters
) -> Rope:
    frequencies = rope_scaling.plain(p.dims, p.base)
    if p.kind == "default":
        return _rope(c, style, frequencies)
    if p.kind == "linear":
        return _rope(c, style, rope_scaling.linear(frequencies, p.number("factor")))
    if p.kind == "dynamic":
        factor = p.number("factor", low=0.99)
        return _rope(c, style, rope_scaling.dynamic_ntk(p.dims, p.base, factor, c.trained_context, c.context))
    if p.kind == "llama3":
        low, high = p.number("low_freq_factor"), p.number("high_freq_factor")
        if not low < high:
            raise c.error(None, f"{p.key}.high_freq_factor", f"{high:g} is not above low_freq_factor {low:g}")
        return _rope(
            c, style, rope_scaling.llama3(frequencies, p.number("factor"), low, high, p.original_context)
        )
    if p.kind == "yarn":
        return _yarn(c, style, p)
    if p.kind == "longrope":
        return _longrope(c, style, p, frequencies)
    raise c.unsupported(None, f"{p.key}.rope_type", printable(repr(p.kind)))


def _yarn(c: Checkpoint, style: Literal["interleaved", "halves"], p: _HuggingFaceParameters) -> Rope:
    original = p.original_context
    factor = p.number("factor", c.trained_context / original)
    if p.get("attention_factor") is not None:
        magnitude = p.number("attention_factor")
    else:
        mscale, all_dim = (p.number(n, 0.0, low=-1e-9) for n in ("mscale", "mscale_all_dim"))
        magnitude = rope_scaling.yarn_magnitude(factor, mscale, all_dim)
    frequencies = rope_scaling.yarn(
        p.dims,
        p.base,
        factor,
        original,
        beta_fast=p.number("beta_fast", 32.0),
        beta_slow=p.number("beta_slow", 1.0),
        truncate=p.get("truncate") is not False,
    )
    return _rope(c, style, frequencies, magnitude)


def _longrope(
    c: Checkpoint,
    style: Literal["interleaved", "halves"],
    p: _HuggingFaceParameters,
    frequencies: rope_scaling.Frequencies,
) -> Rope:
    original = p.original_context
    factor = p.number("factor", c.trained_context / original)
    default = rope_scaling.longrope_magnitude(factor, original)
    long = p.factors("long_factor")
    factors = long if c.context > original else p.factors("short_factor")
    return _rope(c, style, frequencies / factors, p.number("attention_factor", default))
