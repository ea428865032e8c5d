"""What ``pi2rt bench`` reports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pi2rt.cli.bench import bytes_per_token
from pi2rt.formats import open_model_file
from tests.cli.conftest import Run
from tests.support.tiny_models import TinyModel, write_gguf

ARGUMENTS = ("--prefill", "40", "--decode", "8", "--repeat", "3", "--threads", "1")


def test_bench_json(pi2rt: Run, model: str) -> None:
    done = pi2rt("bench", model, *ARGUMENTS, "--json", "--kernels", "scalar")
    assert (done.status, done.errors) == (0, "")
    found = json.loads(done.output)
    assert (found["repeats"], found["executor"], found["kernels"]) == (3, "cpu", "scalar")
    assert (found["prefill_tokens"], found["decode_tokens"], found["threads"]) == (40, 8, 1)
    assert found["prefill_tokens_per_s"] > 0
    assert found["ttft_ms"] > 0
    assert found["decode_tokens_per_s"] > 0
    assert found["memory_bandwidth_bytes_per_s"] > 1e8
    bound = found["bytes_per_token"] / found["memory_bandwidth_bytes_per_s"]
    assert found["efficiency"] == pytest.approx(bound * found["decode_tokens_per_s"])
    assert (found["misses_per_token_mean"], found["flash_reads_per_s"]) == (0, 0)
    assert 0 <= found["runtime_overhead_fraction"] < 1
    assert found["load_s"] > 0
    assert found["peak_rss_bytes"] > 10_000_000


def test_bench_of_a_model_larger_than_memory(pi2rt: Run, tmp_path: Path) -> None:
    shape = TinyModel("llama", seed=1, dim=512, hidden=4096, layers=4, heads=8, kv_heads=2, head_dim=64,
                      config={"hidden_act": "drelu"})  # fmt: skip
    source = write_gguf(tmp_path / "m.gguf", shape, weight_type="Q4_0")
    assert pi2rt("convert", str(source), str(tmp_path / "m.pi2")).status == 0
    memory = ("--memory", "4G", "--cache", "2M")  # whatever other tests have left in this process
    done = pi2rt("bench", str(tmp_path / "m.pi2"), *ARGUMENTS, *memory, "--json")
    assert (done.status, done.errors) == (0, "")
    found = json.loads(done.output)
    assert 0 < found["misses_per_token_mean"] <= found["misses_per_token_p99"]
    assert found["missed_bytes_per_token_mean"] == pytest.approx(4096 * found["misses_per_token_mean"])
    assert found["needed_reads_per_token"] <= found["misses_per_token_mean"]
    assert found["bytes_per_token"] > bytes_per_token(str(tmp_path / "m.pi2"))
    bound = max(
        found["bytes_per_token"] / found["memory_bandwidth_bytes_per_s"],
        found["needed_reads_per_token"] / found["flash_reads_per_s"],
    )
    assert found["bound_ms_per_token"] == pytest.approx(1000 * bound, rel=1e-3)
    assert found["efficiency"] == pytest.approx(bound * found["decode_tokens_per_s"], rel=1e-3)
    for_people = pi2rt("bench", str(tmp_path / "m.pi2"), *ARGUMENTS, *memory)
    assert "neurons missing per token: mean " in for_people.output
    assert "of what memory and flash allow" in for_people.output


def test_bench_for_people(pi2rt: Run, model: str) -> None:
    done = pi2rt("bench", model, *ARGUMENTS, "--executor", "reference")
    assert (done.status, done.errors) == (0, "")
    for words in (
        "prefill of 40 tokens: ",
        "decode of 8 tokens: ",
        "% of what memory allows",
        "outside kernels: ",
    ):
        assert words in done.output


@pytest.mark.parametrize("tied", [True, False])
def test_bytes_per_token_counts_an_embedding_only_where_it_is_the_head(tmp_path: Path, tied: bool) -> None:
    model = TinyModel(config={"tie_word_embeddings": tied})
    path = write_gguf(tmp_path / "m.gguf", model)
    with open_model_file(path) as file:
        tensors = {name: tensor.nbytes for name, tensor in file.tensors.items()}
    embedding = tensors.pop("token_embd.weight")
    expected = sum(tensors.values()) + (embedding if tied else 4 * model.dim)
    assert bytes_per_token(str(path)) == expected
