"""``pi2rt plan`` and ``pi2rt run --plan``."""

from __future__ import annotations

import json
from pathlib import Path

from pi2rt.formats.plan import read_plan
from tests.cli.conftest import Run


def test_plan_writes_what_run_uses(pi2rt: Run, model: str, tmp_path: Path) -> None:
    file = str(tmp_path / "plan.json")
    assert pi2rt("plan", model, "--context", "256", "--kv", "q8", "-o", file).status == 0
    plain = pi2rt("run", model, "--context", "256", "--kv", "q8", "-p", "Once", "--raw", "-n", "8")
    planned = pi2rt("run", model, "--plan", file, "-p", "Once", "--raw", "-n", "8")
    assert (planned.status, planned.output) == (0, plain.output)
    assert read_plan(file).choices.kv_type == "q8"


def test_plan_prints_to_standard_output(pi2rt: Run, model: str) -> None:
    done = pi2rt("plan", model, "--context", "256", "--sequences", "3")
    choices = json.loads(done.output)["choices"]
    assert (choices["context"], choices["max_sequences"]) == (256, 3)


def test_show_tells_and_draws(pi2rt: Run, model: str, tmp_path: Path) -> None:
    file, picture = str(tmp_path / "plan.json"), tmp_path / "plan.svg"
    assert pi2rt("plan", model, "--context", "256", "--prefill-lane", "reference", "-o", file).status == 0
    done = pi2rt("plan", "show", file, "--svg", str(picture))
    assert done.status == 0
    lines = [line.split(maxsplit=1) for line in done.output.splitlines()]
    assert {
        "model",
        "memory",
        "precision",
        "unit",
        "lane",
        "placements",
        "segment",
        "KV",
        "edge",
        "prediction",
    } == {line[0] for line in lines}
    assert (
        "reference: prompts of 64 tokens or more, all but the last; executor reference, units" in done.output
    )
    assert "KV pages     4\n" in done.output
    assert "reference -> cpu: sequence (state store, 1 at once)" in done.output
    assert picture.read_text().startswith("<svg ")


def test_options_of_executors(pi2rt: Run, model: str, tmp_path: Path) -> None:
    file = str(tmp_path / "plan.json")
    chosen = ("--executor", "simulated", "--executor-option", "simulated.max_in_flight=7")
    assert pi2rt("plan", model, "--context", "256", *chosen, "-o", file).status == 0
    plan = read_plan(file)
    assert plan.lanes[0].in_flight == 7
    assert plan.choices.executor_options == {"simulated": {"max_in_flight": "7"}}
    done = pi2rt(
        "run", model, "--plan", file, "-p", "Once", "--raw", "-n", "8", "--ignore-eos", "--temperature", "0"
    )
    assert done.status == 0
    for option, message in (
        ("simulated.speed=1", "simulated.speed: 'simulated' has no such option; there are: max_in_flight, name"),
        ("npu.device=GPU", "executor_options of 'npu': the plan has no such executor or cluster unit; it has"),
        ("device=GPU", "'device=GPU': an option of an executor is NAME.KEY=VALUE"),
    ):  # fmt: skip
        done = pi2rt("plan", model, *chosen[:2], "--executor-option", option)
        assert done.status == 2
        assert message in done.errors
    done = pi2rt("run", model, "--plan", file, "--executor-option", "simulated.max_in_flight=3", "-p", "x")
    assert done.status == 2
    assert "contradicts the plan" in done.errors


def test_mistakes(pi2rt: Run, model: str, tmp_path: Path) -> None:
    file = str(tmp_path / "plan.json")
    assert pi2rt("plan", model, "--context", "256", "-o", file).status == 0
    for arguments, message in (
        (("plan", "show"), "plan show: the file of a plan is needed"),
        (("plan", model, file), f"{file!r}: a FILE follows only on 'plan show'"),
        (("plan", "show", file, "-o", file), "plan show prints a plan that is there; -o writes a new one"),
        (("plan", "show", model), "the JSON"),
        (
            ("run", model, "--plan", file, "--kv", "q8", "-p", "x"),
            "kv_type='q8' contradicts the plan, which has 'f16'",
        ),
        (("run", model, "--plan", file, "--context", "128", "-p", "x"), "context=128 contradicts the plan"),
        (("plan", model, "--prefill-lane", "nobody"), "no executor 'nobody'"),
    ):
        done = pi2rt(*arguments)
        assert done.status == 2, arguments
        assert done.errors.startswith("pi2rt: error: "), arguments
        if message != "the JSON":
            assert message in done.errors
