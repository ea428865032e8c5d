"""Makes the tokenizer of a model file."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from pi2rt._errors import TemplateError
from pi2rt.formats.pack import PackFile
from pi2rt.tokenizer import byte_level
from pi2rt.tokenizer.chat_template import ChatTemplate
from pi2rt.tokenizer.end_tokens import end_of_turn_ids
from pi2rt.tokenizer.tokenizer import Encoder, Tokenizer
from pi2rt.tokenizer.vocabulary import MetadataSource, TokenKind, Vocabulary, read_vocabulary

_TEMPLATE_KEY = "tokenizer.chat_template"


def load_tokenizer(file: MetadataSource) -> Tokenizer:
    """The tokenizer of an open model file: from the metadata of a GGUF file, or from the tokenizer.json that
    lies in a Hugging Face directory or in the pack made from one. Takes about 0.1 s for 50,000 tokens.

    Args:
        file: a ``ModelFile``; only its ``path`` and ``metadata`` are read, and the companions of a pack.

    Raises:
        ModelFormatError: the vocabulary is malformed; the message names the field.
        UnsupportedModelError: the kind of tokenizer, or its way to split text, is one pi2rt does not have.
    """
    if isinstance(file.path, Path) and file.path.is_dir():
        from pi2rt.tokenizer.huggingface import load_huggingface_tokenizer

        return load_huggingface_tokenizer(file.path, file.metadata)
    if isinstance(file, PackFile) and file.source.container == "huggingface":
        from pi2rt.tokenizer.huggingface import load_huggingface_tokenizer

        return load_huggingface_tokenizer(file.path, file.metadata, file.read_companion)
    return _from_gguf(file)


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
    control = dict(vocabulary.of_kind(TokenKind.CONTROL))
    special = {*control.values(), *(id_ for _, id_ in vocabulary.of_kind(TokenKind.UNKNOWN))}
    ends = end_of_turn_ids(control)
    ends |= {id_ for id_ in (vocabulary.eos_id, vocabulary.eot_id, vocabulary.eom_id) if id_ is not None}
    return Tokenizer(
        encoder,
        partial(spell, vocabulary),
        vocab_size=len(vocabulary.tokens),
        special_ids=frozenset(special),
        bos_id=vocabulary.bos_id,
        eos_ids=frozenset(ends),
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

    def text(id_: int | None) -> str:
        return "" if id_ is None else vocabulary.tokens[id_]

    return ChatTemplate(source, bos_token=text(vocabulary.bos_id), eos_token=text(vocabulary.eos_id))
