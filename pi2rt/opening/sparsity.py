"""Which neurons of a model are inactive beyond those that are zero, as a runtime is opened: lossy, so never by
itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pi2rt._errors import RequestError
from pi2rt.formats import ModelFile
from pi2rt.formats.calibration import Calibration, calibration_path, read_calibration
from pi2rt.formats.pack import PackFile
from pi2rt.formats.predictor import StoredPredictors
from pi2rt.formats.regular_file import file_mode
from pi2rt.opening.options import RuntimeOptions
from pi2rt.runtime.step import Floats


@dataclass(frozen=True, slots=True)
class Lossy:
    """``thresholds``, ``predictors``: as ``ExecutorOptions`` has them; ``label``: what the mode leaves out and
    costs, for people."""

    label: str
    thresholds: Mapping[str, Floats] = field(default_factory=dict)
    predictors: StoredPredictors | None = None


def load_sparsity(file: ModelFile, chosen: RuntimeOptions) -> Lossy | None:
    """What a mode other than exact needs; None for exact. Reads a file: for a worker thread.

    Raises:
        RequestError: the mode would do nothing, or there is no calibration.
        ModelFormatError: the calibration is malformed, or of another model.
    """
    if chosen.sparsity == "exact":
        return None
    pack = calibratable(file, f"sparsity={chosen.sparsity!r}")
    path = calibration_path(pack.path) if chosen.calibration is None else Path(chosen.calibration)
    if not file_mode(path):
        raise RequestError(
            f"sparsity={chosen.sparsity!r}: there is no calibration {path}; make one with 'pi2rt calibrate'"
        )
    calibration = read_calibration(path, pack)
    if chosen.sparsity == "predicted":
        return _predicted(pack, path, calibration)
    thresholds = calibration.thresholds()
    if calibration.does_nothing(calibration.method):
        raise RequestError(
            f"sparsity={chosen.sparsity!r}: the thresholds of {path} are all zero, so that it would do nothing; more "
            f"neurons than were asked for are inactive already"
        )
    return Lossy(f"thresholded ({calibration.summary(calibration.method)})", thresholds=thresholds)


def _predicted(pack: PackFile, path: Path, calibration: Calibration) -> Lossy:
    wanted = {name for name, each in pack.bundles.items() if each.gate is not None}
    if not wanted:
        raise RequestError(
            f"sparsity='predicted': the gates of {pack.path} are in memory, and say exactly which are active; convert "
            f"the model with --bundles gates for memory that is too small for gates"
        )
    known = {block.down for block in calibration.blocks if block.predictor is not None}
    if wanted - known or calibration.predicted is None:
        raise RequestError(
            f"sparsity='predicted': {path} has no predictors, for its gates were in memory; calibrate this pack"
        )
    return Lossy(calibration.summary("predicted"), predictors=calibration.predictors(path, wanted))


def calibratable(file: ModelFile, what: str) -> PackFile:
    """The file as a pack with neurons stored one by one, without which no neuron can be skipped.

    Raises:
        RequestError: it is none; ``what`` asked for it.
    """
    if not isinstance(file, PackFile) or not file.bundles:
        raise RequestError(
            f"{what}: that takes a pack whose feed-forward blocks are stored by neuron, and {file.path} is none; "
            f"convert the model with --bundles all"
        )
    return file
