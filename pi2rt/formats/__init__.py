"""Model files: bytes in, arrays out. Hostile input stops here."""

from pi2rt.formats.model_file import ModelFile, TensorInfo, open_model_file

__all__ = ["ModelFile", "TensorInfo", "open_model_file"]
