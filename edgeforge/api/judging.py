"""Functions that hold artifacts against their checkpoints, a policy or each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from edgeforge.diagnosis.diagnose import Diagnosis
    from edgeforge.gate.result import GateResult
    from edgeforge.reports.paired import Comparison
    from edgeforge.stage_progress import Progress
    from edgeforge.verification.evaluation import Evaluation


def verify(
    artifact: str | Path,
    *,
    text: str | Path | None = None,
    tokens: int | Literal["all"] | None = None,
    checkpoint: str | None = None,
    bounds: Mapping[str, float] | None = None,
    against: str | None = None,
    devices: Sequence[str] = (),
    kleidiai: str | None = None,
    threads: int | None = None,
    timed: bool = True,
    precision: str | None = None,
    compute_units: str | None = None,
) -> Evaluation:
    """Runs every check on an artifact and writes ``report.json`` into it.

    Args:
        artifact: a folder that `export` wrote.
        text: the UTF-8 file to evaluate on; None for the demo model's held-out text.
        tokens: how many tokens of the text to use, spread over the whole of it, or ``all``; None
            for 8,192 (2,048 for models over 50 M parameters).
        checkpoint: the checkpoint's folder, file or hub id, if it is not where it was then.
        bounds: of figures, by their names, in place of the defaults.
        against: ``transformers``, to hold FLOAT against its logits of the same checkpoint, too.
        devices: where to run the artifact too, such as ``arm64:cortex-a76``; what came out there is
            in the evaluation's ``elsewhere``.
        kleidiai: whether onnxruntime uses KleidiAI's kernels on arm64 devices: ``on``, ``off`` or
            ``both``.
        threads: threads for the runtime; None for the runtime's default.
        timed: whether to time the artifact too.
        precision: rounding of the interpreter of Core ML packages: ``fp16`` (the default) or
            ``fp32``.
        compute_units: compute units of Core ML on a Mac: ``all``, ``cpu``, ``cpu-and-gpu`` or
            ``cpu-and-ne``.

    Raises:
        CheckFailed: files were changed; their integers and scales are not what the manifest
            records, or not the weight store's; logits are NaN or infinite; or a figure is out of
            its bound. In all but the first two cases it is an
            `edgeforge.verification.soundness.UnsoundError`, whose ``evaluations`` hold the figures.
        UsageError: ``tokens`` is neither a number of at least 2 nor ``all``, or a bound cannot be.
    """
    from edgeforge.verification.verify import verify as run_verify
    from edgeforge.verification.verify_options import VerifyOptions, devices_of

    options = VerifyOptions(
        text=None if text is None else Path(text),
        tokens=tokens,
        checkpoint=checkpoint,
        threads=threads,
        timed=timed,
        runtime={"precision": precision, "compute_units": compute_units},
        bounds=bounds or {},
        against=against,
        devices=devices_of(devices, kleidiai),
    )
    return run_verify(Path(artifact), options)


def check(
    *artifacts: str | Path,
    policy: str | Path | None = None,
    baseline: str | Path | None = None,
    update_baseline: bool = False,
    checkpoint: str | None = None,
    threads: int | None = None,
    timed: bool = True,
    progress: Progress | None = None,
) -> GateResult:
    """Holds artifacts against a policy and a baseline; verifies those without a fresh report.

    Args:
        artifacts: folders that `export` wrote, or that hold such; none for those that the policy
            lists.
        policy: a YAML file of bounds; None for ``edgeforge-policy.yaml`` in the current folder if
            it is there, else for the targets' own bounds.
        baseline: the file of earlier figures; None for the one that the policy names.
        update_baseline: whether to write the figures as the new baseline, if they keep to the
            policy.
        checkpoint: the checkpoint's folder, file or hub id, if it is not where it was then.
        threads: threads for the runtimes; None for their defaults.
        timed: whether to hold speeds against the reference runs that the policy names.
        progress: called with a stage's name, how much of it is done, and its size.

    Raises:
        GateFailed: an artifact falls short; its ``result`` holds everything that was found.
        UsageError: the policy or the baseline cannot be used, or there is nothing to check.
    """
    from edgeforge.gate.gate import GateOptions
    from edgeforge.gate.gate import check as run_check
    from edgeforge.stage_progress import no_progress

    options = GateOptions(
        policy=None if policy is None else Path(policy),
        baseline=None if baseline is None else Path(baseline),
        update_baseline=update_baseline,
        checkpoint=checkpoint,
        threads=threads,
        timed=timed,
    )
    result = run_check([Path(each) for each in artifacts], options, progress or no_progress)
    result.require_passed()
    return result


def compare(*artifacts: str | Path) -> Comparison:
    """Holds verified artifacts against the first of them, on the same tokens; nothing is run.

    Args:
        artifacts: folders that `export` wrote and `verify` reported on or `bench` measured, or that
            hold such; or ``bench.json`` files, of which speeds alone are compared; at least two.

    Raises:
        UsageError: there are fewer than two, or one has neither a report that holds nor speeds.
        ExportError: a folder is no artifact.
    """
    from edgeforge.reports.paired import compare as run_compare

    return run_compare([Path(each) for each in artifacts])


def report(*artifacts: str | Path, out: str | Path = "report.html") -> Path:
    """Writes one self-contained page about verified artifacts; nothing is run.

    Args:
        artifacts: folders that `export` wrote, or that hold such.
        out: the file to write.

    Returns:
        The file.

    Raises:
        UsageError: the file cannot be written there, or matplotlib is not installed.
        ExportError: a folder is no artifact.
    """
    from edgeforge.reports.page import write_page

    return write_page([Path(each) for each in artifacts], Path(out))[0]


def diagnose(
    artifact: str | Path,
    *,
    text: str | Path | None = None,
    tokens: int | Literal["all"] = 512,
    checkpoint: str | None = None,
    threads: int | None = None,
    weights: bool = True,
) -> Diagnosis:
    """Finds where an artifact loses accuracy: layer by layer, and weight by weight.

    Args:
        artifact: a folder that `export` wrote.
        text: the UTF-8 file to run; None for the demo model's held-out text.
        tokens: how many tokens of the text to use, spread over the whole of it, or ``all``.
        checkpoint: the checkpoint's folder, file or hub id, if it is not where it was then.
        threads: threads for the runtime; None for the runtime's default.
        weights: whether to measure what each weight costs, which takes longest.

    Raises:
        UsageError: ``tokens`` is neither a number of at least 2 nor ``all``, or the text is too
            short.
        ExportError: the artifact is missing or damaged.
        DeviceError: its runtime is not installed, or failed.
    """
    from edgeforge.diagnosis.diagnose import DiagnoseOptions
    from edgeforge.diagnosis.diagnose import diagnose as find

    options = DiagnoseOptions(
        text=None if text is None else Path(text),
        tokens=tokens,
        checkpoint=checkpoint,
        threads=threads,
        weights=weights,
    )
    return find(Path(artifact), options)
