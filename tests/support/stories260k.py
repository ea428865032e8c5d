"""The trained 260 000 parameter model of ``shared/data`` as a GGUF file.

Its file format is llama2.c's (Karpathy, 2023): seven int32, then float32 tensors grouped over the layers.
Rotation is by pairs (2i, 2i + 1) there too, so q and k go in as they are. The tokenizer file holds the
longest token, then (score, length, bytes) of each one: SentencePiece's, with a space for its ``▁``.
"""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

DATA = Path(__file__).parents[2].parent / "shared" / "data"
GOLDEN_TEXT = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball. She wanted to play with it, but it was too high"
)
"""Greedy from the beginning-of-sequence token (from the README beside the data)."""

BOS, EOS = 1, 2
_UNKNOWN, _CONTROL, _NORMAL, _BYTE = 2, 3, 1, 6  # token types


def write_stories260k(path: Path) -> Path:
    """Writes the GGUF file (float32, 1.1 MB); skips the test where the data is absent."""
    model_file, token_file = DATA / "stories260K.bin", DATA / "tok512.bin"
    for file in (model_file, token_file):
        if not file.is_file():
            pytest.skip(f"{file.name} is not there (looked in ../shared/data)")
    data = model_file.read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, context = struct.unpack_from("<7i", data)
    values = np.frombuffer(data, "<f4", offset=28)
    kv_dim = dim // heads * kv_heads
    layout = {  # role: shape of one layer
        "attn_norm": (dim,),
        "attn_q": (dim, dim),
        "attn_k": (kv_dim, dim),
        "attn_v": (kv_dim, dim),
        "attn_output": (dim, dim),
        "ffn_norm": (dim,),
        "ffn_gate": (hidden, dim),
        "ffn_down": (dim, hidden),
        "ffn_up": (hidden, dim),
    }

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("stories260K")
    writer.add_block_count(layers)
    writer.add_context_length(context)
    writer.add_embedding_length(dim)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    _add_tokenizer(writer, token_file.read_bytes(), vocab)

    at = 0

    def take(*shape: int) -> np.ndarray:
        nonlocal at
        at += (count := int(np.prod(shape)))
        return values[at - count : at].reshape(shape)

    writer.add_tensor("token_embd.weight", take(vocab, dim))
    for role, shape in layout.items():
        for i, tensor in enumerate(take(layers, *shape)):
            writer.add_tensor(f"blk.{i}.{role}.weight", tensor)
    writer.add_tensor("output_norm.weight", take(dim))
    at += context * (dim // heads)  # two rotation tables that nothing uses
    assert at == len(values), f"{len(values) - at} values left over"
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: gguf.GGUFWriter, data: bytes, vocab: int) -> None:
    tokens, scores, types = [], [], []
    at = 4
    for i in range(vocab):
        score, length = struct.unpack_from("<fi", data, at)
        text = data[at + 8 : at + 8 + length].decode()
        at += 8 + length
        if i < 3:
            text = ("<unk>", "<s>", "</s>")[i]
            types.append(_UNKNOWN if i == 0 else _CONTROL)
        elif i < 3 + 256:
            types.append(_BYTE)
        else:
            text = text.replace(" ", "▁")
            types.append(_NORMAL)
        tokens.append(text)
        scores.append(score)
    assert at == len(data)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
