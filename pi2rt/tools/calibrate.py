"""``calibrate``: from a pack and some text to the thresholds below which neurons are inactive, and what they cost."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, Unpack

import msgspec
import numpy as np
import trio

from pi2rt import catalogue
from pi2rt._errors import RequestError
from pi2rt.api.runtime import open_runtime
from pi2rt.executors.cpu.layer_walk import Factors, walk
from pi2rt.formats import open_model_file
from pi2rt.formats.calibration import (
    MAX_BYTES,
    METHODS,
    BlockCalibration,
    Calibration,
    Cost,
    Method,
    calibration_path,
    write_calibration,
)
from pi2rt.formats.neuron_order import bundle_order, encode_order
from pi2rt.formats.pack import PackFile
from pi2rt.formats.predictor import PredictorRecord
from pi2rt.host.output_file import OutputFile
from pi2rt.models import FeedForward, ModelDescription, describe
from pi2rt.opening.options import RuntimeKeywords
from pi2rt.opening.sparsity import calibratable
from pi2rt.planner.learn.coactivation import find_order
from pi2rt.planner.learn.predictors import ask_for_all, default_rank, measure, train
from pi2rt.planner.learn.thresholds import Activations, calibrate_block, exact_block
from pi2rt.planner.pack.bundling import rests
from pi2rt.runtime.step import Floats
from pi2rt.tokenizer import load_tokenizer
from pi2rt.tools.perplexity import Perplexity, cut, perplexity

Progress: TypeAlias = Callable[[str, int, int], None]
"""``progress(stage, done, total)``."""

MOST_PERPLEXITY = 1e30

LEAST_TOKENS = 64
"""Of an expert that fewer tokens have chosen, all neurons are asked for: too little is known to predict them."""

GAP_BYTES = 16 << 10
"""Of gaps, what is told of orders: a device that gives 50,000 reads/s and 1 GB/s breaks even at 20 KB."""


@dataclass(frozen=True, slots=True)
class Sample:
    """How much of a text is used, in tokens: ``tokens`` of its beginning for statistics, ``held_out`` of its end for
    measuring, both in chunks of ``chunk``. A short text is divided 2 : 1."""

    tokens: int = 4096
    held_out: int = 2048
    chunk: int = 512

    def __post_init__(self) -> None:
        for name in ("tokens", "held_out"):
            if getattr(self, name) < self.chunk:
                raise RequestError(
                    f"{name}={getattr(self, name)}: at least one chunk of {self.chunk} is needed"
                )
        if self.chunk < 4:
            raise RequestError(f"chunk={self.chunk}: at least 4 tokens are needed")

    def divide(self, chunks: Sequence[list[int]]) -> tuple[Sequence[list[int]], Sequence[list[int]]]:
        """Chunks of the whole text to those for statistics and those held out.

        Raises:
            RequestError: there are fewer than two.
        """
        if len(chunks) < 2:
            raise RequestError(
                f"the text is too short: it has {len(chunks)} chunks of {self.chunk} tokens; at least 2 are needed"
            )
        held_out = min(self.held_out // self.chunk, max(1, len(chunks) // 3))
        rest = chunks[: len(chunks) - held_out]
        return rest[: self.tokens // self.chunk], chunks[len(chunks) - held_out :]


async def calibrate(
    model: str | os.PathLike[str],
    text: str,
    *,
    resting: float = 0.5,
    recall: float = 0.98,
    rank: int | None = None,
    output: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    sample: Sample | None = None,
    progress: Progress | None = None,
    **options: Unpack[RuntimeKeywords],
) -> Calibration:
    """Finds thresholds for ``sparsity="thresholded"`` by every method, measures the perplexity with each on text
    that was not used for them, and an order of bundles in which neurons that are active together lie together (for
    ``convert(calibration=)``), and writes the calibration file.

    Statistics are collected in numpy, one block of the model at a time, whose float32 weights are in memory then
    beside a few numbers for each token; measured is with the cpu executor.

    Args:
        model: a pack whose feed-forward blocks are stored by neuron (``pi2rt convert --bundles all``).
        text: what the model is for; other text may cost more.
        resting: the share of neurons that are to be inactive, above 0 and below 1.
        recall: the share of active neurons that predictors are to name, above 0 and below 1; they are made where gates
            are in the bundles (``pi2rt convert --bundles gates``).
        rank: of predictors; None: a sixteenth of the model's width.
        output: the file to write; None: beside the pack, where ``open_runtime`` looks for it.
        overwrite: whether a file that is there already may be replaced.
        sample: how much of the text is used.
        progress: called between pieces of the work, from this task.
        options: of ``open_runtime``, for measuring: threads, memory and so on.

    Returns:
        What was written. Its ``method`` is the one with the lower perplexity.

    Raises:
        RequestError: the model is no such pack, the text is too short, or the output cannot be written to.
        OutputError: writing failed, such as for a full disk.
        Others: as ``open_runtime``.
    """
    if not 0 < resting < 1:
        raise RequestError(f"resting={resting!r}: a share above 0 and below 1 is needed")
    if not 0 < recall < 1:
        raise RequestError(f"recall={recall!r}: a share above 0 and below 1 is needed")
    if rank is not None and not 1 <= rank <= 1 << 16:
        raise RequestError(f"rank={rank!r}: an integer from 1 to {1 << 16} is needed")
    path = Path(catalogue.resolve(model))
    destination = calibration_path(path) if output is None else Path(output)
    written = OutputFile(destination, overwrite=overwrite)
    report, sample = progress or _ignore, sample or Sample()
    with await trio.to_thread.run_sync(open_model_file, path) as file:
        pack = calibratable(file, "calibrate")
        description = describe(pack)
        tokenizer = await trio.to_thread.run_sync(load_tokenizer, pack)
        ids = await trio.to_thread.run_sync(tokenizer.encode, text, abandon_on_cancel=True)
        size = min(sample.chunk, description.context_length)
        looked_at, held_out = sample.divide(cut(tokenizer, ids, size))
        texts = [np.array(chunk, np.int32) for chunk in looked_at]
        others = [np.array(chunk, np.int32) for chunk in held_out]
        has_gates = [name for name, each in pack.bundles.items() if each.gate is not None]
        _refuse_large(pack, default_rank(description.dim) if rank is None else rank)
        collector = _Collector(pack, description, resting, recall, rank, len(texts))

        def collect() -> tuple[BlockCalibration, ...]:
            def tell(done: int, total: int) -> None:
                trio.from_thread.check_cancelled()
                trio.from_thread.run_sync(report, "collecting", done, total)

            walk(pack, description, [*texts, *others], collector.observe, tell)
            return tuple(collector.blocks)

        blocks = await trio.to_thread.run_sync(collect)
        source = pack.source_digest

    async def measured(stage: str, **lossy: Unpack[RuntimeKeywords]) -> Perplexity:
        given: RuntimeKeywords = {**options, **lossy, "context": size, "max_sequences": 1}
        async with open_runtime(path, **given) as runtime:
            return await perplexity(runtime, held_out, lambda done, _: report(stage, done, len(held_out)))

    exact = await measured("measuring exact")
    found = Calibration(
        source=source,
        wanted=resting,
        tokens=sum(map(len, looked_at)),
        scored=exact.tokens,
        exact=_bounded(exact),
        method=METHODS[0],
        costs={method: Cost(_resting(blocks, method), 1.0) for method in METHODS},
        blocks=blocks,
        gap=GAP_BYTES,
    )
    costs: dict[Method, Cost] = {}
    with tempfile.TemporaryDirectory(prefix="pi2rt-") as folder:
        for method in METHODS:
            cost = found.costs[method]
            if found.does_nothing(method):
                costs[method] = Cost(cost.resting, found.exact)
                continue
            tried = Path(folder) / method
            write_calibration(tried, msgspec.structs.replace(found, method=method))
            cost_of = await measured(f"measuring {method}", sparsity="thresholded", calibration=tried)
            costs[method] = Cost(cost.resting, _bounded(cost_of))
        if has_gates:
            asked = _average(blocks, lambda block: 0.0 if block.predictor is None else block.predictor.asked)
            found = msgspec.structs.replace(found, predicted=Cost(1 - asked, 1.0))
            tried = Path(folder) / "predicted"
            write_calibration(tried, found)
            cost_of = await measured("measuring predicted", sparsity="predicted", calibration=tried)
            found = msgspec.structs.replace(found, predicted=Cost(1 - asked, _bounded(cost_of)))
    best = min(METHODS, key=lambda method: costs[method].perplexity)
    found = msgspec.structs.replace(found, costs=costs, method=best)
    await trio.to_thread.run_sync(write_calibration, written, found)
    return found


class _Collector:
    """Takes from each feed-forward block what its record needs. ``used``: texts for statistics; the others are held
    out, to measure predictors and orders on."""

    def __init__(
        self,
        pack: PackFile,
        model: ModelDescription,
        resting: float,
        recall: float,
        rank: int | None,
        used: int,
    ) -> None:
        self._pack, self._resting, self._recall, self._used = pack, resting, recall, used
        self._rank = default_rank(model.dim) if rank is None else rank
        self.blocks: list[BlockCalibration] = []

    def observe(
        self, layer: int, block: FeedForward, weights: Mapping[str, Floats], factors: Iterator[Factors]
    ) -> None:
        """See ``executors.layer_walk.Observer``."""
        bundles = self._pack.bundles.get(block.down.weight)
        if bundles is None:
            for _ in factors:  # later blocks need them
                pass
            return
        predicts = bundles.gate is not None
        inputs: list[Floats] = []
        products: list[Floats] = []

        def watched() -> Iterator[tuple[Floats, Floats | None]]:
            for each in factors:
                if predicts:
                    x, product = each.product()
                    inputs.append(x)
                    products.append(product)
                yield each.gate, each.up

        texts = watched()
        activations = Activations.of(itertools.islice(texts, self._used))
        name = block.down.weight
        if activations.gates:
            found = calibrate_block(layer, name, activations, self._resting)
        else:
            found = exact_block(layer, name, bundles.neurons)
        # of a block whose neurons are not inactive without thresholds, those that are active with thresholds
        least = np.zeros(1, np.float32) if rests(block) else found.vector("chess")
        held_out = np.concatenate([np.abs(gate) > least for gate, _ in texts])
        if activations.gates and len(held_out):
            order, readings = find_order(
                [gate > least for gate in activations.gates],
                held_out,
                bundle_order(bundles),
                bundles.neurons_per_page,
                GAP_BYTES // bundles.page_bytes,
            )
            found = msgspec.structs.replace(
                found, order=None if order is None else encode_order(order), readings=readings
            )
        if predicts and block.gate is not None:
            weight = weights[block.gate.weight]
            bias = None if block.gate.bias is None else weights[block.gate.bias]
            if sum(map(len, products[: self._used])) < LEAST_TOKENS:
                predictor = ask_for_all(*weight.shape)
            else:
                predictor = train(products[: self._used], weight, bias, self._rank, self._recall)
            first = (
                self._used if len(held_out) else 0
            )  # the text itself, where no other token chose this expert
            quality = measure(predictor, inputs[first:], products[first:])
            record = PredictorRecord.of(predictor, quality.recall, quality.precision, quality.asked)
            found = msgspec.structs.replace(found, predictor=record)
        self.blocks.append(found)


def _resting(blocks: Sequence[BlockCalibration], method: Method) -> float:
    """Of all blocks together."""
    return _average(blocks, lambda block: block.resting(method))


def _average(blocks: Sequence[BlockCalibration], share: Callable[[BlockCalibration], float]) -> float:
    """A share of the neurons of all blocks together, for all tokens that met them."""
    weights = [block.neurons * (1 if block.tokens is None else block.tokens) for block in blocks]
    shares = np.average([share(block) for block in blocks], weights=weights)
    return float(np.clip(shares, 0, 1))


def _bounded(found: Perplexity) -> float:
    """As a calibration has it: a model that is nothing but wrong need not be told apart from one that is worse."""
    return min(max(found.value, 1.0), MOST_PERPLEXITY)


def _refuse_large(pack: PackFile, rank: int) -> None:
    """Raises RequestError where predictors of this rank, a half of each number, have no room in a calibration."""
    gates = [pack.tensors[each.gate].shape for each in pack.bundles.values() if each.gate is not None]
    size = sum(2 * min(rank, *shape) * sum(shape) for shape in gates)
    room = MAX_BYTES * 9 // 10  # the rest is for what else it has
    if size > room:
        most = room // sum(2 * sum(shape) for shape in gates)
        raise RequestError(
            f"rank={rank}: the predictors of {len(gates)} blocks would take {size / 2**20:.0f} MiB, and a calibration "
            f"has room for {room / 2**20:.0f} MiB; a rank of {most} or less (--rank) would do"
        )


def _ignore(stage: str, done: int, total: int) -> None: ...
