"""Executors by name: the built-in ones and plug-ins alike are entry points of the group ``pi2rt.executors``.

An executor is checked against the protocol when it is loaded, not when a request first trips over the method
it lacks (as pluggy checks its plug-ins at registration).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points

from pi2rt._errors import PluginError, RequestError
from pi2rt.runtime.executor import Executor

GROUP = "pi2rt.executors"

_METHODS = {
    "open": ("file", "model", "options", "store", "progress"),
    "submit": ("step",),
    "wait": (),
    "stop": ("step_id",),
    "aclose": (),
    "statistics": (),
}
_ASYNC = frozenset({"open", "wait", "aclose"})


def available_executors() -> Mapping[str, EntryPoint]:
    """Entry points by name, sorted. Nothing is imported."""
    found = {entry.name: entry for entry in entry_points(group=GROUP)}
    return dict(sorted(found.items()))


def load_executor(name: str) -> Callable[..., Executor]:
    """The class (or factory) of that name, which has passed ``check_executor``.

    Raises:
        RequestError: no such executor; the message lists those there are.
        PluginError: it cannot be imported, or does not keep to the protocol.
    """
    available = available_executors()
    entry = available.get(name)
    if entry is None:
        raise RequestError(f"no executor {name!r}; available: {', '.join(available) or 'none'}")
    where = f"{entry.name} ({entry.value})"
    try:
        factory = entry.load()
    except Exception as error:
        raise PluginError(where, f"cannot be imported: {type(error).__name__}: {error}") from error
    check_executor(where, factory)
    loaded: Callable[..., Executor] = factory
    return loaded


def check_executor(plugin: str, factory: object) -> None:
    """Constructs an executor, without opening it, and checks it against the protocol.

    So a constructor takes no argument that is required, and acquires nothing: that is for ``open``.

    Raises:
        PluginError: names the plug-in and every defect found.
    """
    if not callable(factory):
        raise PluginError(plugin, f"is {factory!r}, neither a class nor a function that makes an executor")
    try:
        executor = factory()
    except Exception as error:
        raise PluginError(
            plugin, f"cannot be constructed without arguments: {type(error).__name__}: {error}"
        ) from error
    defects = list(_defects(executor))
    if defects:
        raise PluginError(plugin, "; ".join(defects))


def _defects(executor: object) -> Iterable[str]:
    name = getattr(executor, "name", None)
    if not isinstance(name, str) or not name:
        yield f"attribute 'name' must be a string that is not empty, not {name!r}"
    limit = getattr(executor, "max_in_flight", None)
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        yield f"attribute 'max_in_flight' must be a whole number of at least 1, not {limit!r}"
    for method, arguments in _METHODS.items():
        call = f"{method}({', '.join(arguments)})"
        function = getattr(executor, method, None)
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
