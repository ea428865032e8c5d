"""Writes a synthetic model as a GGUF file, whatever its size: nothing larger than a piece is held."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from synthetic_model import SyntheticModel

from pi2rt.formats.regular_file import drop_cache

_PIECE_BYTES = 18 << 18  # whole blocks
_FLUSH_BYTES = 256 << 20  # written between two flushes; what the page cache holds of the file at most


def write_gguf(model: SyntheticModel, path: Path) -> None:
    """Writes ``model``, whose metadata has the keys and types of a GGUF file, to ``path``; under that name the file
    appears whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    writer = gguf.GGUFWriter(part, model.architecture)
    try:
        for key, value in model.metadata.items():
            if key != "general.architecture":
                _add_key(writer, key, value)
        for info in model.stacked.values():
            # The writer wants the bytes of quantised tensors, and makes the shape of the values of them.
            kind = gguf.GGMLQuantizationType[info.type]
            raw = info.type not in ("F32", "F16")
            shape = (
                (*info.shape[:-1], info.nbytes * info.shape[-1] // _values(info.shape)) if raw else info.shape
            )
            dtype = np.dtype(np.uint8 if raw else {"F32": np.float32, "F16": np.float16}[info.type])
            writer.add_tensor_info(info.name, shape, dtype, info.nbytes, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        (file,) = writer.fout
        buffer = bytearray(_PIECE_BYTES)
        flushed = 0
        for info in model.stacked.values():
            writer.write_padding(file, file.tell())
            for start in range(0, info.nbytes, _PIECE_BYTES):
                with memoryview(buffer)[: info.nbytes - start] as view:
                    model.read_into(info, start, view)
                    file.write(view)
            if file.tell() - flushed >= _FLUSH_BYTES:
                flushed = _flush(file)
        writer.write_padding(file, file.tell())
        _flush(file)
        writer.close()
        os.replace(part, path)
    except BaseException:
        writer.close()
        part.unlink(missing_ok=True)
        raise


def _values(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape))


def _flush(file: Any) -> int:
    file.flush()
    os.fdatasync(file.fileno())
    written: int = file.tell()
    drop_cache(file.fileno(), 0, written)
    return written


def _add_key(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    if isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, np.ndarray):
        kinds = {
            np.dtype(np.float32): gguf.GGUFValueType.FLOAT32,
            np.dtype(np.int32): gguf.GGUFValueType.INT32,
        }
        array = gguf.GGUFValueType.ARRAY
        writer.add_key_value(key, value.tolist(), array, sub_type=kinds[value.dtype])
    else:
        raise TypeError(f"{key}: {value!r}")
