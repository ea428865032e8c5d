"""Models in llama.cpp's Q4_K_M mixture with random weights and no structure.

Quants are random bytes and scales are set so that values have the spread of a trained model's; half of the value and
down projections are Q6_K. The whole model is held in memory.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
from synthetic_shape import Shape

_BLOCK_BYTES = {"Q4_K": 144, "Q6_K": 210}


def random_blocks(kind: str, rows: int, columns: int, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Rows of random K blocks, uint8 (rows, row bytes): values symmetric about zero with a spread near 0.02."""
    blocks = rows * columns // 256
    raw = rng.integers(0, 256, (blocks, _BLOCK_BYTES[kind]), np.uint8)
    if kind == "Q4_K":
        scale = np.float16(
            0.02 / 4.6 / 32
        )  # sub-block scales of 0..63 average 32, quants of 0..15 deviate by 4.6
        raw[:, 0:2] = np.frombuffer(scale.tobytes(), np.uint8)
        raw[:, 2:4] = np.frombuffer(np.float16(scale * 7.5).tobytes(), np.uint8)
        raw[:, 4:8] &= (
            0x3F  # the first four mins equal the first four scales, and so do the low bits of the others:
        )
        raw[:, 8:12] = raw[:, 4:8]
        raw[:, 12:16] = (raw[:, 12:16] & 0x0F) * 0x11
    else:
        raw[:, 192:208] = rng.integers(16, 48, (blocks, 16), np.uint8)
        raw[:, 208:210] = np.frombuffer(np.float16(0.02 / 18.5 / 32).tobytes(), np.uint8)
    return raw.reshape(rows, -1)


def write_model(path: Path, shape: Shape, name: str) -> None:
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(f"synthetic {name}")
    writer.add_context_length(8192)
    writer.add_embedding_length(shape.dim)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.hidden)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(shape.dim // shape.heads)
    writer.add_vocab_size(shape.vocab)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(
        ["<unk>", "<s>", "</s>"]
        + [f"<0x{i:02X}>" for i in range(256)]
        + [f"t{i}" for i in range(shape.vocab - 259)]
    )
    writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(shape.vocab - 259)])
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * (shape.vocab - 259))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    def matrix(tensor: str, kind: str, rows: int, columns: int) -> None:
        writer.add_tensor(
            tensor + ".weight",
            random_blocks(kind, rows, columns, rng),
            raw_dtype=getattr(gguf.GGMLQuantizationType, kind),
        )

    kv = shape.kv_heads * shape.dim // shape.heads
    matrix("token_embd", "Q4_K", shape.vocab, shape.dim)
    for i in range(shape.layers):
        more = (
            "Q6_K"
            if i < shape.layers // 8 or i >= 7 * shape.layers // 8 or (i - shape.layers // 8) % 3 == 2
            else "Q4_K"
        )
        for norm in "attn_norm", "ffn_norm":
            writer.add_tensor(f"blk.{i}.{norm}.weight", np.ones(shape.dim, np.float32))
        matrix(f"blk.{i}.attn_q", "Q4_K", shape.dim, shape.dim)
        matrix(f"blk.{i}.attn_k", "Q4_K", kv, shape.dim)
        matrix(f"blk.{i}.attn_v", more, kv, shape.dim)
        matrix(f"blk.{i}.attn_output", "Q4_K", shape.dim, shape.dim)
        matrix(f"blk.{i}.ffn_gate", "Q4_K", shape.hidden, shape.dim)
        matrix(f"blk.{i}.ffn_up", "Q4_K", shape.hidden, shape.dim)
        matrix(f"blk.{i}.ffn_down", more, shape.dim, shape.hidden)
    writer.add_tensor("output_norm.weight", np.ones(shape.dim, np.float32))
    matrix("output", "Q6_K", shape.vocab, shape.dim)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
