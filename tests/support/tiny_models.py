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
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
_GGUF_ARCHITECTURES = {
    "gemma3_text": "gemma3",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
}


@dataclass(frozen=True)
class TinyModel:
    """One model. ``family``: a model_type of Hugging Face. ``config``: what differs from a plain config.json
    of that family. ``gated``: whether the feed-forward block has a gate (Transformers' always has). ``experts``,
    ``experts_used``, ``expert_hidden`` and ``shared_hidden``: of the families that have mixtures of experts; experts of
    Mixtral have ``hidden`` neurons."""

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
    stacked: bool = True,
    part_tensors: int = 0,
) -> Path:
    """Writes the model as llama.cpp's converter would; returns the file, or the first one of several.

    Args:
        path: the file to write.
        model: the model.
        weight_type: type of all matrices; rows must be whole blocks of it.
        types: other types for the roles (``{"token_embd": "Q8_0"}``) or tensors (``{"blk.0.attn_q": "Q4_K"}``) named
            here, each of which must be there.
        metadata: more keys, or other values; None leaves a key out.
        extra: more float32 tensors, by their GGUF names, or these instead of the model's.
        stacked: whether the matrices of all experts are one tensor, which they were not in the first files.
        part_tensors: tensors in one file at most; 0 writes all into one.
    """
    config = model.huggingface_config()
    architecture = _GGUF_ARCHITECTURES.get(model.family, model.family)
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
    if model.has_experts:
        keys[f"{architecture}.expert_count"] = model.experts
        keys[f"{architecture}.expert_used_count"] = model.experts_used
    if architecture in ("qwen2moe", "qwen3moe"):
        keys[f"{architecture}.expert_feed_forward_length"] = model.expert_hidden
        if config["norm_topk_prob"] != (
            architecture == "qwen3moe"
        ):  # not what these files mean without saying
            keys[f"{architecture}.expert_weights_norm"] = config["norm_topk_prob"]
    if architecture == "qwen2moe":
        keys[f"{architecture}.expert_shared_feed_forward_length"] = model.shared_hidden
    if config.get("hidden_act", "silu") != "silu":
        keys[f"{architecture}.hidden_activation"] = config["hidden_act"]
    keys |= dict(metadata or {})

    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=part_tensors)
    for key, value in keys.items():
        _add_key(writer, key, value)
    unused = dict(types or {})
    for name, values in {**_gguf_weights(model, architecture, stacked), **(extra or {})}.items():
        stem = name.removesuffix(".weight")
        key = stem if types and stem in types else name.split(".")[2 if name.startswith("blk.") else -2]
        matrix = values.ndim > 1 and not key.startswith("ffn_gate_inp")
        kind = (types or {}).get(key, weight_type) if matrix else "F32"
        unused.pop(key, None)
        if kind == "F32":
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, quantize(kind, values), raw_dtype=gguf.GGMLQuantizationType[kind])
    if unused:
        raise ValueError(f"no tensors {', '.join(unused)}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if not part_tensors else min(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))


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


def _gguf_weights(model: TinyModel, architecture: str, stacked: bool) -> dict[str, Floats]:
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
        "block_sparse_moe.gate": "ffn_gate_inp",
        "mlp.gate": "ffn_gate_inp",
        "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
        "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
        "mlp.shared_expert.up_proj": "ffn_up_shexp",
        "mlp.shared_expert.down_proj": "ffn_down_shexp",
    }
    of_experts = {"w1": "ffn_gate", "w3": "ffn_up", "w2": "ffn_down"}
    of_experts |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    stacks: dict[str, list[Floats]] = {}
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
        if ".experts." in stem:
            _, expert, matrix = stem.rsplit(".", 2)
            if stacked:
                stacks.setdefault(f"{layer}{of_experts[matrix]}_exps.{kind}", []).append(values)
            else:
                out[f"{layer}{of_experts[matrix]}.{expert}.{kind}"] = values
            continue
        role = names[stem]
        if role == "ffn_gate_inp_shexp":
            values = values[0]
        if architecture == "llama" and role in heads:
            values = interleave(values, heads[role])
        if architecture == "gemma3" and role.endswith("norm"):
            values = values + np.float32(1)
        out[f"{layer}{role}.{kind}"] = values
    return out | {name: np.stack(values) for name, values in stacks.items()}


def interleave(values: Floats, heads: int) -> Floats:
    """Reorders the rows of each head from halves (i, i + d/2) to pairs (2i, 2i + 1)."""
    parts = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return np.ascontiguousarray(parts.swapaxes(1, 2).reshape(values.shape))
