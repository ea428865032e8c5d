"""What a chat template's source says about the messages it wants."""

from __future__ import annotations

from dataclasses import dataclass

from jinja2 import nodes


@dataclass(frozen=True, slots=True)
class ContentFormat:
    """``reads_text``: the template has the word ``text`` as the name or the value of a field, as everything does that
    prints lists of parts. ``knows_none``: names of fields and variables that it compares with none."""

    reads_text: bool
    knows_none: frozenset[str]


def read_content_format(template: nodes.Template) -> ContentFormat:
    """A look at the parsed source."""
    compared = [test.node for test in template.find_all(nodes.Test) if test.name == "none"]
    for comparison in template.find_all(nodes.Compare):
        operands = [comparison.expr, *(operand.expr for operand in comparison.ops)]
        if any(isinstance(operand, nodes.Const) and operand.value is None for operand in operands):
            compared += operands
    return ContentFormat(
        reads_text=any(attribute.attr == "text" for attribute in template.find_all(nodes.Getattr))
        or any(constant.value == "text" for constant in template.find_all(nodes.Const)),
        knows_none=frozenset(filter(None, map(_name, compared))),
    )


def _name(node: nodes.Node) -> str | None:
    """What an expression looks up last: ``content`` of ``messages[0]['content']``."""
    if isinstance(node, nodes.Name):
        return node.name
    if isinstance(node, nodes.Getattr):
        return node.attr
    if isinstance(node, nodes.Getitem):
        node = node.arg
    elif isinstance(node, nodes.Call) and node.args:  # message.get('content')
        node = node.args[0]
    return node.value if isinstance(node, nodes.Const) and isinstance(node.value, str) else None
