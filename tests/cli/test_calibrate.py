"""``pi2rt calibrate``, and ``--sparsity`` with what it wrote."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from pi2rt.formats.pack import PackFile
from pi2rt.tools import calibrate
from tests.cli.conftest import Run
from tests.support.real_model import smollm2
from tests.support.tiny_models import TinyModel, write_gguf

TEXT = "The cat sat on the mat, and then it went to see what the others were doing. " * 16
FEW = ("--tokens", "512", "--held-out", "512")


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text(TEXT * 4)
    return str(tmp_path / "text.txt")


@pytest.fixture
def packs(tmp_path: Path, pi2rt: Run) -> dict[str, str]:
    """Of a SiLU model by neuron, of the same without, and of a ReLU model without and with its gates among its
    neurons."""
    made = {}
    for name, config, bundles in (
        ("silu", {}, "all"),
        ("dense", {}, "relu"),
        ("relu", {"hidden_act": "relu"}, "relu"),
        ("gates", {"hidden_act": "relu"}, "gates"),
    ):
        source = tmp_path / f"{name}.gguf"
        write_gguf(source, TinyModel(seed=3, context=1024, config=config), weight_type="Q4_0")
        made[name] = str(tmp_path / f"{name}.pi2")
        assert pi2rt("convert", str(source), made[name], "--bundles", bundles).status == 0
    return made


def test_calibrate_and_run(pi2rt: Run, packs: dict[str, str], text: str) -> None:
    pack = packs["silu"]
    done = pi2rt("calibrate", pack, text, "--resting", "0.4", *FEW)
    assert (done.status, done.errors) == (0, "")
    lines = done.output.splitlines()
    assert lines[0].split()[:3] == ["layer", "neurons", "fire"]
    assert [line.split()[:3] for line in lines[1:4]] == [[str(i), "96", "100.0%"] for i in range(3)]
    assert lines[4].split()[:4] == ["layer", "reads", "per", "token:"]
    assert [line.split()[0] for line in lines[5:8]] == ["0", "1", "2"]
    assert re.match(r"order: [+-][\d.]+% reads per token with nothing in memory, ", lines[8])
    del lines[4:9]
    assert re.fullmatch(r"exact: perplexity [\d.]+ over 255 held-out tokens", lines[4])
    for line, method in zip(lines[5:7], ("cats", "chess"), strict=True):
        assert re.fullmatch(
            rf"{method}: (39|40|41)\.\d% of neurons are inactive, perplexity [\d.]+ \([+-][\d.]+%\)(, used by .*)?",
            line,
        )
    assert done.output.count("used by --sparsity thresholded") == 1
    assert lines[7].startswith(f"{pack}.calibration: ")
    exact = pi2rt("run", pack, "-p", "Hello", "-n", "8", "--ignore-eos")
    lossy = pi2rt("run", pack, "-p", "Hello", "-n", "8", "--ignore-eos", "--sparsity", "thresholded")
    assert (exact.status, lossy.status) == (0, 0)
    assert exact.output != lossy.output
    assert "lossy" not in exact.errors
    assert re.search(
        r"^pi2rt: lossy: thresholded \((cats|chess): \d+% of neurons are inactive, perplexity [+-]\d+\.\d% on held-out "
        r"text\)$",
        lossy.errors,
        re.MULTILINE,
    )


def test_experts_are_calibrated_each_by_itself(pi2rt: Run, tmp_path: Path, text: str) -> None:
    model = TinyModel("mixtral", seed=4, context=1024, config={"hidden_act": "relu"})
    source, pack = tmp_path / "m.gguf", str(tmp_path / "m.pi2")
    write_gguf(source, model, weight_type="Q4_0")
    assert pi2rt("convert", str(source), pack, "--bundles", "gates").status == 0
    done = pi2rt("calibrate", pack, text, "--json", "--resting", "0.7", *FEW)
    assert (done.status, done.errors) == (0, "")
    found = json.loads(done.output)
    with PackFile(pack) as file:
        assert [block["down"] for block in found["blocks"]] == list(file.bundles)
    assert len(found["blocks"]) > 2 * model.layers
    chosen = sum(block["tokens"] for block in found["blocks"])
    assert chosen == found["tokens"] * model.layers * 2  # two experts for each token
    asked = {block["tokens"] >= 64: block["predictor"]["asked"] for block in found["blocks"]}
    assert asked[True] < 1
    assert asked.get(False, 1) == 1  # too little is known of those
    assert 0 < found["predicted"]["not_read"] < 1
    table = pi2rt("calibrate", pack, text, "--force", *FEW)
    assert table.output.splitlines()[0].split()[:3] == ["layer", "expert", "neurons"]
    for mode in "thresholded", "predicted":
        lossy = pi2rt("run", pack, "-p", "Hello", "-n", "8", "--ignore-eos", "--sparsity", mode)
        assert lossy.status == 0
        assert f"lossy: {mode}" in lossy.errors
    # an order of each expert's own, and text that does not depend on it
    ordered = str(tmp_path / "o.pi2")
    assert pi2rt("convert", str(source), ordered, "--calibration", f"{pack}.calibration").status == 0
    texts = {pi2rt("run", each, "-p", "Hello", "-n", "8", "--ignore-eos").output for each in (pack, ordered)}
    assert len(texts) == 1


def test_predictors_that_have_no_room_are_refused_before_the_work(
    pi2rt: Run, packs: dict[str, str], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "MAX_BYTES", 10_000)
    done = pi2rt("calibrate", packs["gates"], text, *FEW)
    assert (done.status, done.output) == (2, "")
    assert re.search(
        r"rank=16: the predictors of 3 blocks would take 0 MiB, .* a rank of \d+ or less", done.errors
    )


def test_json_and_what_perplexity_measures(
    pi2rt: Run, packs: dict[str, str], text: str, tmp_path: Path
) -> None:
    pack, file = packs["silu"], str(tmp_path / "elsewhere")
    done = pi2rt("calibrate", pack, text, "--json", "--output", file, *FEW)
    found = json.loads(done.output)
    assert (found["wanted"], found["tokens"], found["scored_tokens"]) == (0.5, 512, 255)
    assert [block["layer"] for block in found["blocks"]] == [0, 1, 2]
    assert set(found["methods"]) == {"cats", "chess"}
    assert found["method"] == min(found["methods"], key=lambda name: found["methods"][name]["perplexity"])
    for block in found["blocks"]:
        for each in block["methods"].values():
            assert abs(each["resting"] - 0.5) < 0.05
            assert 0.1 < each["hottest_tenth"] <= 1
    exact = json.loads(pi2rt("perplexity", pack, text, "--json").output)
    options = ("--json", "--sparsity", "thresholded", "--calibration", file)
    lossy = json.loads(pi2rt("perplexity", pack, text, *options).output)
    assert exact["perplexity"] != lossy["perplexity"]
    bench = pi2rt("bench", pack, "--prefill", "32", "--decode", "8", "--repeat", "1", *options)
    assert json.loads(bench.output)["sparsity"].startswith(
        f"thresholded ({found['method']}: 50% of neurons are inactive"
    )


def test_a_relu_model(pi2rt: Run, packs: dict[str, str], text: str) -> None:
    """Half of its neurons are inactive by themselves: asked for less, thresholds are zero, and there is nothing to
    switch on."""
    done = pi2rt("calibrate", packs["relu"], text, "--resting", "0.2", "--json", *FEW)
    found = json.loads(done.output)
    assert all(0.3 < block["firing"] < 0.7 for block in found["blocks"])
    assert [each["perplexity_increase"] for each in found["methods"].values()] == [0, 0]
    done = pi2rt("run", packs["relu"], "-p", "Hi", "--sparsity", "thresholded")
    assert done.status == 2
    assert "are all zero, so that it would do nothing" in done.errors
    assert pi2rt("calibrate", packs["relu"], text, "--resting", "0.8", "--force", *FEW).status == 0
    done = pi2rt("run", packs["relu"], "-p", "Hi", "-n", "4", "--ignore-eos", "--sparsity", "thresholded")
    assert done.status == 0
    assert "80% of neurons are inactive" in done.errors


def test_an_order(pi2rt: Run, tmp_path: Path, text: str) -> None:
    """On a text that repeats itself, neurons that are active together lie together; the text made stays."""
    model = TinyModel("llama", seed=3, dim=2560, hidden=544, layers=2, heads=2, kv_heads=1, head_dim=64, context=1024,
                      config={"hidden_act": "relu"})  # fmt: skip
    source, plain, ordered = (str(tmp_path / name) for name in ("m.gguf", "plain.pi2", "ordered.pi2"))
    write_gguf(Path(source), model, weight_type="Q4_0")
    assert pi2rt("convert", source, plain).status == 0
    found = json.loads(pi2rt("calibrate", plain, text, "--json", *FEW).output)
    kinds = ("own", "ordered", "own_half", "ordered_half")
    assert (found["order"]["blocks"], found["order"]["gap_bytes"]) == (2, 16384)
    for kind in kinds:
        for key in ("pages", "reads", "reads_through_gaps"):
            total = sum(block["reading"][kind][key] for block in found["blocks"])
            assert found["order"][kind][key] == pytest.approx(total)
    before, after = found["order"]["own"], found["order"]["ordered"]
    assert after["pages"] == before["pages"]  # a neuron is a page
    assert after["reads_through_gaps"] < after["reads"] < 0.7 * before["reads"]
    assert found["order"]["ordered_half"]["reads"] < found["order"]["own_half"]["reads"]
    calibration = f"{plain}.calibration"
    keep = ("--dense-above", "0.99")  # all blocks by neuron
    assert pi2rt("convert", source, ordered, "--calibration", calibration, *keep).status == 0
    assert pi2rt("verify", ordered).output == f"{ordered}: whole\n"
    run = ("-p", "Hello", "-n", "12", "--ignore-eos", "--memory", "1G", "--cache", "off")
    expected = pi2rt("run", plain, *run)
    assert expected.status == 0
    for more in ((), ("--read-through", "16K"), ("--read-through", "16K", "--io", "preadv")):
        assert pi2rt("run", ordered, *run, *more).output == expected.output
    options = (
        "--prefill",
        "32",
        "--decode",
        "16",
        "--repeat",
        "1",
        "--json",
        *run[5:],
        "--read-through",
        "16K",
    )
    bench = json.loads(pi2rt("bench", ordered, *options).output)
    assert bench["read_through_bytes_per_token"] == pytest.approx(4096 * bench["read_through_per_token"])
    assert bench["read_through_per_token"] > 0
    # what is found of an ordered pack is of the same neurons, and beside the order that is there it gains nothing
    again = json.loads(pi2rt("calibrate", ordered, text, "--json", *FEW).output)
    assert again["order"]["own"] == again["order"]["ordered"] == found["order"]["ordered"]
    assert again["order"]["blocks"] == 0
    cases = [
        (
            ("--calibration", f"{ordered}.calibration"),
            "has no order of neurons, and no block whose neurons are rarely inactive",
        ),
        (("--calibration", calibration, "--bundles", "off"), "is not stored by neuron (--bundles off)"),
        (("--calibration", plain), "magic: is b'PI2\\x00PACK'"),
        (("--calibration", str(tmp_path / "absent")), "cannot be opened"),
    ]
    for arguments, message in cases:
        done = pi2rt("convert", source, str(tmp_path / "x.pi2"), *arguments, *keep)
        assert (done.status, done.output) == (2, ""), arguments
        assert message in done.errors
    other = str(write_gguf(tmp_path / "other.gguf", replace(model, seed=4), weight_type="Q4_0"))
    done = pi2rt("convert", other, str(tmp_path / "x.pi2"), "--calibration", calibration)
    assert (done.status, done.output) == (2, "")
    assert f"{calibration}: is of another model than {other}; calibrate again" in done.errors
    assert sorted(path.name for path in tmp_path.iterdir() if "x.pi2" in path.name) == []


def test_blocks_whose_neurons_are_rarely_inactive(pi2rt: Run, tmp_path: Path, text: str) -> None:
    """They stay whole matrices, and the text made stays, too."""
    model = TinyModel("llama", seed=3, dim=544, hidden=1056, layers=2, heads=2, kv_heads=1, head_dim=64, context=1024,
                      config={"hidden_act": "relu"})  # fmt: skip
    source, plain, dense = (str(tmp_path / name) for name in ("m.gguf", "plain.pi2", "dense.pi2"))
    write_gguf(Path(source), model, weight_type="Q4_0")
    assert pi2rt("convert", source, plain).status == 0
    found = json.loads(pi2rt("calibrate", plain, text, "--json", *FEW).output)
    few, many = sorted(block["firing"] for block in found["blocks"])
    given = ("--calibration", f"{plain}.calibration", "--dense-above")
    done = pi2rt("convert", source, dense, *given, str((few + many) / 2))
    assert done.output.startswith(
        f"feed-forward blocks that stay whole: 1; {many:.0%} to {many:.0%} of their neurons"
    )
    with PackFile(Path(plain)) as before, PackFile(Path(dense)) as after:
        assert (len(before.bundles), len(after.bundles)) == (2, 1)
    assert pi2rt("verify", dense).status == 0
    run = ("-p", "Hello", "-n", "12", "--ignore-eos")
    assert pi2rt("run", dense, *run).output == pi2rt("run", plain, *run).output != ""
    done = pi2rt("convert", source, dense, "--force", *given[:2])  # measured on this machine
    assert done.status == 0 or "it would change nothing" in done.errors
    done = pi2rt("convert", source, dense, "--force", "--dense-above", "0.5")
    assert (done.status, done.output) == (2, "")
    assert "--dense-above needs a --calibration" in done.errors


def test_predicted(pi2rt: Run, packs: dict[str, str], text: str) -> None:
    """A predictor of full rank names the active neurons and hardly any other; one of rank 1 names nearly all, or says
    so."""
    run = ("run", packs["gates"], "-p", "Hello", "-n", "12", "--ignore-eos")
    exact = pi2rt("run", packs["relu"], *run[2:])
    assert pi2rt(*run).output == exact.output
    found = {}
    for rank in (64, 1):
        done = pi2rt("calibrate", packs["gates"], text, "--rank", str(rank), "--force", "--json", *FEW)
        found[rank] = json.loads(done.output)
        for block in found[rank]["blocks"]:
            each = block["predictor"]
            assert each["rank"] == rank
            assert each["bytes"] == 2 * rank * (64 + 96) + 4 * 96
            assert each["asked"] == pytest.approx(block["firing"] / each["precision"], rel=0.15)
        assert found[rank]["predicted"]["not_read"] == pytest.approx(
            1 - sum(block["predictor"]["asked"] for block in found[rank]["blocks"]) / 3
        )
        if rank == 64:
            done = pi2rt(*run, "--sparsity", "predicted")
            assert done.status == 0
            assert re.search(
                r"^pi2rt: lossy: predicted: \d+% of neurons are not read, perplexity [+-]\d+\.\d% on held-out text$",
                done.errors,
                re.MULTILINE,
            )
            assert done.output == exact.output
    for full, low in zip(found[64]["blocks"], found[1]["blocks"], strict=True):
        assert full["predictor"]["recall"] > 0.99
        assert full["predictor"]["precision"] > 0.95 > low["predictor"]["precision"]
    assert abs(found[64]["predicted"]["perplexity_increase"]) < 0.01
    done = pi2rt("calibrate", packs["gates"], text, "--recall", "0.5", "--rank", "1", "--force", *FEW)
    assert "the recall of 3 of 3 predictors is below 98 %" in done.output
    assert re.search(r"^predicted: \d+\.\d% of neurons are not read, perplexity", done.output, re.MULTILINE)


def test_mistakes(pi2rt: Run, packs: dict[str, str], text: str, model: str, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    (tmp_path / "damaged").write_bytes(b"PI2\0CALI" + bytes(100))
    thresholded = ("-p", "Hi", "--sparsity", "thresholded")
    predicted = ("-p", "Hi", "--sparsity", "predicted")
    phases = ("-p", "Hi", "--two-phase", "on")
    assert pi2rt("calibrate", packs["relu"], text, *FEW).status == 0
    without = ("--calibration", f"{packs['relu']}.calibration")
    cases = [
        (("calibrate", model, text), "that takes a pack whose feed-forward blocks are stored by neuron"),
        (("calibrate", packs["dense"], text), "convert the model with --bundles all"),
        (("calibrate", packs["silu"], str(short)), "the text is too short: it has 0 chunks of 512 tokens"),
        (("calibrate", packs["silu"], "absent"), "cannot read absent: No such file"),
        (("calibrate", packs["silu"], text, "--resting", "1"), "'1' is not a share above 0 and below 1"),
        (("calibrate", packs["silu"], text, "--resting", "half"), "'half' is not a share"),
        (("calibrate", packs["silu"], text, "--tokens", "8"), "tokens=8: at least one chunk of 512"),
        (("calibrate", packs["silu"], text, "--output", str(short)), "short.txt is there already"),
        (("calibrate", packs["silu"], text, "--output", "no/where"), "its folder does not exist"),
        (("run", packs["silu"], *thresholded), "there is no calibration"),
        (("run", packs["dense"], *thresholded), "convert the model with --bundles all"),
        (("run", model, *thresholded), "convert the model with --bundles all"),
        (("run", packs["silu"], *thresholded, "--calibration", str(tmp_path / "damaged")), "version: is 0"),
        (
            ("run", packs["silu"], "-p", "Hi", "--calibration", "x"),
            "nothing of it is used with sparsity='exact'",
        ),
        (("run", packs["dense"], *predicted), "convert the model with --bundles all"),
        (("run", packs["gates"], *predicted), "there is no calibration"),
        (("run", packs["gates"], *predicted, *without), "has no predictors, for its gates were in memory"),
        (("run", packs["gates"], *phases), "takes a memory budget"),
        (
            ("run", packs["gates"], *phases, "--memory", "1G"),
            "one sector (convert --bundles gates); those of this pack have 4096 bytes",
        ),
        (("run", packs["relu"], *predicted), "are in memory, and say exactly which are active"),
        (("calibrate", packs["gates"], text, "--recall", "2"), "'2' is not a share above 0 and below 1"),
        (("calibrate", packs["gates"], text, "--rank", "0"), "'0' is not an integer of at least 1"),
        (("convert", model, str(tmp_path / "x.pi2"), "--bundles", "all"), "leave out --bundles all"),
        (("convert", model, str(tmp_path / "x.pi2"), "--bundles", "gates"), "leave out --bundles gates"),
        (("run", packs["silu"], "-p", "Hi", "--sparsity", "some"), "invalid choice: 'some'"),
    ]
    for arguments, message in cases:
        done = pi2rt(*arguments)
        assert (done.status, done.output) == (2, ""), arguments
        assert message in done.errors
        assert done.errors.count("\n") == 1


def test_what_is_there_is_not_overwritten_unasked(pi2rt: Run, packs: dict[str, str], text: str) -> None:
    kept = Path(f"{packs['silu']}.calibration")
    kept.write_text("mine")
    done = pi2rt("calibrate", packs["silu"], text, *FEW)
    assert (done.status, kept.read_text()) == (2, "mine")
    assert "is there already; remove it, or ask for it to be overwritten (--force)" in done.errors


@pytest.mark.slow
def test_the_more_are_inactive_the_more_it_costs(pi2rt: Run, tmp_path: Path) -> None:
    """On SmolLM2, whose words mean something. CHESS costs less than CATS, and both what others have found."""
    text = Path(__file__).parent.parent / "golden" / "text.txt"
    pack = str(tmp_path / "m.pi2")
    assert pi2rt("convert", str(smollm2()), pack, "--bundles", "all").status == 0
    costs = []
    for share in ("0.1", "0.3", "0.5"):
        done = pi2rt("calibrate", pack, str(text), "--resting", share, "--json", "--force", *FEW)
        methods = json.loads(done.output)["methods"]
        costs.append([methods[name]["perplexity_increase"] for name in ("cats", "chess")])
    cats, chess = zip(*costs, strict=True)
    assert -0.02 < cats[0] < cats[1] < cats[2] < 0.5
    assert -0.02 < chess[0] < chess[1] < chess[2] < cats[2]
    assert cats[2] > 0.1
