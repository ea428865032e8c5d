from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from pi2rt._errors import PluginError, RequestError
from pi2rt.executors.simulated.executor import SimulatedExecutor
from pi2rt.runtime.registry import (
    available_cluster_units,
    available_executors,
    check_cluster_unit,
    check_executor,
    load_cluster_unit,
    load_executor,
)
from tests.support.numpy_unit import NumpyUnit


def test_built_in_executors_are_there() -> None:
    found = available_executors()
    assert {"cpu", "reference", "simulated"} <= set(found)
    assert list(found) == sorted(found)
    assert all(isinstance(entry, EntryPoint) for entry in found.values())


def test_load() -> None:
    assert load_executor("simulated") is SimulatedExecutor


def test_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(RequestError, match=r"^no executor 'tpu'; available: .*cpu, .*reference, .*simulated"):
        load_executor("tpu")


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A distribution that plugs in two broken executors."""
    info = tmp_path / "bad_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bad-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[pi2rt.executors]\nmissing = bad_plugin_for_pi2rt:Gone\nbad = bad_plugin_for_pi2rt:Bad\n"
        "[pi2rt.cluster_units]\nbad unit = bad_plugin_for_pi2rt:Bad\nours = tests.support.numpy_unit:NumpyUnit\n"
    )
    (tmp_path / "bad_plugin_for_pi2rt.py").write_text("class Bad:\n    name = 'bad'\n")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("installed")
def test_plugins_are_found_and_checked() -> None:
    assert {"bad", "missing", "simulated"} <= set(available_executors())
    with pytest.raises(
        PluginError, match=r"^plug-in missing \(bad_plugin_for_pi2rt:Gone\): cannot be imported: "
    ):
        load_executor("missing")
    with pytest.raises(
        PluginError, match=r"^plug-in bad \(bad_plugin_for_pi2rt:Bad\): attribute 'max_in_fl"
    ) as e:
        load_executor("bad")
    assert e.value.plugin == "bad (bad_plugin_for_pi2rt:Bad)"
    for method in (
        "open(file, model, options, store, progress)",
        "submit(step)",
        "wait()",
        "stop(step_id)",
        "aclose()",
    ):
        assert f"method {method} is missing" in e.value.problem


class NoName(SimulatedExecutor):
    def __init__(self) -> None:
        super().__init__(name="")


class NoRoom(SimulatedExecutor):
    def __init__(self) -> None:
        super().__init__()
        self.max_in_flight = 0


class TakesMasksPerhaps(SimulatedExecutor):
    takes_masks = "yes"  # type: ignore[assignment]


class TakesMasksWithoutSlots(SimulatedExecutor):
    def mask(self, step_id: int) -> None: ...  # type: ignore[override]


class NeedsArguments(SimulatedExecutor):
    def __init__(self, device: str) -> None:
        super().__init__(device)


class Explodes(SimulatedExecutor):
    def __init__(self) -> None:
        raise OSError("no driver")


class WaitsWithoutAsync(SimulatedExecutor):
    def wait(self) -> None:  # type: ignore[override]
        pass


class SubmitsWithAsync(SimulatedExecutor):
    async def submit(self, step: object) -> None:  # type: ignore[override]
        pass


class OtherArguments(SimulatedExecutor):
    def stop(self) -> None:  # type: ignore[override]
        pass


class NotCallable(SimulatedExecutor):
    statistics = 3  # type: ignore[assignment]


class MoreArguments(SimulatedExecutor):
    def stop(self, step_id: int, reason: str = "") -> None:
        pass


@pytest.mark.parametrize(
    ("factory", "problem"),
    [
        (NoName, "attribute 'name' must be a string that is not empty, not ''"),
        (TakesMasksPerhaps, "attribute 'takes_masks' must be True or False, not 'yes'"),
        (TakesMasksWithoutSlots, r"method mask\(step_id, slot, allowed\) does not take these arguments"),
        (NoRoom, "attribute 'max_in_flight' must be a whole number of at least 1, not 0"),
        (NeedsArguments, "cannot be constructed without arguments: TypeError: .*'device'"),
        (Explodes, "cannot be constructed without arguments: OSError: no driver"),
        (WaitsWithoutAsync, r"method wait\(\) must be 'async def'"),
        (SubmitsWithAsync, r"method submit\(step\) must not be 'async def'"),
        (OtherArguments, r"method stop\(step_id\) does not take these arguments: too many positional"),
        (NotCallable, r"method statistics\(\) is missing"),
        (42, "is 42, neither a class nor a function"),
    ],
)
def test_defects(factory: object, problem: str) -> None:
    with pytest.raises(PluginError, match=f"^plug-in mine: {problem}"):
        check_executor("mine", factory)


@pytest.mark.parametrize("factory", [SimulatedExecutor, MoreArguments, lambda: SimulatedExecutor("other")])
def test_sound_executors_pass(factory: object) -> None:
    check_executor("mine", factory)


@pytest.mark.usefixtures("installed")
def test_cluster_units_are_found_and_checked() -> None:
    assert {"bad unit", "ours"} <= set(available_cluster_units())
    assert load_cluster_unit("ours") is NumpyUnit
    with pytest.raises(RequestError, match=r"^no cluster unit 'theirs'; available: bad unit, ours$"):
        load_cluster_unit("theirs")
    with pytest.raises(PluginError, match=r"^plug-in bad unit \(") as e:
        load_cluster_unit("bad unit")
    for method in ("need(neurons, dim, gated)", "load(layer, weights)", "multiply(layer, x, out)", "close()"):
        assert f"method {method} is missing" in e.value.problem


class OtherArguments(NumpyUnit):  # type: ignore[misc]
    def multiply(self, layer: int, x: object) -> None: ...


class AsyncUnit(NumpyUnit):  # type: ignore[misc]
    async def multiply(self, layer: int, x: object, out: object) -> None: ...


@pytest.mark.parametrize(
    ("factory", "problem"),
    [
        (OtherArguments, r"method multiply\(layer, x, out\) does not take these arguments"),
        (AsyncUnit, r"method multiply\(layer, x, out\) must not be 'async def'"),
        (NumpyUnit(), "neither a class nor a function that makes a cluster unit"),
    ],
)
def test_wrong_cluster_units(factory: object, problem: str) -> None:
    with pytest.raises(PluginError, match=problem):
        check_cluster_unit("mine", factory)
