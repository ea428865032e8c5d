"""Options of plug-ins: keyword arguments of their constructors, from a program or from a command line."""

from __future__ import annotations

from typing import Any

import pytest

from pi2rt._errors import RequestError
from pi2rt.executors.simulated.executor import SimulatedExecutor
from pi2rt.runtime.plugin_options import OptionValue, option_defaults, parse_options, with_options
from pi2rt.runtime.registry import load_executor


class Device:
    def __init__(
        self,
        device: str = "GPU",
        *,
        batches: int = 1,
        share: float = 0.5,
        quiet: bool = False,
        cache: str | None = None,
        hook: object = None,
    ) -> None:
        if batches < 1:
            raise ValueError(f"batches={batches}: at least 1 is needed")
        self.given = {"device": device, "batches": batches, "share": share, "quiet": quiet, "cache": cache}


DEFAULTS: dict[str, OptionValue] = {
    "device": "GPU", "batches": 1, "share": 0.5, "quiet": False, "cache": None,
}  # fmt: skip


def test_arguments_with_plain_defaults_are_options() -> None:
    assert option_defaults(Device) == DEFAULTS
    assert option_defaults(len) == {}
    assert "seconds_per_step" in option_defaults(SimulatedExecutor)
    assert not {"faults", "pages", "next_token"} & set(option_defaults(SimulatedExecutor))


@pytest.mark.parametrize(
    ("given", "made"),
    [
        ({}, {}),
        ({"device": "NPU", "batches": "3", "share": "0.25", "quiet": "on", "cache": "/tmp"},
         {"device": "NPU", "batches": 3, "share": 0.25, "quiet": True, "cache": "/tmp"}),
        ({"batches": 3, "share": 1, "quiet": True, "cache": None}, {"batches": 3, "share": 1.0, "quiet": True}),
        ({"quiet": "False"}, {"quiet": False}),
        ({"device": ""}, {"device": ""}),
    ],
)  # fmt: skip
def test_values_become_what_the_default_is(given: dict[str, OptionValue], made: dict[str, Any]) -> None:
    device = with_options("dsp", Device, given)()
    assert device.given == DEFAULTS | made
    assert [type(value) for value in device.given.values()] == [
        type(value) for value in (DEFAULTS | made).values()
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"devise": "x"}, "dsp.devise: 'dsp' has no such option; there are: batches, cache, device, quiet, share"),
        ({"hook": "x"}, "dsp.hook: 'dsp' has no such option"),
        ({"batches": "many"}, "dsp.batches='many': an integer is needed; the default is 1"),
        ({"batches": 1.5}, "dsp.batches=1.5: an integer is needed"),
        ({"batches": True}, "dsp.batches=True: an integer is needed"),
        ({"share": "half"}, "dsp.share='half': a number is needed; the default is 0.5"),
        ({"quiet": "maybe"}, "dsp.quiet='maybe': on or off is needed; the default is False"),
        ({"quiet": 1}, "dsp.quiet=1: on or off is needed"),
        ({"device": 1}, "dsp.device=1: a text is needed; the default is 'GPU'"),
        ({"device": None}, "dsp.device=None: a text is needed"),
        ({"batches": 0}, "'dsp' does not take its options: batches=0: at least 1 is needed"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_named(given: dict[str, OptionValue], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        with_options("dsp", Device, given)()
    assert str(caught.value).startswith(message)


def test_an_executor_is_loaded_with_its_own() -> None:
    options = {"simulated": {"max_in_flight": "5"}, "other": {"x": "y"}}
    assert load_executor("simulated", options)().max_in_flight == 5
    assert load_executor("simulated")().max_in_flight == 2
    with pytest.raises(RequestError, match=r"^cpu\.x: 'cpu' has no such option; it has none$"):
        load_executor("cpu", {"cpu": {"x": 1}})


def test_texts_of_a_command_line() -> None:
    assert parse_options(["npu.device=GPU", "npu.path=a.b=c"]) == {"npu": {"device": "GPU", "path": "a.b=c"}}
    assert parse_options(["my.executor.x="]) == {"my.executor": {"x": ""}}
    for text in ("npu", "npu.device", "device=GPU", ".device=GPU", "npu.=GPU", "="):
        with pytest.raises(RequestError, match=r"an option of an executor is NAME\.KEY=VALUE"):
            parse_options([text])
    with pytest.raises(RequestError, match=r"^npu\.a is given twice$"):
        parse_options(["npu.a=1", "npu.a=2"])
