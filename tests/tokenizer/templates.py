"""Chat templates in the manner of real ones, and conversations for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "You are terse.\n"},
    {"role": "user", "content": '  Why is the sky <blue> & "high"?  '},
    {"role": "assistant", "content": "<think>\nlight\n</think>\n\nScattering."},
    {"role": "user", "content": "\u00dcber \U0001f600?"},
]
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "It's <hot> or \u00abcold\u00bb",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    }
]
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"function": {"name": "weather", "arguments": {"city": "K\u00f6ln", "n": 1.5, "ok": None}}}
    ],
}

CHATML, BLOCKS, METHODS = (
    (Path(__file__).parent / "jinja" / f"{name}.jinja").read_text()
    for name in ("chatml", "blocks", "methods")
)

# name: (source, variables of the rendering)
TEMPLATES: dict[str, tuple[str, dict[str, Any]]] = {
    "chatml": (CHATML, {"messages": CHAT, "add_generation_prompt": True}),
    "chatml without system": (CHATML, {"messages": CHAT[1:3], "add_generation_prompt": False}),
    "blocks": (BLOCKS, {"messages": CHAT, "add_generation_prompt": True}),
    "blocks with tools": (
        BLOCKS,
        {"messages": [*CHAT, CALL], "tools": TOOLS, "add_generation_prompt": True},
    ),
    "methods": (METHODS, {"messages": CHAT, "add_generation_prompt": False}),
}
