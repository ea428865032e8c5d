"""Makes the tokenizer of a model file."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from pi2rt._errors import TemplateError
from pi2rt.formats.model_file import ModelFile
from pi2rt.formats.pack import PackFile
from pi2rt.tokenizer import byte_level
from pi2rt.tokenizer.chat_template import ChatTemplate
from pi2rt.tokenizer.tokenizer import Encoder, Tokenizer
from pi2rt.tokenizer.vocabulary import MAX_TOKENS, MetadataSource, TokenKind, Vocabulary, read_vocabulary

_TEMPLATE_KEY = "tokenizer.chat_template"
_EMBEDDINGS = ("token_embd.weight", "model.embed_tokens.weight")


def load_tokenizer(file: MetadataSource) -> Tokenizer:
    """The tokenizer of an open model file: from the metadata of a GGUF file, or from the tokenizer.json that
    lies in a Hugging Face directory or in the pack made from one. Takes about 0.1 s for 50,000 tokens.

    Args:
        file: a ``ModelFile``; only its ``path`` and ``metadata`` are read, the companions of a pack, and the shape of
            the embedding: its rows beyond the vocabulary are ids that stand for no text.

    Raises:
        ModelFormatError: the vocabulary is malformed; the message names the field.
        UnsupportedModelError: the kind of tokenizer, or its way to split text, is one pi2rt does not have.
    """
    if isinstance(file.path, Path) and file.path.is_dir():
        from pi2rt.tokenizer.huggingface import load_huggingface_tokenizer

        return load_huggingface_tokenizer(file.path, file.metadata, rows=_rows(file))
    if isinstance(file, PackFile) and file.source.container == "huggingface":
        from pi2rt.tokenizer.huggingface import load_huggingface_tokenizer

        return load_huggingface_tokenizer(file.path, file.metadata, file.read_companion, rows=_rows(file))
    return _from_gguf(file)


def _rows(file: MetadataSource) -> int:
    """The rows of the model's embedding: every id that the model can give is below; 0 where there is none."""
    tensors = file.tensors if isinstance(file, ModelFile) else {}
    found = [tensors[name].shape[0] for name in _EMBEDDINGS if name in tensors and tensors[name].shape]
    return min(max(found, default=0), MAX_TOKENS)


def _from_gguf(file: MetadataSource) -> Tokenizer:
    vocabulary = read_vocabulary(file)
    encoder: Encoder
    # the engines import `tokenizers`, which takes longer than everything else at start
    if vocabulary.model == "gpt2":
        from pi2rt.tokenizer.byte_bpe import ByteBpe

        encoder = ByteBpe(vocabulary)
        spell, strip_space, add_bos = _spell_byte_level, False, encoder.pre.add_bos
    else:
        from pi2rt.tokenizer.spm import Spm

        encoder = Spm(vocabulary)
        spell, strip_space, add_bos = _spell_spm, vocabulary.add_space_prefix is not False, True
    special = {id_ for _, id_ in vocabulary.of_kind(TokenKind.CONTROL, TokenKind.UNKNOWN)}
    ends = {id_ for id_ in (vocabulary.eos_id, vocabulary.eot_id, vocabulary.eom_id) if id_ is not None}
    return Tokenizer(
        encoder,
        partial(_spell, vocabulary, spell),
        vocab_size=max(len(vocabulary.tokens), _rows(file)),
        special_ids=frozenset(special),
        bos_id=vocabulary.bos_id,
        eos_ids=vocabulary.end_of_turn | ends,
        prefix_ids=_wanted(vocabulary, "bos", vocabulary.add_bos, add_bos),
        suffix_ids=_wanted(vocabulary, "eos", vocabulary.add_eos, False),
        strip_space=strip_space,
        chat_template=partial(_chat_template, vocabulary, file.metadata.get(_TEMPLATE_KEY)),
    )


def _wanted(vocabulary: Vocabulary, name: str, asked: bool | None, default: bool) -> tuple[int, ...]:
    """The token to add at one end, or none."""
    id_ = vocabulary.bos_id if name == "bos" else vocabulary.eos_id
    if asked and id_ is None:
        raise vocabulary.error(f"add_{name}_token", f"is true, but there is no {name}_token_id")
    wanted = default if asked is None else asked
    return (id_,) if wanted and id_ is not None else ()


def _spell(vocabulary: Vocabulary, spell: Callable[[Vocabulary, int], bytes], id_: int) -> bytes:
    return spell(vocabulary, id_) if id_ < len(vocabulary.tokens) else b""


def _spell_byte_level(vocabulary: Vocabulary, id_: int) -> bytes:
    token, kind = vocabulary.tokens[id_], vocabulary.kinds[id_]
    if kind in (TokenKind.CONTROL, TokenKind.UNKNOWN, TokenKind.USER_DEFINED):
        return token.encode()
    return byte_level.token_bytes(token)


def _spell_spm(vocabulary: Vocabulary, id_: int) -> bytes:
    token, kind = vocabulary.tokens[id_], vocabulary.kinds[id_]
    if kind == TokenKind.BYTE:
        return byte_level.hexadecimal_byte(token) or token.encode()
    if kind in (TokenKind.CONTROL, TokenKind.UNKNOWN):
        return token.encode()
    return byte_level.unescape_spaces(token)


def _chat_template(vocabulary: Vocabulary, source: object) -> ChatTemplate | None:
    if source is None:
        return None
    if not isinstance(source, str):
        raise TemplateError(f"{vocabulary.path}: {_TEMPLATE_KEY}: is a {type(source).__name__}, not a string")
    return ChatTemplate(source, special_tokens=vocabulary.names)
