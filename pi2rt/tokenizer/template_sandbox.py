"""Jinja's immutable sandbox, with a budget for everything that can loop or grow.

Every loop, call, filter, test, operator, list and string that a template makes is routed through the
``Budget`` of the rendering: some by Jinja's own hooks, and the rest, for which it has none, by rewriting the
parsed template. Its literals become strings that are marked as the template's own (``marked_text``).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from jinja2 import nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_context
from jinja2.visitor import NodeTransformer

from pi2rt.tokenizer import template_filters, template_operators
from pi2rt.tokenizer.content_format import ContentFormat, read_content_format
from pi2rt.tokenizer.marked_text import trusted
from pi2rt.tokenizer.template_budget import Budget
from pi2rt.tokenizer.template_strings import call_method, concatenate, is_callable_method, text_of

Function = Callable[..., Any]


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """Parses and renders chat templates, with the settings that transformers has.

    Args:
        functions: more functions for templates, by name.
    """

    intercepted_binops = template_operators.OPERATORS

    def __init__(self, functions: dict[str, Function]) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # folding constants would run filters before there is a budget
            finalize=self._finalize,
            extensions=[LoopControlExtension, _Generation],
        )
        self._rendering = threading.local()
        self._literals: dict[str, str] = {}
        self.tick, self.ticked = self._tick, self._ticked  # bound once, to be recognised
        self.globals = {
            "range": self.globals["range"],
            "cycler": self.globals["cycler"],
            "joiner": self.globals["joiner"],
            "namespace": _Namespace,
            "dict": self._dict,
            **functions,
        }
        own = {name: self._own_filter(function) for name, function in template_filters.own_filters().items()}
        built_in = {
            name: self._checked(name, function)
            for name, function in template_filters.built_in_filters().items()
        }
        self.filters = own | built_in
        tests: dict[str, Function] = self.tests  # type: ignore[assignment]
        self.tests = {name: self._checked("", function) for name, function in tests.items()}

    def template(self, source: str) -> tuple[Any, ContentFormat]:
        """A compiled template, and the messages it wants; its ``root_render_func`` and ``new_context`` are for use
        inside ``spending``."""
        tree = self.parse(source)
        content_format = read_content_format(tree)
        code = self.compile(_Instrument(self._literal).visit(tree))
        return self.template_class.from_code(self, code, self.make_globals(None)), content_format

    def _literal(self, text: str) -> str:
        """The name of an attribute of this environment that is a literal of the template, marked as trusted."""
        name = self._literals.get(text)
        if name is None:
            name = self._literals[text] = f"literal_{len(self._literals)}"
            setattr(self, name, trusted(text))
        return name

    @contextmanager
    def spending(self, budget: Budget) -> Iterator[None]:
        """Renders on this thread count against this budget."""
        outer = getattr(self._rendering, "budget", None)
        self._rendering.budget = budget
        try:
            yield
        finally:
            self._rendering.budget = outer

    @property
    def _budget(self) -> Budget:
        budget: Budget | None = getattr(self._rendering, "budget", None)
        if budget is None:
            raise nodes.Impossible  # compiling; what would be computed then, is computed when rendering
        return budget

    # Jinja's hooks

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str):
            return is_callable_method(attr)
        if isinstance(obj, (int, float, complex, bytes, bytearray)):
            return attr == "is_integer"
        if isinstance(obj, dict) and attr == "fromkeys":
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Function | None:
        """``str.format`` looks up attributes by itself, so templates never get hold of the method."""
        owner = getattr(value, "__self__", None)
        if not isinstance(owner, str) or getattr(value, "__name__", "") != "format":
            return None
        return lambda *args, **kwargs: call_method(self, self._budget, owner, "format", args, kwargs)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        if obj is self.ticked or obj is self.tick:
            return obj(*args)
        budget = self._budget
        budget.tick()
        owner = getattr(obj, "__self__", None)
        if isinstance(owner, str):
            for hidden in ("_block_vars", "_loop_vars"):  # Jinja passes these to all functions
                kwargs.pop(hidden, None)
            result = call_method(self, budget, owner, obj.__name__, args, kwargs)
        else:
            result = super().call(context, obj, *args, **kwargs)
        return budget.charge(result)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = self._budget
        budget.tick()
        return budget.charge(template_operators.apply(budget, operator, left, right))

    def concat(self, parts: Iterable[str]) -> str:
        budget = self._budget
        budget.tick()
        return str(budget.charge(concatenate(budget, parts)))

    @pass_context
    def _finalize(self, context: Context, value: Any) -> str:
        budget = self._budget
        budget.tick()
        return text_of(budget, value)

    # what the rewritten template calls

    def _tick(self) -> bool:
        self._budget.tick()
        return True

    def _ticked(self, value: Any) -> Any:
        self._budget.tick(1 + (len(value) >> 14 if isinstance(value, str) else 0))
        return value

    def make_list(self, *items: Any) -> list[Any]:
        return list(items)

    def make_tuple(self, *items: Any) -> tuple[Any, ...]:
        return items

    def make_dict(self, *keys_and_values: Any) -> dict[Any, Any]:
        return dict(zip(keys_and_values[::2], keys_and_values[1::2], strict=True))

    def make_string(self, *parts: Any) -> str:
        return concatenate(self._budget, parts)

    def make_slice(self, value: Any, start: Any, stop: Any, step: Any) -> Any:
        return value[start:stop:step]

    def _dict(self, *pairs: Any, **values: Any) -> dict[Any, Any]:
        budget = self._budget
        result: dict[Any, Any] = {}
        for source in pairs:
            items = source.items() if isinstance(source, dict) else source
            for key, value in items:
                budget.tick()
                result[key] = value
                budget.check_items(len(result))
        return result | values

    def _own_filter(self, function: Function) -> Function:
        @pass_context
        def run(context: Context, *args: Any, **kwargs: Any) -> Any:
            budget = self._budget
            budget.tick()
            return budget.charge(function(self, budget, *args, **kwargs))

        return run

    def _checked(self, name: str, function: Function) -> Function:
        """One of Jinja's own filters, or tests (which have no name here)."""
        passed = getattr(function, "jinja_pass_arg", None)

        @pass_context
        def run(context: Context, *args: Any, **kwargs: Any) -> Any:
            budget = self._budget
            budget.tick()
            if name:
                template_filters.checked_arguments(budget, name, args, kwargs)
            if passed is None:
                result = function(*args, **kwargs)
            else:
                first = {"context": context, "eval_context": context.eval_ctx, "environment": self}[
                    passed.name
                ]
                result = function(first, *args, **kwargs)
            return budget.charge(result)

        return run


class _Namespace(Namespace):
    def __repr__(self) -> str:
        return "<namespace>"  # its values may hold itself, or hold each other many times over


class _Generation(Extension):
    """``{% generation %}``, which transformers marks the assistant's words with; here it is as if it were not
    there."""

    tags = {"generation"}  # noqa: RUF012  # as the base class has it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Instrument(NodeTransformer):
    """Rewrites what Jinja would run without asking its environment.

    Args:
        literal: the name of the environment's attribute that holds a literal, marked as the template's own.
    """

    def __init__(self, literal: Callable[[str], str]) -> None:
        self._literal = literal

    def visit_Const(self, node: nodes.Const) -> nodes.Node:
        if not isinstance(node.value, str):
            return node
        return nodes.EnvironmentAttribute(self._literal(node.value), lineno=node.lineno)

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        return nodes.EnvironmentAttribute(self._literal(node.data), lineno=node.lineno)

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call(node, "tick"), lineno=node.lineno))
        if node.test is not None:
            node.test = nodes.And(_call(node, "tick"), node.test, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call(node, "make_string", *node.nodes)

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return _call(node, "make_list", *node.items)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return node if node.ctx != "load" else _call(node, "make_tuple", *node.items)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return _call(node, "make_dict", *(part for pair in node.items for part in (pair.key, pair.value)))

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        bounds = (node.arg.start, node.arg.stop, node.arg.step)
        return _call(node, "make_slice", node.node, *(part or nodes.Const(None) for part in bounds))

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _call(node, "ticked", node.expr)
        return node


def _call(node: nodes.Node, name: str, *args: nodes.Expr) -> nodes.Call:
    function = nodes.EnvironmentAttribute(name, lineno=node.lineno)
    call = nodes.Call(function, list(args), [], None, None, lineno=node.lineno)
    return call.set_environment(node.environment)  # type: ignore[return-value, arg-type]
