"""Models with random weights and the statistics of trained ReLU models: a model file that is never on a disk.

Everything is a function of (shape, seed, activity), byte by byte, so that GGUF files and packs of any size are written
from it piece by piece, and are the same wherever they are made. Text of these models is noise.

How the statistics come about:

- The first 32 values of the residual stream are the constant 1, in every token and layer: embedding rows begin with it,
  and the first 32 rows of attention output and down projections are zero. Other weights ignore it (scale 0), but for
  gates, whose first block turns it into a bias for each neuron.
- A gate is therefore normal with variance 1 (random weights times the normalised stream) plus that bias, and active
  with the probability that ``synthetic_activity_law.py`` gives the neuron. Neurons are permuted, differently in each
  layer.
- The normalised constant depends on how much the stream has grown. Blocks add energies that are known: feed-forward
  blocks together ``_FEED_FORWARD_GROWTH`` of the embedding's, attention at most ``_ATTENTION_GROWTH``.
- Embeddings share a part with all tokens of their topic, a range of the vocabulary, and the head prefers the topic of
  the current token: consecutive tokens have similar active neurons, and text wanders from topic to topic.

Measured by ``synthetic_activity.py`` in every layer of bamboo-small, over 512 tokens of such text: 10 % of the gates
are active; 26 to 29 % of the neurons make 80 % of that (30 % over all topics); of a token's active neurons 43 % were
active at the token before it (35 % of unrelated tokens), and 23 % at none of the five before it (LLM in a flash,
Alizadeh et al., 2024, loads 2.4 % of the neurons for a token where 10 % are active: 24 %). That is of gates: of the
neurons of a dReLU block whose gates are active, half have an up projection that is cut off to zero.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from synthetic_activity_law import biases, firing_probabilities, hidden_energy
from synthetic_noise import Noise
from synthetic_shape import Shape
from synthetic_tensors import (
    BLOCK,
    NIBBLE_ENERGY,
    Constant,
    RandomBlocks,
    Tensor,
    TopicRows,
    Uniform,
    constant_block,
    half_bits,
    uniform,
)

from pi2rt.formats.model_file import ModelFile, TensorInfo
from pi2rt.formats.quants import TYPES
from pi2rt.formats.stacked_experts import split_experts

TOPICS = 64
STAY = 0.97
"""Probability that a sampled token (temperature 1) has the topic of the one before it."""
SPECIALS = 259
"""<unk>, <s>, </s> and the bytes come first in the vocabulary, and are never sampled."""

_ALIGNMENT = 32  # of tensors in a GGUF file
_SHARED = 0.3  # of an embedding's variance: its topic's
_FEED_FORWARD_GROWTH = 0.5
_ATTENTION_GROWTH = 0.2
_COHERENCE = (
    0.3  # energy of the mean of the values attended to over that of one: _SHARED in a context of one topic
)
_LOGIT_SPREAD = 1.5  # standard deviation of logits within a topic
_SPECIAL_LOGIT = -30.0


class SyntheticModel(ModelFile):
    """See above. ``path`` names no file.

    Args:
        name: of the shape; the model is called "synthetic NAME".
        shape: dimensions of whole Q4_0 blocks.
        activity: mean share of a layer's gates that are active; without effect on SiLU, whose gates have no bias.
        seed: another one makes another model.
        context: positions it says it was trained for.

    Raises:
        ValueError: a shape or activity that cannot be.
    """

    def __init__(
        self, name: str, shape: Shape, *, activity: float = 0.1, seed: int = 0, context: int = 8192
    ) -> None:
        _check(shape, seed)
        self.path = Path(f"synthetic-{name}")
        self.architecture = "llama"
        self.shape, self.activity, self.seed = shape, activity, seed
        self.metadata: Mapping[str, Any] = _metadata(name, shape, activity, seed, context)
        if shape.activation == "silu":
            self._bias = np.zeros(shape.hidden)
        else:
            self._bias = biases(firing_probabilities(shape.hidden, activity))
        self._hidden_energy = hidden_energy(shape.activation, self._bias)
        self._tensors = self._make_tensors()
        self.stacked: Mapping[str, TensorInfo] = self._place(self._tensors)  # as GGUF files have them
        self.tensors: Mapping[str, TensorInfo] = split_experts(self.stacked)
        self._at = {info.offset: info for info in self.stacked.values()}
        self._offsets = sorted(self._at)

    def read_into(self, tensor: TensorInfo, start: int, buffer: memoryview) -> None:
        if start < 0 or start + buffer.nbytes > tensor.nbytes:
            raise ValueError(
                f"{buffer.nbytes} bytes from byte {start} on are not inside tensor {tensor.name!r} "
                f"({tensor.nbytes} bytes)"
            )
        if buffer.nbytes:
            whole = self._at[self._offsets[bisect_right(self._offsets, tensor.offset) - 1]]
            self._tensors[whole.name].fill(
                tensor.offset - whole.offset + start, np.frombuffer(buffer, np.uint8)
            )

    def close(self) -> None:
        """Nothing is open."""

    def expected_rms(self, layer: int) -> float:
        """What the norm before a feed-forward block divides by, on average: biases are made for it."""
        return self._rms(self._before_feed_forward(layer))

    # -- tensors

    def _make_tensors(self) -> dict[str, Tensor]:
        shape, inner = self.shape, self.shape.dim - BLOCK
        topics = uniform(Noise(self.seed, "topics").bytes(0, TOPICS * inner)).reshape(TOPICS, inner)
        tensors: dict[str, Tensor] = {}
        tensors["token_embd.weight"] = TopicRows(
            Noise(self.seed, "token_embd"),
            (shape.vocab, shape.dim),
            topics,
            _SHARED**0.5,
            (1 - _SHARED) ** 0.5,
            constant_block(1),
            constant_block(1),
            0,
        )
        for layer in range(shape.layers):
            tensors |= self._layer(layer)
        tensors["output_norm.weight"] = Constant(1, shape.dim)
        # Logits are sums over the normalised stream, of which the topic's vector is a known part.
        energy = 1 + shape.layers * self._growth
        rms = self._rms(energy)
        preference = math.log((TOPICS - 1) * STAY / (1 - STAY))
        tensors["output.weight"] = TopicRows(
            Noise(self.seed, "output"),
            (shape.vocab, shape.dim),
            topics,
            preference * rms / (_SHARED**0.5 * inner),
            _LOGIT_SPREAD * rms / (energy * inner) ** 0.5,
            constant_block(0),
            constant_block(_SPECIAL_LOGIT * rms / BLOCK),
            SPECIALS,
        )
        return tensors

    @property
    def _growth(self) -> float:
        """Energy (mean square of all but the constant) that a layer adds to the stream; an embedding has 1."""
        return (_FEED_FORWARD_GROWTH + _COHERENCE * _ATTENTION_GROWTH) / self.shape.layers

    def _before_feed_forward(self, layer: int) -> float:
        return 1 + layer * self._growth + _COHERENCE * _ATTENTION_GROWTH / self.shape.layers

    def _rms(self, energy: float) -> float:
        """What RMSNorm divides the stream by."""
        return math.sqrt((BLOCK + (self.shape.dim - BLOCK) * energy) / self.shape.dim)

    def _layer(self, layer: int) -> dict[str, Tensor]:
        shape, at = self.shape, f"blk.{layer}"
        inner = shape.dim - BLOCK
        before = 1 + layer * self._growth
        between = self._before_feed_forward(layer)

        def reader(name: str, rows: tuple[int, ...], energy: float, **first: Any) -> RandomBlocks:
            """Results have variance 1."""
            scale = self._rms(energy) / (NIBBLE_ENERGY * inner * energy) ** 0.5
            return RandomBlocks(Noise(self.seed, f"{at}.{name}"), (*rows, shape.dim), scale, **first)

        def writer(name: str, rows: tuple[int, ...], columns: int, added: float) -> RandomBlocks:
            """Inputs whose squares add up to ``columns`` have results of energy ``added``."""
            scale = (added / (NIBBLE_ENERGY * columns)) ** 0.5
            noise = Noise(self.seed, f"{at}.{name}")
            return RandomBlocks(noise, (*rows, columns), scale, zero_rows=True)

        experts = (shape.experts,) if shape.experts else ()
        stacked = "_exps" if experts else ""
        # Of experts whose outputs are added with weights p and 1 - p the energy is about half of one's.
        energy = self._hidden_energy * (0.5 if shape.experts_used > 1 else 1)
        tensors: dict[str, Tensor] = {
            f"{at}.attn_norm.weight": Constant(1, shape.dim),
            f"{at}.attn_q.weight": reader("attn_q", (shape.dim,), before, zero_columns=True),
            f"{at}.attn_k.weight": reader("attn_k", (shape.kv_dim,), before, zero_columns=True),
            f"{at}.attn_v.weight": reader("attn_v", (shape.kv_dim,), before, zero_columns=True),
            f"{at}.attn_output.weight": writer(
                "attn_output", (shape.dim,), shape.dim, _ATTENTION_GROWTH / shape.layers
            ),
            f"{at}.ffn_norm.weight": Constant(1, shape.dim),
        }
        if experts:
            tensors[f"{at}.ffn_gate_inp.weight"] = Uniform(
                Noise(self.seed, f"{at}.ffn_gate_inp"),
                (shape.experts, shape.dim),
                self._rms(between) / (inner * between) ** 0.5,
            )
        neurons = (*experts, shape.hidden)
        tensors[f"{at}.ffn_gate{stacked}.weight"] = reader(
            "ffn_gate", neurons, between, first_scales=self._gate_scales(layer, between)
        )
        tensors[f"{at}.ffn_up{stacked}.weight"] = reader("ffn_up", neurons, between, zero_columns=True)
        tensors[f"{at}.ffn_down{stacked}.weight"] = writer(
            "ffn_down",
            (*experts, shape.dim),
            shape.hidden,
            _FEED_FORWARD_GROWTH / shape.layers / energy,
        )
        return tensors

    def _gate_scales(self, layer: int, energy: float) -> npt.NDArray[np.uint16]:
        """Of the block whose values are all -8 times it, and whose inputs are all 1 / rms."""
        orders = [
            _permutation(Noise(self.seed, f"blk.{layer}.order.{expert}"), self.shape.hidden)
            for expert in range(max(1, self.shape.experts))
        ]
        return half_bits(self._bias[np.concatenate(orders)] * self._rms(energy) / (-8 * BLOCK))

    def _place(self, tensors: Mapping[str, Tensor]) -> dict[str, TensorInfo]:
        placed: dict[str, TensorInfo] = {}
        offset = 0
        for name, tensor in tensors.items():
            nbytes = TYPES[tensor.type].nbytes(math.prod(tensor.shape))
            placed[name] = TensorInfo(name, tensor.type, tensor.shape, self.path, offset, nbytes)
            offset += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        return placed


def _permutation(noise: Noise, count: int) -> npt.NDArray[np.int64]:
    keys = noise.bytes(0, 8 * count).view("<u8")
    return np.argsort(keys, kind="stable")


def _check(shape: Shape, seed: int) -> None:
    problem = None
    if shape.dim < 2 * BLOCK or shape.dim % BLOCK or shape.hidden < BLOCK or shape.hidden % BLOCK:
        multiples = f"must be multiples of {BLOCK}, and dim at least {2 * BLOCK}"
        problem = f"dim {shape.dim} and hidden {shape.hidden} {multiples}"
    elif shape.layers < 1 or shape.heads < 1 or shape.dim % shape.heads or shape.dim // shape.heads % 2:
        problem = f"dim {shape.dim} must be an even number for each of {shape.heads} heads"
    elif shape.kv_heads < 1 or shape.heads % shape.kv_heads:
        problem = f"{shape.heads} heads cannot share {shape.kv_heads} key-value heads evenly"
    elif shape.vocab <= SPECIALS:
        problem = (
            f"a vocabulary of {shape.vocab} has no room for more than the {SPECIALS} bytes and special tokens"
        )
    elif not 0 <= shape.experts_used <= shape.experts or (shape.experts and not shape.experts_used):
        problem = f"{shape.experts_used} of {shape.experts} experts cannot be used"
    elif not 0 <= seed < 1 << 32:
        problem = f"seed {seed} is not between 0 and {(1 << 32) - 1}"
    if problem:
        raise ValueError(problem)


def _metadata(name: str, shape: Shape, activity: float, seed: int, context: int) -> dict[str, Any]:
    """As a reader of GGUF files gives it: integers are u32, floats have the precision of float32."""

    def single(value: float) -> float:
        return float(np.float32(value))

    metadata: dict[str, Any] = {
        "general.architecture": "llama",
        "general.name": f"synthetic {name}",
        "general.description": "random weights with the activity of a trained model; its text is noise",
        "synthetic.seed": seed,
        "llama.context_length": context,
        "llama.embedding_length": shape.dim,
        "llama.block_count": shape.layers,
        "llama.feed_forward_length": shape.hidden,
        "llama.attention.head_count": shape.heads,
        "llama.attention.head_count_kv": shape.kv_heads,
        "llama.attention.layer_norm_rms_epsilon": single(1e-5),
        "llama.rope.freq_base": 10000.0,
        "llama.rope.dimension_count": shape.dim // shape.heads,
        "llama.vocab_size": shape.vocab,
    }
    if shape.activation != "silu":
        metadata["synthetic.activity"] = single(activity)
        metadata["llama.hidden_activation"] = (
            shape.activation
        )  # llama.cpp runs SiLU: other results, the same work
    if shape.experts:
        metadata["llama.expert_count"] = shape.experts
        metadata["llama.expert_used_count"] = shape.experts_used
    words = shape.vocab - SPECIALS
    metadata |= {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [
            *("<unk>", "<s>", "</s>"),
            *(f"<0x{i:02X}>" for i in range(256)),
            *(f"t{i}" for i in range(words)),
        ],
        "tokenizer.ggml.scores": np.concatenate([np.zeros(SPECIALS), -np.arange(words)]).astype(np.float32),
        "tokenizer.ggml.token_type": np.array([2, 3, 3] + [6] * 256 + [1] * words, np.int32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    return metadata
