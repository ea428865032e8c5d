"""Tiny models with random weights, as Hugging Face directories and as GGUF files.

Both containers of one ``TinyModel`` hold the same model: the GGUF writer converts the Hugging Face weights as
llama.cpp's converter does (q and k permuted for Llama, norms plus one for Gemma). The vocabulary is a
byte-level BPE of 320 tokens that can encode any text.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from pi2rt.formats.quants import quantize

Floats = npt.NDArray[np.float32]

VOCAB_SIZE = 320
BOS, EOS = 318, 319
_SPECIAL = {BOS: "<|bos|>", EOS: "<|eos|>"}
_MERGE_TABLE = """
    Ġ+t Ġ+a h+e i+n r+e o+n Ġt+he e+r Ġ+s a+t Ġ+w Ġ+o e+n Ġ+c i+t i+s a+n o+r e+s Ġ+b e+d Ġ+f in+g Ġ+p o+u
    Ġa+n a+l a+r Ġt+o Ġ+m Ġo+f Ġ+in Ġ+d Ġ+h Ġan+d i+c a+s l+e Ġt+h i+on o+m l+l en+t Ġ+n Ġ+l s+t Ġ+re v+e Ġ+e
    r+o l+y Ġb+e Ġ+g Ġs+t c+t Ġ+y i+d o+t Ġs+e e+t Ġ+on
"""
_MERGES = [pair.replace("+", " ") for pair in re.findall(r"\S+", _MERGE_TABLE)]
_CONFIG_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}


@dataclass(frozen=True)
class TinyModel:
    """One model. ``family``: a model_type of Hugging Face. ``config``: what differs from a plain config.json
    of that family. ``gated``: whether the feed-forward block has a gate (Transformers' always has)."""

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
        return config | dict(self.config)

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

        matrix("model.embed_tokens", VOCAB_SIZE, self.dim)
        attention_bias = bool(config.get("attention_bias"))
        qkv_bias = attention_bias or self.family == "qwen2"
        mlp_bias = bool(config.get("mlp_bias"))
        for i in range(self.layers):
            at = f"model.layers.{i}"
            norm(f"{at}.input_layernorm", self.dim)
            matrix(f"{at}.self_attn.q_proj", self.heads * self.head_dim, self.dim, qkv_bias)
            matrix(f"{at}.self_attn.k_proj", self.kv_heads * self.head_dim, self.dim, qkv_bias)
            matrix(f"{at}.self_attn.v_proj", self.kv_heads * self.head_dim, self.dim, qkv_bias)
            matrix(f"{at}.self_attn.o_proj", self.dim, self.heads * self.head_dim, attention_bias)
            if self.family in ("qwen3", "gemma3_text"):
                norm(f"{at}.self_attn.q_norm", self.head_dim)
                norm(f"{at}.self_attn.k_norm", self.head_dim)
            norm(f"{at}.post_attention_layernorm", self.dim)
            if gemma:
                norm(f"{at}.pre_feedforward_layernorm", self.dim)
                norm(f"{at}.post_feedforward_layernorm", self.dim)
            if self.gated:
                matrix(f"{at}.mlp.gate_proj", self.hidden, self.dim, mlp_bias)
            matrix(f"{at}.mlp.up_proj", self.hidden, self.dim, mlp_bias)
            matrix(f"{at}.mlp.down_proj", self.dim, self.hidden, mlp_bias)
        norm("model.norm", self.dim)
        if not config["tie_word_embeddings"]:
            matrix("lm_head", VOCAB_SIZE, self.dim)
        return weights


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


def write_safetensors(path: Path, tensors: Mapping[str, Floats], dtype: str = "F32") -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, values in tensors.items():
        raw = quantize(dtype, values).tobytes()
        header[name] = {
            "dtype": dtype,
            "shape": list(values.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def tokenizer() -> Tokenizer:
    """A byte-level BPE: 256 bytes, 61 merges, and two special tokens."""
    vocabulary = {token: i for i, token in enumerate(_tokens()) if i not in _SPECIAL}
    merges = [tuple(merge.split(" ")) for merge in _MERGES]
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True) for token in _SPECIAL.values()])
    return made


def _tokens() -> list[str]:
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet()) + [merge.replace(" ", "") for merge in _MERGES]
    tokens += [f"<unused{i}>" for i in range(BOS - len(tokens))]
    return tokens + list(_SPECIAL.values())


# -- GGUF files


def write_gguf(
    path: Path,
    model: TinyModel,
    *,
    weight_type: str = "F32",
    types: Mapping[str, str] | None = None,
    metadata: Mapping[str, Any] | None = None,
    extra: Mapping[str, Floats] | None = None,
) -> Path:
    """Writes the model as llama.cpp's converter would.

    Args:
        path: the file to write.
        model: the model.
        weight_type: type of all matrices; rows must be whole blocks of it.
        types: other types for the roles (``{"token_embd": "Q8_0"}``) or tensors (``{"blk.0.attn_q": "Q4_K"}``) named
            here, each of which must be there.
        metadata: more keys, or other values; None leaves a key out.
        extra: more float32 tensors, by their GGUF names.
    """
    config = model.huggingface_config()
    architecture = {"gemma3_text": "gemma3", "mistral": "llama"}.get(model.family, model.family)
    keys: dict[str, Any] = {
        "general.name": f"tiny {model.family}",
        f"{architecture}.block_count": model.layers,
        f"{architecture}.context_length": model.context,
        f"{architecture}.embedding_length": model.dim,
        f"{architecture}.feed_forward_length": model.hidden,
        f"{architecture}.attention.head_count": model.heads,
        f"{architecture}.attention.head_count_kv": model.kv_heads,
        f"{architecture}.attention.key_length": model.head_dim,
        f"{architecture}.attention.value_length": model.head_dim,
        f"{architecture}.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        f"{architecture}.rope.freq_base": float(config["rope_theta"]),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": _tokens(),
        "tokenizer.ggml.token_type": [3 if i in _SPECIAL else 1 for i in range(VOCAB_SIZE)],
        "tokenizer.ggml.merges": _MERGES,
        "tokenizer.ggml.bos_token_id": BOS,
        "tokenizer.ggml.eos_token_id": EOS,
        "tokenizer.ggml.add_bos_token": True,
    }
    if config.get("sliding_window"):
        keys[f"{architecture}.attention.sliding_window"] = config["sliding_window"]
    if architecture == "gemma3":
        keys[f"{architecture}.rope.freq_base_swa"] = float(config["rope_local_base_freq"])
        keys[f"{architecture}.attention.scale"] = config["query_pre_attn_scalar"] ** -0.5
    if config.get("hidden_act", "silu") != "silu":
        keys[f"{architecture}.hidden_activation"] = config["hidden_act"]
    keys |= dict(metadata or {})

    writer = gguf.GGUFWriter(path, architecture)
    for key, value in keys.items():
        _add_key(writer, key, value)
    unused = dict(types or {})
    for name, values in {**_gguf_weights(model, architecture), **(extra or {})}.items():
        stem = name.removesuffix(".weight")
        key = stem if types and stem in types else name.split(".")[-2]
        kind = (types or {}).get(key, weight_type) if values.ndim == 2 else "F32"
        unused.pop(key, None)
        if kind == "F32":
            writer.add_tensor(name, values)
        else:
            raw = quantize(kind, values).reshape(len(values), -1)
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType[kind])
    if unused:
        raise ValueError(f"no tensors {', '.join(unused)}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_key(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    elif value is not None:
        raise TypeError(f"{key}: {value!r}")


def _gguf_weights(model: TinyModel, architecture: str) -> dict[str, Floats]:
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    if architecture == "gemma3":
        names["post_attention_layernorm"] = "post_attention_norm"
        names["pre_feedforward_layernorm"] = "ffn_norm"
        names["post_feedforward_layernorm"] = "post_ffw_norm"
    heads = {"attn_q": model.heads, "attn_k": model.kv_heads}
    out = {}
    for name, values in model.weights().items():
        stem, kind = name.rsplit(".", 1)
        layer = ""
        if stem.startswith("model.layers."):
            _, _, number, stem = stem.split(".", 3)
            layer = f"blk.{number}."
        role = names[stem]
        if architecture == "llama" and role in heads:
            values = interleave(values, heads[role])
        if architecture == "gemma3" and role.endswith("norm"):
            values = values + np.float32(1)
        out[f"{layer}{role}.{kind}"] = values
    return out


def interleave(values: Floats, heads: int) -> Floats:
    """Reorders the rows of each head from halves (i, i + d/2) to pairs (2i, 2i + 1)."""
    parts = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return np.ascontiguousarray(parts.swapaxes(1, 2).reshape(values.shape))
