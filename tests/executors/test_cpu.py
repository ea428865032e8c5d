"""The native executor: against Transformers, against the reference, and against itself cut in other ways.

Bits, not tolerances, wherever the same sums are meant: kernels add in one order whatever the batch, the chunk, the
number of threads or the instruction set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pi2rt._errors import ModelFormatError
from pi2rt.cython_kernels.kernels import native
from pi2rt.executors.cpu.executor import CpuExecutor
from pi2rt.executors.reference.executor import ReferenceExecutor
from pi2rt.formats import ModelFile, open_model_file
from pi2rt.models import ModelDescription, describe
from pi2rt.runtime.executor import ExecutorOptions, StepExecutor
from pi2rt.runtime.step import Bind, Sampling, Slice, Step
from pi2rt.runtime.trace import Trace
from pi2rt.testing import StepExecutorConformance, Tolerance
from tests.golden.compare import compare_logits, load_greedy, load_logits
from tests.support.families import FAMILIES
from tests.support.real_model import smollm2
from tests.support.running import NOTHING, all_logits, greedy, opened, page_table
from tests.support.stories260k import BOS, GOLDEN_TEXT, write_stories260k
from tests.support.tiny_models import TinyModel, write_gguf, write_huggingface

GOLDEN = Path(__file__).parent.parent / "golden" / "families.npz"
QUANTISED = TinyModel("qwen3", seed=21, dim=256, hidden=512, layers=2, heads=4, kv_heads=2, head_dim=32)
FASTEST_FIRST = [name for name, runs, _ in reversed(native.variants()) if runs]


@pytest.fixture(scope="module")
def quantised_unusable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What writes to the channel that has to be exactly zero is of types without an offset."""
    path = tmp_path_factory.mktemp("cpu") / "unusable.gguf"
    types = {"blk.0.attn_q": "Q4_K", "blk.0.ffn_up": "Q4_0", "blk.1.attn_v": "F16", "blk.1.ffn_down": "BF16"}
    return write_gguf(path, replace(QUANTISED, unusable=True), weight_type="Q8_0", types=types)


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every quantised type in one small file."""
    path = tmp_path_factory.mktemp("cpu") / "model.gguf"
    types = {
        "blk.0.attn_q": "Q4_K", "blk.0.attn_k": "Q5_K", "blk.0.attn_v": "Q6_K", "blk.0.attn_output": "Q4_1",
        "blk.0.ffn_gate": "Q5_0", "blk.0.ffn_up": "Q5_1", "blk.0.ffn_down": "Q8_0",
        "blk.1.attn_v": "F16", "blk.1.ffn_down": "BF16", "token_embd": "Q8_0",
    }  # fmt: skip
    return write_gguf(path, QUANTISED, weight_type="Q4_0", types=types)


class TestCpu(StepExecutorConformance):
    """Activations are int8 or int16 where weights are quantised."""

    models = ("quantised",)
    tolerance = Tolerance(reference=0.06)

    @pytest.fixture(autouse=True)
    def _model(self, quantised: Path, quantised_unusable: Path) -> None:
        self.path, self.unusable_path = quantised, quantised_unusable

    def make_executor(self) -> StepExecutor:
        return CpuExecutor()

    def open_model(self, name: str) -> tuple[ModelFile, ModelDescription]:
        file = open_model_file(self.path)
        return file, describe(file)

    def open_unusable_model(self) -> tuple[ModelFile, ModelDescription]:
        file = open_model_file(self.unusable_path)
        return file, describe(file)


class TestCpuWithAssistant(TestCpu):
    """Two classes of cores, int8 activations and an int8 cache."""

    options = ExecutorOptions(
        slots=4, pages=16, context=256, max_tokens=192, cores=(0,), assistants=(("little", (0,)),), kv_type="q8",
        activations="int8",
    )  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
async def test_families_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    write_huggingface(tmp_path, family.model)
    async with opened(CpuExecutor(), tmp_path, model_context=family.context) as executor:
        logits = await all_logits(executor, family.token_ids())
    with np.load(GOLDEN) as file:
        golden = file[name]
    error = np.linalg.norm(logits[family.positions] - golden) / np.linalg.norm(golden)
    assert error < 1e-4


@pytest.mark.parametrize(
    "options", [{}, {"activations": "int16"}, {"activations": "int8"}, {"kv_type": "q8"}], ids=str
)
async def test_quantised_weights_give_the_logits_of_the_reference(
    options: dict[str, Any], quantised: Path
) -> None:
    tokens = np.random.RandomState(1).randint(0, 300, 150).astype(np.int32)
    async with opened(ReferenceExecutor(), quantised) as executor:
        expected = await all_logits(executor, tokens)
    async with opened(CpuExecutor(), quantised, exact_floats=False, **options) as executor:
        logits = await all_logits(executor, tokens)
    error = np.linalg.norm(logits - expected) / np.linalg.norm(expected)
    assert error < (5e-4 if "int16" in options.values() else 0.04)


async def cut_logits(
    path: Path, tokens: npt.NDArray[np.int32], cuts: Sequence[int], **options: Any
) -> npt.NDArray[np.float32]:
    """Logits of one sequence run in steps that end at ``cuts``, each beside another sequence of odd length."""
    out = []
    async with opened(CpuExecutor(), path, **{"exact_floats": False} | options) as executor:
        binds: tuple[Bind, ...] = (Bind(0, Sampling(), NOTHING), Bind(1, Sampling(), NOTHING))
        start = 0
        for step, end in enumerate([*cuts, len(tokens)]):
            part = Slice(0, start, page_table(0), tokens[start:end], logits=True)
            other = Slice(1, 3 * step, page_table(1), tokens[:3])
            executor.submit(Step(step, (other, part), binds))
            logits = (await executor.wait()).logits[1]
            assert logits is not None
            out.append(logits)
            binds, start = (), end
    return np.concatenate(out)


@pytest.mark.parametrize("options", [{}, {"kv_type": "q8"}, {"activations": "mixed"}], ids=str)
async def test_any_chunking_and_any_batch_give_the_same_bits(
    options: dict[str, Any], quantised: Path
) -> None:
    tokens = (
        np.random.RandomState(2).randint(0, 300, 640).astype(np.int32)
    )  # three sizes of attention's splits
    async with opened(CpuExecutor(), quantised, exact_floats=False, **options) as executor:
        whole = await all_logits(executor, tokens)
    for cuts in ([1, 2, 3, 255, 256, 257, 511, 512, 513, 639], [64, 100, 577], list(range(600, 640))):
        np.testing.assert_array_equal(await cut_logits(quantised, tokens, cuts, **options), whole)


async def test_sliding_windows_survive_any_chunking(tmp_path: Path) -> None:
    model = TinyModel("mistral", seed=22, config={"sliding_window": 70, "max_position_embeddings": 1024})
    write_huggingface(tmp_path, model)
    tokens = np.random.RandomState(3).randint(0, 300, 700).astype(np.int32)
    async with opened(ReferenceExecutor(), tmp_path) as executor:
        expected = await all_logits(executor, tokens)
    whole = await cut_logits(tmp_path, tokens, [], exact_floats=True)
    np.testing.assert_allclose(whole, expected, rtol=0, atol=1e-4)
    cut = await cut_logits(tmp_path, tokens, [10, 600, 601, 699], exact_floats=True)
    np.testing.assert_array_equal(cut, whole)


@pytest.mark.parametrize("cores", [(0,), (-1, -1), (-1, -1, -1)], ids=len)
async def test_threads_do_not_change_bits(cores: tuple[int, ...], quantised: Path) -> None:
    tokens = np.random.RandomState(4).randint(0, 300, 100).astype(np.int32)
    expected = await cut_logits(quantised, tokens, [50])
    np.testing.assert_array_equal(await cut_logits(quantised, tokens, [50], cores=cores), expected)


@pytest.mark.parametrize("activations", ["int16", "mixed", "int8"])
@pytest.mark.parametrize("kernels", FASTEST_FIRST[1:])
async def test_instruction_sets_do_not_change_bits(kernels: str, activations: str, quantised: Path) -> None:
    tokens = np.random.RandomState(5).randint(0, 300, 24).astype(np.int32)
    logits = [
        await cut_logits(quantised, tokens, [20], kernels=each, activations=activations)
        for each in (FASTEST_FIRST[0], kernels)
    ]
    np.testing.assert_array_equal(logits[1], logits[0])


async def test_sampling_follows_the_reference(quantised: Path) -> None:
    prompt = np.random.RandomState(6).randint(0, 300, 12).astype(np.int32)
    for seed in range(4):
        sampling = Sampling(temperature=0.9, top_k=40, top_p=0.95, repetition_penalty=1.3, seed=seed)
        async with opened(ReferenceExecutor(), quantised) as executor:
            expected = await greedy(executor, prompt, 20, sampling=sampling)
        async with opened(CpuExecutor(), quantised) as executor:
            assert await greedy(executor, prompt, 20, sampling=sampling) == expected


async def test_stories260k_tells_the_golden_story(tmp_path: Path) -> None:
    path = write_stories260k(tmp_path / "stories.gguf")
    with open_model_file(path) as file:
        pieces = file.metadata["tokenizer.ggml.tokens"]
    async with opened(CpuExecutor(), path, context=512, exact_floats=False) as executor:
        tokens = await greedy(executor, np.array([BOS], np.int32), 80, context=512)
    text = "".join(pieces[token] for token in tokens).replace("▁", " ").removeprefix(" ")
    assert text.startswith(GOLDEN_TEXT)


@pytest.mark.parametrize(
    ("options", "error", "agreement"),
    [
        ({}, 0.01, 0.98),
        ({"exact_floats": True}, 1e-4, 1.0),
        ({"activations": "int16"}, 0.001, 0.998),
        ({"activations": "int8"}, 0.02, 0.95),
        ({"kv_type": "q8"}, 0.02, 0.97),
    ],
    ids=str,
)
async def test_smollm2_is_what_transformers_computes(
    options: dict[str, Any], error: float, agreement: float
) -> None:
    path = smollm2()
    async with opened(CpuExecutor(), path, **{"exact_floats": False} | options) as executor:
        chunks = load_logits().chunks()
        reports = [compare_logits(await all_logits(executor, chunk.tokens), chunk) for chunk in chunks]
        if options in ({"activations": "int16"}, {"exact_floats": True}):
            for text in load_greedy():
                prompt = np.array(text.prompt_tokens, np.int32)
                assert await greedy(executor, prompt, len(text.tokens), slot=1) == text.tokens
    positions = sum(report.positions for report in reports)
    assert positions >= 1000
    same = sum(report.top1_agreement * report.positions for report in reports) / positions
    mean = [
        np.mean([getattr(each, name) for each in reports]) for name in ("relative_error", "perplexity_ratio")
    ]
    print(
        f"{options}: error {mean[0]:.5%}, same likeliest token {same:.1%}, perplexity {mean[1]:+.5%}"
    )  # pytest -rP
    assert same >= agreement
    for report in reports:
        assert report.relative_error < error
        assert abs(report.perplexity_ratio) < (0.01 if "int8" in options.values() else 0.005)


async def test_a_trace_holds_every_operation_of_every_thread(quantised: Path, tmp_path: Path) -> None:
    trace = Trace()
    async with opened(
        CpuExecutor(), quantised, cores=(-1,), assistants=(("little", (-1,)),), trace=trace
    ) as executor:
        await all_logits(executor, np.arange(5, dtype=np.int32))
    assert len(trace) == 2 * (1 + 5 * QUANTISED.layers + 1)  # embed, (qkv attention out ffn down), head


async def test_statistics_name_the_actor_of_every_thread(quantised: Path) -> None:
    given = {"cores": (-1,), "assistants": (("little", (-1,)),), "actor": "big"}
    async with opened(CpuExecutor(), quantised, **given) as executor:
        await all_logits(executor, np.arange(200, dtype=np.int32))
        threads = executor.statistics().threads
    assert [(thread.actor, thread.core) for thread in threads] == [("big", -1), ("little", -1)]
    assert threads[0].kernel_ns > 0  # nobody waits for the other, which may have had nothing


async def test_weights_that_are_not_numbers_are_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", TinyModel("llama", seed=23), weight_type="F32")
    with open_model_file(path) as file:
        offset = file.tensors["blk.1.ffn_up.weight"].offset
    with path.open("r+b") as raw:
        raw.seek(offset + 4)
        raw.write(np.float32("nan").tobytes())
    with pytest.raises(ModelFormatError, match=r"blk\.1\.ffn_up\.weight: row 0 holds NaN"):
        async with opened(CpuExecutor(), path, exact_floats=False):
            pass
