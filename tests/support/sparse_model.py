"""A large model that takes no room on the disk, and a way to break a file."""

from __future__ import annotations

import os
from pathlib import Path

import gguf
import numpy as np

from tests.support.tiny_models import TinyModel, write_gguf


def sparse_model(path: Path, nbytes: int) -> Path:
    """A model of about ``nbytes`` bytes, nearly all of them in holes of the file: embedding and head of a tiny
    model with a wide vocabulary."""
    model = TinyModel(layers=1)
    write_gguf(path, model)
    reader = gguf.GGUFReader(path)
    rows = nbytes // 2 // (2 * model.dim) // 16 * 16
    writer = gguf.GGUFWriter(path.with_suffix(".new"), "llama")
    for field in reader.fields.values():
        if field.name.startswith(("llama.", "tokenizer.")) and "vocab_size" not in field.name:
            kind = field.types[0]
            sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kind, sub)
    wide = ("token_embd.weight", "output.weight")
    for tensor in reader.tensors:
        if tensor.name not in wide:
            writer.add_tensor(tensor.name, np.array(tensor.data))
    for name in wide:
        writer.add_tensor_info(
            name, (rows, model.dim), np.dtype(np.float16), rows * model.dim * 2, gguf.GGMLQuantizationType.F16
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    (file,) = writer.fout
    written = [np.array(tensor.data) for tensor in reader.tensors if tensor.name not in wide]
    for values in written:
        writer.write_padding(file, file.tell())
        file.write(values.tobytes())
    writer.write_padding(file, file.tell())
    end = file.tell() + len(wide) * rows * model.dim * 2
    writer.close()
    os.truncate(path.with_suffix(".new"), end)
    os.replace(path.with_suffix(".new"), path)
    return path


def poke(path: Path, at: int, data: bytes) -> None:
    """Overwrites a part of a file."""
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)
