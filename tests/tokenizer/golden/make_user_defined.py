"""Makes user_defined.json: what SentencePiece itself makes of texts with user-defined tokens.

    python tests/tokenizer/golden/make_user_defined.py

Needs the package ``sentencepiece``, which nothing else here does.
"""

from __future__ import annotations

import json
import random
from importlib.metadata import version
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as protocol

SPACE = "\u2581"
PIECES = [
    (SPACE, -9.0), (SPACE + "a", -1.0), ("a", -2.0), ("b", -3.0), ("ab", -0.5), (SPACE * 3, -4.0), ("<", -8.0),
    (">", -8.5), ("\n", -7.0), (SPACE + "<", -3.5),
]  # fmt: skip
USER_DEFINED = ["<b>", "\n\n", SPACE * 2, "a<"]
TEXTS = [
    "", "a", "<b>", "<b>a", "a<b>a", "<b> a", " <b>a", "  <b>", "a  b", "a\n\na", "\n\n", " ", "   a", "a<b>",
    "<b><b> b", "a a<a b", "ab ab<b>ab", "\u00e9<b>\u00e9",
]  # fmt: skip


def processor(prefix: bool) -> sentencepiece.SentencePieceProcessor:
    model = protocol.ModelProto()
    kinds = protocol.ModelProto.SentencePiece
    entries = [("<unk>", 0.0, kinds.UNKNOWN), ("<s>", 0.0, kinds.CONTROL), ("</s>", 0.0, kinds.CONTROL)]
    entries += [(f"<0x{byte:02X}>", 0.0, kinds.BYTE) for byte in range(256)]
    entries += [(piece, score, kinds.NORMAL) for piece, score in PIECES]
    entries += [(piece, 0.0, kinds.USER_DEFINED) for piece in USER_DEFINED]
    for piece, score, kind in entries:
        model.pieces.add(piece=piece, score=score, type=kind)
    model.trainer_spec.model_type = protocol.TrainerSpec.BPE
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.vocab_size = len(entries)
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = prefix
    model.normalizer_spec.remove_extra_whitespaces = False
    made = sentencepiece.SentencePieceProcessor()
    made.LoadFromSerializedProto(model.SerializeToString())
    return made


def main() -> None:
    source = random.Random(1)
    texts = TEXTS + ["".join(source.choices("ab <>\n", k=source.randrange(14))) for _ in range(60)]
    content = {
        "by": f"sentencepiece {version('sentencepiece')}",
        "pieces": PIECES,
        "user_defined": USER_DEFINED,
        "texts": texts,
        "with_prefix": [processor(True).encode(text) for text in texts],
        "without_prefix": [processor(False).encode(text) for text in texts],
    }
    path = Path(__file__).with_name("user_defined.json")
    path.write_text(json.dumps(content, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
