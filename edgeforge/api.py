"""The public Python API: what the command line does, as functions.

>>> import edgeforge
>>> folder = edgeforge.export("demo", "out/demo")       # doctest: +SKIP
>>> edgeforge.verify(folder).lowering.kl_mean           # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from device_harness.session import Session
    from device_harness.timing import Timings
    from edgeforge.verification.evaluation import Evaluation


def export(
    model: str | Path,
    out: str | Path,
    *,
    targets: Sequence[str] = ("onnx",),
    recipe: str | None = None,
    context: int | None = None,
    tokenizer: str | None = None,
    revision: str | None = None,
    ignore_config: Sequence[str] = (),
    calibration: str | Path | None = None,
    calibration_tokens: int = 64 * 512,
    calibration_length: int = 512,
    seed: int = 0,
    resume: str | Path | None = None,
    force: bool = False,
    threads: int | None = None,
    imported_scales: str = "float16",
    bits_per_weight: float | None = None,
    max_size: int | None = None,
    max_kl: float | None = None,
    save_plan: str | Path | None = None,
    rotation: str | None = None,
    **target_options: Any,
) -> list[Path]:
    """Traces, quantizes and writes a model.

    Args:
        model: a checkpoint folder, a hub id, or ``demo``.
        out: the output folder; it appears only when everything in it is whole.
        targets: names of `exporters.registry`.
        recipe: a name that ``edgeforge list recipes`` shows, or a YAML file of rules; None for
            ``int4``, or for ``as-is`` where the checkpoint is quantized already.
        context: declared context in tokens; None for the model's own, 4096 at most.
        tokenizer: where to take the tokenizer from instead.
        revision: of a hub id.
        ignore_config: config fields you know not to change the maths.
        calibration: a UTF-8 file, or ``demo``, that calibrated recipes look at activations on; None
            for ``demo`` where a recipe needs a text.
        calibration_tokens: how many tokens of it.
        calibration_length: tokens of a sequence.
        seed: which of its sequences are taken.
        resume: folder of the partial results of calibration; None for one in the cache.
        force: replace an existing output folder.
        threads: for quantization.
        imported_scales: ``float16`` keeps the scales of such a checkpoint exactly, ``bfloat16``
            rounds them, which every target can hold.
        bits_per_weight: budget of a mixed recipe: stored bits over parameters.
        max_size: budget of a mixed recipe: bytes of the stored weights.
        max_kl: budget of a mixed recipe: KL divergence on the calibration text, nats a token.
        save_plan: a ``.yaml`` file that the plan is written to as a recipe.
        rotation: what the weights are rotated by before they are quantized: a name that ``edgeforge
            list rotations`` shows.
        target_options: fields of `exporters.options.TargetOptions`, such as ``strip=True``.

    Returns:
        The artifacts' folders, in the order of ``targets``.

    Raises:
        EdgeForgeError: or a QuantizationError or ExportError, in one sentence.
    """
    from edgeforge.calibration.text import CalibrationOptions
    from edgeforge.export_options import ExportOptions
    from edgeforge.model.model import open_model
    from edgeforge.pipeline import export as run_export
    from edgeforge.planning.budget import Budget
    from edgeforge.planning.choose import scale_name
    from exporters.options import TargetOptions
    from exporters.registry import find_target

    chosen = [find_target(name) for name in targets]
    opened = open_model(
        str(model), revision=revision, tokenizer=tokenizer, ignore_config=ignore_config
    )
    return run_export(
        opened,
        chosen,
        Path(out),
        ExportOptions(
            recipe,
            context,
            force,
            threads,
            TargetOptions(**target_options),
            CalibrationOptions(
                None if calibration is None else str(calibration),
                calibration_tokens,
                calibration_length,
                seed,
            ),
            None if resume is None else Path(resume),
            scale_name(imported_scales),
            Budget(bits_per_weight, max_size, max_kl),
            None if save_plan is None else Path(save_plan),
            rotation,
        ),
    )


def verify(
    artifact: str | Path,
    *,
    text: str | Path | None = None,
    tokens: int | None = None,
    checkpoint: str | None = None,
    threads: int | None = None,
    timed: bool = True,
    precision: str | None = None,
    compute_units: str | None = None,
) -> Evaluation:
    """Runs every check on an artifact and writes ``report.json`` into it.

    Args:
        artifact: a folder that `export` wrote.
        text: a UTF-8 file; None for the demo model's held-out text.
        tokens: how many tokens of it; None for all (2,048 for models over 50 M parameters).
        checkpoint: where the checkpoint is now, if it was moved.
        threads: for the runtime.
        timed: whether to time the artifact too.
        precision: of the interpreter of Core ML packages: ``fp16`` (its default) or ``fp32``.
        compute_units: of Core ML on a Mac: ``all``, ``cpu``, ``cpu-and-gpu`` or ``cpu-and-ne``.

    Raises:
        CheckFailed: files were changed, or their integers and scales are not the store's.
    """
    from edgeforge.verification.verify import VerifyOptions
    from edgeforge.verification.verify import verify as run_verify

    chosen = None if text is None else Path(text)
    runtime = {"precision": precision, "compute_units": compute_units}
    options = VerifyOptions(chosen, tokens, checkpoint, threads, timed, runtime)
    return run_verify(Path(artifact), options)


def bench(
    artifact: str | Path, *, prefill: int = 128, decode: int = 32, threads: int | None = None
) -> Timings:
    """Times an artifact on this host, in a process of its own.

    Args:
        artifact: a folder that `export` wrote.
        prefill: tokens of the prompt.
        decode: tokens decoded one by one after it.
        threads: for the runtime.
    """
    from device_harness.timing import time_artifact

    return time_artifact(Path(artifact), threads=threads, prefill=prefill, decode=decode)


def load(artifact: str | Path, *, threads: int | None = None) -> Session:
    """Opens an artifact to run it token by token.

    Args:
        artifact: a folder that `export` wrote.
        threads: for the runtime.
    """
    from device_harness.registry import open_session
    from exporters.manifest import Manifest

    folder = Path(artifact)
    return open_session(folder, Manifest.read(folder), threads)
