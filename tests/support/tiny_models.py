"""Tiny models as GGUF files, beside the Hugging Face directories of ``pi2rt.testing.tiny_model``.

Both containers of one ``TinyModel`` hold the same model: the GGUF writer converts the Hugging Face weights as
llama.cpp's converter does (q and k permuted for Llama, norms plus one for Gemma).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from pi2rt.formats.quants import quantize
from pi2rt.testing.tiny_model import (
    BOS,
    EOS,
    MERGES,
    SPECIAL,
    VOCAB_SIZE,
    Floats,
    TinyModel,
    tokens,
    write_huggingface,
    write_safetensors,
)

__all__ = [
    "BOS",
    "EOS",
    "VOCAB_SIZE",
    "Floats",
    "TinyModel",
    "interleave",
    "write_gguf",
    "write_huggingface",
    "write_safetensors",
]

_GGUF_ARCHITECTURES = {
    "gemma3_text": "gemma3",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
}


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
        "tokenizer.ggml.tokens": tokens(),
        "tokenizer.ggml.token_type": [3 if i in SPECIAL else 1 for i in range(VOCAB_SIZE)],
        "tokenizer.ggml.merges": MERGES,
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
