"""Writes ``smollm2.json``, ``splits.json`` and ``tok512.json``: how llama.cpp tokenizes the texts of
``tests/tokenizer/texts.py``.

    pip install llama-cpp-python gguf tokenizers && python -m tests.tokenizer.golden.make_golden MODEL.gguf

``smollm2.json``: with the real vocabulary, special tokens as text and as tokens. ``splits.json``: under every
way to split text (``tokenizer.ggml.pre``), with a vocabulary trained on the texts without any split, whose
tokens would span whole sentences if a wrong split let them. It holds its merges; its tokens are the 256 bytes
and what merges make.
``tok512.json``: with the SentencePiece vocabulary of stories260K.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import gguf
import llama_cpp
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from pi2rt.tokenizer.byte_level import CHARACTERS
from tests.tokenizer.texts import TEXTS
from tests.tokenizer.tok512 import tok512_file

HERE = Path(__file__).parent
BY = f"llama-cpp-python {llama_cpp.__version__}"

# one of each way to split
SPLITS = (
    "default",
    "gpt-2",
    "smollm",
    "llama-bpe",
    "dbrx",
    "qwen2",
    "qwen35",
    "deepseek-llm",
    "deepseek-coder",
    "deepseek-v3",
    "falcon",
    "tekken",
    "gpt-4o",
    "bloom",
    "viking",
    "bailingmoe",
    "seed-coder",
    "minicpm5",
)


def tokenize(model: Path, special: bool) -> list[list[int]]:
    llama = llama_cpp.Llama(str(model), vocab_only=True, verbose=False)
    return [llama.tokenize(text.encode(), add_bos=False, special=special) for text in TEXTS]


def train() -> list[str]:
    """Merges over whole texts."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = BpeTrainer(
        vocab_size=100_000, min_frequency=1, initial_alphabet=list(CHARACTERS), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [" ".join(merge) for merge in merges]


def add_hyperparameters(writer: gguf.GGUFWriter) -> None:
    writer.add_context_length(512)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_vocabulary(merges: Sequence[str], pre: str, path: Path) -> None:
    tokens = list(dict.fromkeys([*CHARACTERS, *(merge.replace(" ", "") for merge in merges)]))
    writer = gguf.GGUFWriter(path, "llama")
    add_hyperparameters(writer)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)
    finish(writer)


def write_tok512(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    add_hyperparameters(writer)
    keys = {key.split(".")[-1]: value for key, value in tok512_file().metadata.items()}
    writer.add_tokenizer_model(keys["model"])
    writer.add_token_list(keys["tokens"])
    writer.add_token_scores(keys["scores"])
    writer.add_token_types(keys["token_type"])
    writer.add_bos_token_id(keys["bos_token_id"])
    writer.add_eos_token_id(keys["eos_token_id"])
    writer.add_unk_token_id(keys["unknown_token_id"])
    finish(writer)


def write_json(name: str, value: object) -> None:
    (HERE / name).write_text(json.dumps(value, separators=(",", ":"), ensure_ascii=False) + "\n")


def main() -> None:
    model = Path(sys.argv[1])
    write_json("smollm2.json", {"by": BY, "text": tokenize(model, False), "special": tokenize(model, True)})
    merges = train()
    splits = {}
    with tempfile.TemporaryDirectory() as directory:
        for pre in SPLITS:
            path = Path(directory) / "vocabulary.gguf"
            write_vocabulary(merges, pre, path)
            splits[pre] = tokenize(path, False)
        path = Path(directory) / "tok512.gguf"
        write_tok512(path)
        tok512 = {"by": BY, "text": tokenize(path, False), "special": tokenize(path, True)}
    write_json("tok512.json", tok512)
    write_json("splits.json", {"by": BY, "merges": merges, "splits": splits})


if __name__ == "__main__":
    main()
