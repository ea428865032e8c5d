"""Writes ``families.npz``: what Transformers computes for the tiny models of ``tests/support/families.py``.

    pip install torch transformers && python -m tests.golden.make_families

Each model is written to a directory, loaded from there by Transformers in float32 with eager attention, and
run over its tokens at once; the logits of a few positions are kept.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from tests.support.families import FAMILIES, Family
from tests.support.tiny_models import write_huggingface


def logits_of(family: Family, directory: Path) -> np.ndarray:
    write_huggingface(directory, family.model)
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        logits = model(torch.from_numpy(family.token_ids()[None].astype(np.int64))).logits[0]
    return logits[family.positions].numpy()


def main() -> None:
    golden = {}
    for name, family in FAMILIES.items():
        with tempfile.TemporaryDirectory() as directory:
            golden[name] = logits_of(family, Path(directory))
        print(f"{name:24} {golden[name].shape} largest {np.abs(golden[name]).max():.3f}")
    np.savez_compressed(Path(__file__).with_name("families.npz"), **golden)


if __name__ == "__main__":
    main()
