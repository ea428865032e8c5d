"""Writes ``templates.json``: what transformers makes of the templates of ``tests/tokenizer/jinja``.

pip install transformers jinja2 && python -m tests.tokenizer.golden.make_templates
"""

from __future__ import annotations

import json
from pathlib import Path

import transformers
from transformers.utils.chat_template_utils import _compile_jinja_template

from tests.tokenizer.templates import TEMPLATES


def main() -> None:
    rendered = {}
    for name, (source, variables) in TEMPLATES.items():
        template = _compile_jinja_template(source)
        defaults = {"tools": None, "documents": None, "bos_token": "<s>", "eos_token": "</s>"}
        rendered[name] = template.render(**defaults | variables)
    golden = {"by": f"transformers {transformers.__version__}", "rendered": rendered}
    path = Path(__file__).with_name("templates.json")
    path.write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
