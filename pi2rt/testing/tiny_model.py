"""Tiny models with random weights as Hugging Face directories: the same for the same seed, on every machine.

The vocabulary is a byte-level BPE of 320 tokens that can encode any text.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from pi2rt.formats.quants import quantize

Floats = npt.NDArray[np.float32]

VOCAB_SIZE = 320
BOS, EOS = 318, 319
SPECIAL = {BOS: "<|bos|>", EOS: "<|eos|>"}
_MERGE_TABLE = """
    Ġ+t Ġ+a h+e i+n r+e o+n Ġt+he e+r Ġ+s a+t Ġ+w Ġ+o e+n Ġ+c i+t i+s a+n o+r e+s Ġ+b e+d Ġ+f in+g Ġ+p o+u
    Ġa+n a+l a+r Ġt+o Ġ+m Ġo+f Ġ+in Ġ+d Ġ+h Ġan+d i+c a+s l+e Ġt+h i+on o+m l+l en+t Ġ+n Ġ+l s+t Ġ+re v+e Ġ+e
    r+o l+y Ġb+e Ġ+g Ġs+t c+t Ġ+y i+d o+t Ġs+e e+t Ġ+on
"""
MERGES = [pair.replace("+", " ") for pair in re.findall(r"\S+", _MERGE_TABLE)]
_LOUD = 8.0  # an odd token's RMS in the residual stream, over an even one's
_PEAKED = 5.0  # standard deviation of logits after an even token, about
UNUSABLE_TOKEN = 317
"""Of models with ``unusable``: it spells nothing, so no text has it."""
_NEARLY_INFINITE = 3e38  # times the root of dim it is no float32
_CONFIG_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}


@dataclass(frozen=True)
class TinyModel:
    """One model. ``family``: a model_type of Hugging Face. ``config``: what differs from a plain config.json
    of that family. ``gated``: whether the feed-forward block has a gate (Transformers' always has). ``experts``,
    ``experts_used``, ``expert_hidden`` and ``shared_hidden``: of the families that have mixtures of experts; experts of
    Mixtral have ``hidden`` neurons. ``contrast``: whether the distribution of the next token is peaked after a token of
    an even id and flat after one of an odd id; without, it is flat after all of them. ``unusable``: whether logits are
    NaN and infinite at ``UNUSABLE_TOKEN`` and at what sees it, though all weights are finite."""

    family: str = "llama"
    seed: int = 0
    dim: int = 64
    hidden: int = 96
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    context: int = 256
    gated: bool = True
    experts: int = 4
    experts_used: int = 2
    expert_hidden: int = 32
    shared_hidden: int = 64
    contrast: bool = False
    unusable: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)

    def huggingface_config(self) -> dict[str, Any]:
        config: dict[str, Any] = {
            "model_type": self.family,
            "architectures": [_CONFIG_CLASSES.get(self.family, "LlamaForCausalLM")],
            "vocab_size": VOCAB_SIZE,
            "hidden_size": self.dim,
            "intermediate_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.context,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": self.family == "gemma3_text",
            "bos_token_id": BOS,
            "eos_token_id": EOS,
        }
        if self.family == "mistral":
            config["sliding_window"] = None
        if self.family == "gemma3_text":
            config |= {"query_pre_attn_scalar": 24, "sliding_window": 8, "rope_local_base_freq": 1000.0}
            config |= {"hidden_activation": "gelu_pytorch_tanh", "pad_token_id": 0}
        else:
            config["hidden_act"] = "silu"
        if self.has_experts:
            config["num_experts_per_tok"] = self.experts_used
            config["num_local_experts" if self.family == "mixtral" else "num_experts"] = self.experts
        if self.family in ("qwen2_moe", "qwen3_moe"):
            config["moe_intermediate_size"] = self.expert_hidden
            config["norm_topk_prob"] = self.family == "qwen3_moe"
        if self.family == "qwen2_moe":
            config["shared_expert_intermediate_size"] = self.shared_hidden
        return config | dict(self.config)

    @property
    def has_experts(self) -> bool:
        return self.family in ("mixtral", "qwen2_moe", "qwen3_moe")

    def is_mixed(self, layer: int) -> bool:
        """Whether the layer has experts."""
        config = self.huggingface_config()
        plain = layer in config.get("mlp_only_layers", []) or (layer + 1) % config.get(
            "decoder_sparse_step", 1
        )
        return self.has_experts and not plain

    def weights(self) -> dict[str, Floats]:
        """By the names of a Hugging Face checkpoint; the same for the same seed, on every machine."""
        random = np.random.RandomState(self.seed)  # its stream is frozen, unlike that of a Generator
        config = self.huggingface_config()
        gemma = self.family == "gemma3_text"
        weights: dict[str, Floats] = {}

        def matrix(name: str, rows: int, columns: int, bias: bool = False) -> None:
            scale = 1 / math.sqrt(columns)
            weights[f"{name}.weight"] = (random.standard_normal((rows, columns)) * scale).astype(np.float32)
            if bias:
                weights[f"{name}.bias"] = (random.standard_normal(rows) * 0.3).astype(np.float32)

        def norm(name: str, size: int) -> None:
            around = 0.0 if gemma else 1.0
            weights[f"{name}.weight"] = (around + 0.2 * random.standard_normal(size)).astype(np.float32)

        def mixture(at: str) -> None:
            mixtral = self.family == "mixtral"
            block = f"{at}.block_sparse_moe" if mixtral else f"{at}.mlp"
            gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
            hidden = self.hidden if mixtral else self.expert_hidden
            matrix(f"{block}.gate", self.experts, self.dim)
            for expert in range(self.experts):
                matrix(f"{block}.experts.{expert}.{gate}", hidden, self.dim)
                matrix(f"{block}.experts.{expert}.{up}", hidden, self.dim)
                matrix(f"{block}.experts.{expert}.{down}", self.dim, hidden)
            if self.family == "qwen2_moe":
                matrix(f"{block}.shared_expert_gate", 1, self.dim)
                matrix(f"{block}.shared_expert.gate_proj", self.shared_hidden, self.dim)
                matrix(f"{block}.shared_expert.up_proj", self.shared_hidden, self.dim)
                matrix(f"{block}.shared_expert.down_proj", self.dim, self.shared_hidden)

        matrix("model.embed_tokens", VOCAB_SIZE, self.dim)
        attention_bias = bool(config.get("attention_bias"))
        qkv_bias = attention_bias or self.family in ("qwen2", "qwen2_moe")
        mlp_bias = bool(config.get("mlp_bias"))
        for i in range(self.layers):
            at = f"model.layers.{i}"
            norm(f"{at}.input_layernorm", self.dim)
            matrix(f"{at}.self_attn.q_proj", self.heads * self.head_dim, self.dim, qkv_bias)
            matrix(f"{at}.self_attn.k_proj", self.kv_heads * self.head_dim, self.dim, qkv_bias)
            matrix(f"{at}.self_attn.v_proj", self.kv_heads * self.head_dim, self.dim, qkv_bias)
            matrix(f"{at}.self_attn.o_proj", self.dim, self.heads * self.head_dim, attention_bias)
            if self.family in ("qwen3", "qwen3_moe", "gemma3_text"):
                norm(f"{at}.self_attn.q_norm", self.head_dim)
                norm(f"{at}.self_attn.k_norm", self.head_dim)
            norm(f"{at}.post_attention_layernorm", self.dim)
            if gemma:
                norm(f"{at}.pre_feedforward_layernorm", self.dim)
                norm(f"{at}.post_feedforward_layernorm", self.dim)
            if self.is_mixed(i):
                mixture(at)
                continue
            if self.gated:
                matrix(f"{at}.mlp.gate_proj", self.hidden, self.dim, mlp_bias)
            matrix(f"{at}.mlp.up_proj", self.hidden, self.dim, mlp_bias)
            matrix(f"{at}.mlp.down_proj", self.dim, self.hidden, mlp_bias)
        norm("model.norm", self.dim)
        if not config["tie_word_embeddings"]:
            matrix("lm_head", VOCAB_SIZE, self.dim)
        if self.contrast:
            self._add_contrast(weights)
        if self.unusable:
            self._add_unusable(weights)
        return weights

    def _add_contrast(self, weights: dict[str, Floats]) -> None:
        """RMS norms divide by what the first element of an odd token's embedding adds to the residual stream. No norm
        lets that element through, so it has no other effect."""
        gemma = self.family == "gemma3_text"
        embedding = weights["model.embed_tokens.weight"]
        if not gemma:  # it multiplies by the root of dim itself
            embedding *= np.float32(math.sqrt(self.dim))
        rms = math.sqrt(float(np.mean(np.square(embedding))))
        embedding[1::2, 0] = _LOUD * math.sqrt(self.dim) * rms
        for name, values in weights.items():
            if len(values) == self.dim and name.endswith("norm.weight"):
                values[0] = -1.0 if gemma else 0.0
        final = weights["model.norm.weight"]
        final[:] = (final + 1) * _PEAKED - 1 if gemma else final * _PEAKED

    def _add_unusable(self, weights: dict[str, Floats]) -> None:
        """The second channel of the residual stream is exactly zero, but at ``UNUSABLE_TOKEN``, whose embedding has
        nothing else, and where attention carries it: through the first element of the first head. The final norm makes
        it infinite, and the head makes plus infinity, minus infinity and NaN (zero times infinity) of that."""
        channel, one = 1, 0.0 if self.family == "gemma3_text" else 1.0
        for name, values in weights.items():
            kind = name.split(".")[-2]
            if kind in ("o_proj", "down_proj", "w2"):  # write to the stream
                values[channel] = 0.0
            elif values.ndim == 2:  # all others read it
                values[:, channel] = 0.0
            elif len(values) == self.dim and name.endswith("norm.weight"):
                values[channel] = one
            if kind == "v_proj":
                values[0] = 0.0
        for i in range(self.layers):
            attention = f"model.layers.{i}.self_attn"
            weights[f"{attention}.v_proj.weight"][0, channel] = 1.0
            weights[f"{attention}.o_proj.weight"][channel, 0] = 1000.0
        embedding = weights["model.embed_tokens.weight"]
        embedding[UNUSABLE_TOKEN] = 0.0
        embedding[UNUSABLE_TOKEN, channel] = 100.0
        weights["model.norm.weight"][channel] = _NEARLY_INFINITE
        if "lm_head.weight" in weights:
            head = weights["lm_head.weight"]
            head[UNUSABLE_TOKEN] = 0.0  # seldom sampled
            head[0::3, channel], head[1::3, channel] = 100.0, -100.0


# -- Hugging Face directories


def write_huggingface(directory: Path, model: TinyModel, *, dtype: str = "F32") -> Path:
    """Writes config.json, model.safetensors, tokenizer.json and tokenizer_config.json. ``dtype``: of all
    tensors, F32, F16 or BF16."""
    directory.mkdir(parents=True, exist_ok=True)
    config = model.huggingface_config()
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    write_safetensors(directory / "model.safetensors", model.weights(), dtype)
    tokenizer().save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|bos|>", "eos_token": "<|eos|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def write_safetensors(path: Path, tensors: Mapping[str, npt.NDArray[Any]], dtype: str = "F32") -> None:
    """Floats are written as ``dtype``, int64 as I64."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, values in tensors.items():
        integers = values.dtype == np.int64
        raw = values.tobytes() if integers else quantize(dtype, values).tobytes()
        header[name] = {
            "dtype": "I64" if integers else dtype,
            "shape": list(values.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def tokenizer() -> Tokenizer:
    """A byte-level BPE: 256 bytes, 61 merges, and two special tokens."""
    vocabulary = {token: i for i, token in enumerate(tokens()) if i not in SPECIAL}
    merges = [tuple(merge.split(" ")) for merge in MERGES]
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL.values()])
    return made


def tokens() -> list[str]:
    """The vocabulary, by id."""
    names = sorted(pre_tokenizers.ByteLevel.alphabet()) + [merge.replace(" ", "") for merge in MERGES]
    names += [f"<unused{i}>" for i in range(BOS - len(names))]
    return names + list(SPECIAL.values())
