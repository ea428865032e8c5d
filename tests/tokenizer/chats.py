"""Chat templates in the manner of well-known families, and vocabularies with their control tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from pi2rt.tokenizer.byte_level import CHARACTERS, SPACE
from tests.tokenizer.files import byte_level_file, chain, spm_file

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
    "'\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}{%- set prefix = messages[0]['content'] + '\n\n' -%}
    {%- else -%}{%- set prefix = messages[0]['content'][0]['text'] + '\n\n' -%}{%- endif -%}
    {%- set rest = messages[1:] -%}
{%- else -%}{%- set prefix = '' -%}{%- set rest = messages -%}{%- endif -%}
{%- for message in rest -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\n' + (prefix if loop.first else '') }}
    {%- if message['content'] is string -%}{{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"""
QWEN3 = """{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}
    {{- "# Tools\n<tools>" }}{%- for tool in tools %}{{- "\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\n</tools><|im_end|>\n" }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == "user" and not(message.content.startswith('<tool_response>')) %}
        {%- set ns.last = index %}{%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "assistant" %}
        {%- set reasoning = '' %}
        {%- if message.reasoning_content is string %}{%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and reasoning %}
            {{- '<|im_start|>' + message.role + '\n<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' }}
            {{- content.lstrip('\n') }}
        {%- else %}{{- '<|im_start|>' + message.role + '\n' + content }}{%- endif %}
        {%- for tool_call in message.tool_calls or [] %}
            {{- '\n<tool_call>\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}{{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user\n<tool_response>\n' + content + '\n</tool_response><|im_end|>\n' }}
    {%- else %}{{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system = messages[0]["content"] %}{%- set rest = messages[1:] %}
{%- else %}{%- set rest = messages %}{%- endif %}
{{- bos_token }}
{%- for message in rest %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system is defined %}
            {{- "[INST] " ~ [system, message["content"]] | join("\n\n") ~ "[/INST]" }}
        {%- else %}{{- "[INST] %s[/INST]" | format(message["content"]) }}{%- endif %}
    {%- else %}{{- " {}{}".format(message["content"] | trim, eos_token) }}{%- endif %}
{%- endfor %}"""

FAMILIES = {"chatml": CHATML, "llama3": LLAMA3, "gemma": GEMMA, "qwen3": QWEN3, "mistral": MISTRAL}
CONTROL = [
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]",
]  # fmt: skip
USER_DEFINED = ["<think>", "</think>", "<tool_call>", "\n\n"]


def gguf_bpe() -> SimpleNamespace:
    merges = [*chain("system"), *chain("end"), *chain("|>")]
    return byte_level_file(merges, control=CONTROL, user_defined=USER_DEFINED)


def gguf_spm() -> SimpleNamespace:
    pieces = [
        (SPACE, -1.0),
        ("s", -2.0),
        ("y", -2.0),
        ("sy", -1.5),
        (SPACE + "sy", -1.2),
        ("|", -3.0),
        (">", -3.0),
    ]
    return spm_file([*pieces, ("|>", -2.5)], control=CONTROL[2:], user_defined=USER_DEFINED)


def _with_added(tokenizer: Tokenizer, **flags: bool) -> Tokenizer:
    tokenizer.add_special_tokens(
        [AddedToken(text, normalized=False, special=True, **flags) for text in CONTROL]
    )
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in USER_DEFINED])
    return tokenizer


def _byte_level(**flags: bool) -> Tokenizer:
    vocabulary = {character: id_ for id_, character in enumerate(CHARACTERS)}
    merges = []
    for merge in (*chain("system"), *chain("end"), *chain("|>")):
        left, right = merge.split(" ")
        merges.append((left, right))
        vocabulary.setdefault(left + right, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _with_added(tokenizer, **flags)


def _sentencepiece() -> Tokenizer:
    """A model as Llama 2's and Gemma's tokenizer.json have it, but for normaliser and pre-tokeniser."""
    vocabulary = {"<unk>": 0}
    for piece in [
        *(f"<0x{byte:02X}>" for byte in range(256)),
        SPACE,
        "s",
        "y",
        "sy",
        SPACE + "sy",
        "|",
        ">",
        "|>",
    ]:
        vocabulary[piece] = len(vocabulary)
    merges = [("s", "y"), (SPACE, "sy"), ("|", ">")]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def _prepending() -> Tokenizer:
    tokenizer = _sentencepiece()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    return _with_added(tokenizer)


def _metaspace() -> Tokenizer:
    tokenizer = _sentencepiece()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return _with_added(tokenizer)


HUGGINGFACE: dict[str, Callable[[], Tokenizer]] = {
    "byte level": _byte_level,
    "byte level, tokens that take in white space": lambda: _byte_level(lstrip=True, rstrip=True),
    "sentencepiece, spaces prepended": _prepending,
    "sentencepiece, metaspace": _metaspace,
}
GGUF: dict[str, Callable[[], SimpleNamespace]] = {"gguf bpe": gguf_bpe, "gguf sentencepiece": gguf_spm}


def directory(path: Path, tokenizer: Tokenizer) -> SimpleNamespace:
    """A model directory with a tokenizer.json, as a ``ModelFile`` of it."""
    tokenizer.save(str(path / "tokenizer.json"))
    return SimpleNamespace(path=path, metadata={})
