"""Verifies an artifact of a module: its files, its integers, and what it gives for its samples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from device_harness.errors import DeviceError, WorkerEndedError
from device_harness.module_session import ModuleSession
from edgeforge.errors import CheckFailed
from edgeforge.modules.samples import Arrays, Sample, read_samples
from edgeforge.output_folder.whole_file import whole_file
from exporters.manifest import check_files
from exporters.modules.manifest import SAMPLES, ModuleManifest
from exporters.modules.registry import find_module_target
from quant.formats.formats import parse_format

REPORT: Final = "report.json"


@dataclass(frozen=True)
class OutputDifference:
    """How far an output is from what it should be, over all samples.

    Differences are the largest of any element, divided by the largest magnitude of the output they
    are compared with. Of whole numbers they are the share of elements that differ.

    Attributes:
        name: the output.
        quantization: of the quantized module from the float module.
        lowering: of the artifact from the quantized module; None where it was not run.
        cosine: the least cosine of the artifact's output with the float module's, over the samples;
            None where it was not run, or for whole numbers.
        total: the root mean square of the artifact's difference from the float module over that of
            the float module's output; None where it was not run.
    """

    name: str
    quantization: float
    lowering: float | None
    cosine: float | None
    total: float | None = None


@dataclass(frozen=True)
class ModuleEvaluation:
    """What verifying an artifact of a module found.

    Attributes:
        artifact: the folder.
        target: the target's name.
        samples: how many calls were compared.
        outputs: the outputs' differences.
        tolerance: the largest ``lowering`` that passes.
        integers: how many weights were read back as the store's own integers and scales.
        floats: how many quantized weights the files hold as floats.
        not_run: why the artifact was not run here; empty where it was.
    """

    artifact: str
    target: str
    samples: int
    outputs: tuple[OutputDifference, ...]
    tolerance: float
    integers: int
    floats: int
    not_run: str

    def to_json(self) -> dict[str, object]:
        """The report as JSON."""
        return asdict(self)

    @property
    def failures(self) -> tuple[str, ...]:
        """What is out of its bound, one sentence each."""
        return tuple(
            f"the output {each.name} differs from the quantized module's by {each.lowering:.3g} of "
            f"its range; {self.tolerance:g} is allowed"
            for each in self.outputs
            if each.lowering is not None and not each.lowering <= self.tolerance  # NaN fails too
        )


def verify(artifact: Path, threads: int | None = None) -> ModuleEvaluation:
    """Does what `evaluate` does, and refuses outputs that are out of their bound.

    Raises:
        CheckFailed: as `evaluate`, or an output is out of its bound.
        ExportError: as `evaluate`.
        DeviceError: as `evaluate`.
    """
    found = evaluate(artifact, threads)
    if found.failures:
        raise CheckFailed(f"{artifact}: {'; '.join(found.failures)}")
    return found


def evaluate(artifact: Path, threads: int | None = None) -> ModuleEvaluation:
    """Runs every check on an artifact of a module and writes ``report.json`` into it.

    Args:
        artifact: the folder.
        threads: the runtime's number of threads; None for its default.

    Raises:
        CheckFailed: files were changed, or integers or scales are not what the manifest records.
        ExportError: the folder is no artifact of a module.
        DeviceError: the runtime is missing or fails.
    """
    manifest = ModuleManifest.read(artifact)
    integers = require_whole(artifact, manifest)
    samples = read_samples(artifact / SAMPLES)
    results, not_run = _run(artifact, manifest, samples, threads)
    found = ModuleEvaluation(
        artifact=str(artifact),
        target=manifest.target,
        samples=len(samples),
        outputs=tuple(_difference(name, samples, results) for name in manifest.outputs),
        tolerance=manifest.tolerance,
        integers=integers,
        floats=len(manifest.floats),
        not_run=not_run,
    )
    with whole_file(artifact / REPORT) as stream:
        stream.write(json.dumps(found.to_json(), indent=1).encode() + b"\n")
    return found


def require_whole(artifact: Path, manifest: ModuleManifest) -> int:
    """Checks files and integers against the manifest; returns how many weights are integers.

    Raises:
        CheckFailed: a file was changed, or holds other integers or scales.
    """
    problems = check_files(artifact, manifest)
    if problems:
        raise CheckFailed(f"{artifact}: {problems[0]}")
    formats = {
        name: parse_format(record.format)
        for name, record in manifest.weights.items()
        if name not in manifest.floats
    }
    target = find_module_target(manifest.target)
    digests = target.stored_digests(artifact, manifest.entry, formats)
    for name in formats:
        if digests.get(name) != manifest.weights[name].digest:
            raise CheckFailed(
                f"{artifact}: the integers or scales of {name} are not those that were quantized"
            )
    return len(formats)


def _run(
    artifact: Path, manifest: ModuleManifest, samples: Sequence[Sample], threads: int | None
) -> tuple[list[Arrays] | None, str]:
    """What the artifact gives for samples; or None, and why Core ML's interpreter cannot run it."""
    try:
        with ModuleSession(artifact, threads) as session:
            return [session.run(sample.inputs) for sample in samples], ""
    except WorkerEndedError:
        raise
    except DeviceError as error:
        # Core ML itself exists only on Apple's systems; the interpreter knows a part of its
        # operations.
        if manifest.target != "coreml":
            raise
        return None, f"not run here: EdgeForge's interpreter of Core ML packages cannot: {error}"


def _difference(name: str, samples: list[Sample], results: list[Arrays] | None) -> OutputDifference:
    floats, quantized = ([getattr(s, kind)[name] for s in samples] for kind in _REFERENCES)
    costs = max(map(relative_difference, quantized, floats))
    if results is None:
        return OutputDifference(name, costs, None, None)
    found = [result[name] for result in results]
    cosines = [
        _cosine(a, b) for a, b in zip(found, floats, strict=True) if b.dtype.kind == "f" and b.size
    ]
    lowering = max(map(relative_difference, found, quantized))
    return OutputDifference(
        name, costs, lowering, min(cosines, default=None), _root_mean_square(found, floats)
    )


_REFERENCES: Final = ("floats", "quantized")


def relative_difference(found: npt.NDArray[Any], wanted: npt.NDArray[Any]) -> float:
    """The largest difference of any element over the largest magnitude that is wanted.

    Of whole numbers it is the share of elements that differ; it is NaN where shapes differ.
    """
    if found.shape != wanted.shape:
        return float("nan")
    if wanted.dtype.kind != "f":
        return float((found != wanted).mean()) if wanted.size else 0.0
    if not wanted.size:
        return 0.0
    largest = float(np.abs(wanted).max())
    difference = float(np.abs(found.astype(np.float64) - wanted).max())
    return difference / largest if largest else difference


def _root_mean_square(found: list[npt.NDArray[Any]], wanted: list[npt.NDArray[Any]]) -> float:
    """Of the difference over that of what is wanted; of whole numbers the share that differs."""
    if any(one.shape != other.shape for one, other in zip(found, wanted, strict=True)):
        return float("nan")
    one, other = (np.concatenate([each.ravel() for each in side]) for side in (found, wanted))
    if other.dtype.kind != "f":
        return float((one != other).mean()) if other.size else 0.0
    length = float(np.linalg.norm(other.astype(np.float64)))
    difference = float(np.linalg.norm(one.astype(np.float64) - other))
    return difference / length if length else difference


def _cosine(found: npt.NDArray[Any], wanted: npt.NDArray[Any]) -> float:
    a, b = found.astype(np.float64).ravel(), wanted.astype(np.float64).ravel()
    length = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / length if length else 1.0


def lines_of(found: ModuleEvaluation) -> list[str]:
    """The report for people, one line for each finding."""
    held = f"{found.integers} weights read back as the store's integers and scales"
    if found.floats:
        held += f", {found.floats} held as floats (see inspect)"
    lines = [f"{found.artifact}: {found.target}, {found.samples} samples; {held}"]
    for each in found.outputs:
        line = f"  {each.name}: quantization {each.quantization:.2e} of range"
        if each.lowering is not None:
            line += f", lowering {each.lowering:.2e} (bound {found.tolerance:g})"
        if each.cosine is not None:
            line += f", cosine with float {each.cosine:.6f}"
        lines.append(line)
    if found.not_run:
        lines.append(f"  {found.not_run}")
    return lines
