"""The public Python API: what the command line does, as functions.

>>> import edgeforge
>>> folder = edgeforge.export("demo", "out/demo")       # doctest: +SKIP
>>> edgeforge.verify(folder).lowering.kl_mean           # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from device_harness.session import Session
    from device_harness.timing import Timings
    from edgeforge.stage_progress import Progress
    from edgeforge.verification.evaluation import Evaluation


def export(
    model: str | Path,
    out: str | Path,
    *,
    targets: Sequence[str] = ("onnx",),
    recipe: str | None = None,
    rotation: str | None = None,
    imported_scales: str = "float16",
    context: int | None = None,
    tokenizer: str | None = None,
    revision: str | None = None,
    ignore_config: Sequence[str] = (),
    strip: bool = False,
    weights: str | None = None,
    profile: str | None = None,
    chunk: str | None = None,
    cache_write: str | None = None,
    opset: str | None = None,
    lowering: str | None = None,
    backend: str | None = None,
    kv_cache: str | None = None,
    max_memory: int | None = None,
    bits_per_weight: float | None = None,
    max_size: int | None = None,
    max_kl: float | None = None,
    save_plan: str | Path | None = None,
    calibration: str | Path | None = None,
    calibration_tokens: int = 64 * 512,
    calibration_length: int = 512,
    seed: int = 0,
    resume: str | Path | None = None,
    force: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Traces, quantizes and writes a model.

    Args:
        model: a checkpoint folder, a hub id, or ``demo``.
        out: the output folder; it appears only when everything in it is whole.
        targets: names that ``edgeforge list targets`` shows. One target's artifact is ``out``
            itself; several are folders in it.
        recipe: a name that ``edgeforge list recipes`` shows, or a YAML file of rules; None for
            ``int4``, or for ``as-is`` where the checkpoint is quantized already.
        rotation: what the weights are rotated by before they are quantized: a name that ``edgeforge
            list rotations`` shows.
        imported_scales: of a checkpoint that is quantized already: ``float16`` keeps its scales
            exactly, ``bfloat16`` rounds them, which every target can hold.
        context: declared context in tokens; None for the model's own, 4096 at most.
        tokenizer: the folder, file or hub id to take the tokenizer from instead.
        revision: branch, tag or commit of a hub id.
        ignore_config: fields of ``config.json`` that you know not to change the maths.
        strip: leave out what only verification needs.
        weights: where an ExecuTorch artifact's weights lie: ``internal`` (the default) or
            ``external``, in a file of their own.
        profile: the processor that a Core ML package is shaped for: ``gpu`` (the default) or
            ``ane``.
        chunk: tokens of a Core ML prefill call, such as ``"64"`` (the default), or several of which
            each call takes one, such as ``"16,64,256"``.
        cache_write: how Core ML caches are written: ``slice`` or ``onehot``.
        opset: generation of Core ML's operators: ``ios18`` (the default) or ``ios17``.
        lowering: who lowers for ExecuTorch: ``edgeforge`` (the default) or ``stock``.
        backend: ExecuTorch's delegate: ``xnnpack`` (the default), ``vulkan`` or ``coreml``.
        kv_cache: dtype of the caches of ONNX and ExecuTorch: ``fp32`` (the default) or ``int8``.
        max_memory: bytes that the device has for the model; what needs more is refused.
        bits_per_weight: budget of a mixed recipe: stored bits over parameters.
        max_size: budget of a mixed recipe: bytes of the stored weights.
        max_kl: budget of a mixed recipe: KL divergence on the calibration text, nats a token.
        save_plan: a ``.yaml`` file that the plan is written to as a recipe.
        calibration: a UTF-8 file, or ``demo``, that calibrated recipes look at activations on; None
            for ``demo`` where a recipe needs a text.
        calibration_tokens: how many tokens of it.
        calibration_length: tokens of a sequence; the context at most.
        seed: which of its sequences are taken.
        resume: folder of the partial results of calibration; None for one in the cache.
        force: replace an existing output folder.
        threads: for quantization; None for one per processor, four at most.
        progress: called with a stage's name, what is done of it, and its size.

    Returns:
        The artifacts' folders, in the order of ``targets``.

    Raises:
        EdgeForgeError: or a QuantizationError or ExportError, in one sentence.
    """
    from edgeforge.calibration.text import CalibrationOptions
    from edgeforge.export_options import ExportOptions, scale_name
    from edgeforge.model.model import open_model
    from edgeforge.pipeline import export as run_export
    from edgeforge.planning.budget import Budget
    from edgeforge.stage_progress import no_progress
    from exporters.options import TargetOptions
    from exporters.registry import find_target

    chosen = [find_target(name) for name in dict.fromkeys(targets)]
    opened = open_model(
        str(model), revision=revision, tokenizer=tokenizer, ignore_config=ignore_config
    )
    options = ExportOptions(
        recipe=recipe,
        context=context,
        force=force,
        threads=threads,
        target=TargetOptions(
            strip=strip,
            weights=weights,
            lowering=lowering,
            backend=backend,
            kv_cache=kv_cache,
            profile=profile,
            chunk=chunk,
            cache_write=cache_write,
            opset=opset,
            max_memory=max_memory,
        ),
        calibration=CalibrationOptions(
            source=None if calibration is None else str(calibration),
            tokens=calibration_tokens,
            length=calibration_length,
            seed=seed,
        ),
        resume=None if resume is None else Path(resume),
        imported_scales=scale_name(imported_scales),
        budget=Budget(bits_per_weight=bits_per_weight, max_size=max_size, max_kl=max_kl),
        save_plan=None if save_plan is None else Path(save_plan),
        rotation=rotation,
    )
    return run_export(opened, chosen, Path(out), options, progress or no_progress)


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

    Use the session in ``with``, or call its ``close``: a runtime may run in a process of its own.

    Args:
        artifact: a folder that `export` wrote.
        threads: for the runtime.
    """
    from device_harness.registry import open_session
    from exporters.manifest import Manifest

    folder = Path(artifact)
    return open_session(folder, Manifest.read(folder), threads)
