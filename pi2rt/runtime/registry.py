"""Executors and cluster units by name: entry points of the groups ``pi2rt.executors`` and ``pi2rt.cluster_units``.

Each is checked against its protocol when it is loaded, not when a request first needs the method that it lacks (as
pluggy checks its plug-ins at registration).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from pi2rt._errors import PluginError, RequestError
from pi2rt.runtime.cluster_unit import ClusterUnit
from pi2rt.runtime.executor import StepExecutor
from pi2rt.runtime.plugin_options import PluginOptions, with_options

GROUP = "pi2rt.executors"
UNITS = "pi2rt.cluster_units"

_METHODS = {
    "open": ("file", "model", "options", "store", "progress"),
    "submit": ("step",),
    "wait": (),
    "stop": ("step_id",),
    "aclose": (),
    "statistics": (),
}
_MASK = {"mask": ("step_id", "slot", "allowed")}
_ASYNC = frozenset({"open", "wait", "aclose"})
_UNIT_METHODS = {
    "need": ("neurons", "dim", "gated"),
    "load": ("layer", "weights"),
    "multiply": ("layer", "x", "out"),
    "close": (),
}


def available_executors() -> Mapping[str, EntryPoint]:
    """Entry points by name, sorted. Nothing is imported."""
    return _available(GROUP)


def available_cluster_units() -> Mapping[str, EntryPoint]:
    """As ``available_executors``."""
    return _available(UNITS)


def _available(group: str) -> Mapping[str, EntryPoint]:
    found = {entry.name: entry for entry in entry_points(group=group)}
    return dict(sorted(found.items()))


def load_executor(name: str, options: PluginOptions | None = None) -> Callable[..., StepExecutor]:
    """The class (or factory) of that name, which has passed ``check_executor``, with its ``options``.

    Raises:
        RequestError: no such executor or option; the message lists those there are.
        PluginError: it cannot be imported, or does not keep to the protocol.
    """
    where, factory = _load("executor", name, available_executors())
    check_executor(where, factory)
    loaded: Callable[..., StepExecutor] = with_options(name, factory, (options or {}).get(name, {}))
    return loaded


def load_cluster_unit(name: str, options: PluginOptions | None = None) -> Callable[[], ClusterUnit]:
    """As ``load_executor``."""
    where, factory = _load("cluster unit", name, available_cluster_units())
    check_cluster_unit(where, factory)
    loaded: Callable[[], ClusterUnit] = with_options(name, factory, (options or {}).get(name, {}))
    return loaded


def _load(kind: str, name: str, available: Mapping[str, EntryPoint]) -> tuple[str, Any]:
    """The plug-in as errors call it, and what its entry point names."""
    entry = available.get(name)
    if entry is None:
        raise RequestError(f"no {kind} {name!r}; available: {', '.join(available) or 'none'}")
    where = f"{entry.name} ({entry.value})"
    try:
        return where, entry.load()
    except Exception as error:
        raise PluginError(where, f"cannot be imported: {type(error).__name__}: {error}") from error


def check_executor(plugin: str, factory: object) -> None:
    """Constructs an executor, without opening it, and checks it against the protocol.

    So a constructor takes no argument that is required, and acquires nothing: that is for ``open``.

    Raises:
        PluginError: names the plug-in and every defect found.
    """
    executor = _constructed(plugin, factory, "an executor")
    limit = getattr(executor, "max_in_flight", None)
    defects = list(_name_defects(executor))
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        defects.append(f"attribute 'max_in_flight' must be a whole number of at least 1, not {limit!r}")
    defects += _method_defects(executor, _METHODS)
    takes_masks = getattr(executor, "takes_masks", False)
    if not isinstance(takes_masks, bool):
        defects.append(f"attribute 'takes_masks' must be True or False, not {takes_masks!r}")
    elif takes_masks:
        defects += _method_defects(executor, _MASK)
    if defects:
        raise PluginError(plugin, "; ".join(defects))


def check_cluster_unit(plugin: str, factory: object) -> None:
    """As ``check_executor``."""
    unit = _constructed(plugin, factory, "a cluster unit")
    if defects := [*_name_defects(unit), *_method_defects(unit, _UNIT_METHODS)]:
        raise PluginError(plugin, "; ".join(defects))


def _constructed(plugin: str, factory: object, what: str) -> object:
    if not callable(factory):
        raise PluginError(plugin, f"is {factory!r}, neither a class nor a function that makes {what}")
    try:
        return factory()
    except Exception as error:
        raise PluginError(
            plugin, f"cannot be constructed without arguments: {type(error).__name__}: {error}"
        ) from error


def _name_defects(made: object) -> Iterable[str]:
    name = getattr(made, "name", None)
    if not isinstance(name, str) or not name:
        yield f"attribute 'name' must be a string that is not empty, not {name!r}"


def _method_defects(made: object, methods: Mapping[str, tuple[str, ...]]) -> Iterable[str]:
    for method, arguments in methods.items():
        call = f"{method}({', '.join(arguments)})"
        function = getattr(made, method, None)
        if not callable(function):
            yield f"method {call} is missing"
            continue
        try:
            inspect.signature(function).bind(*arguments)
        except TypeError as error:
            yield f"method {call} does not take these arguments: {error}"
        except ValueError:
            pass  # a compiled method that does not tell its signature
        if inspect.iscoroutinefunction(function) != (method in _ASYNC):
            yield f"method {call} must {'' if method in _ASYNC else 'not '}be 'async def'"
