"""Functions that make artifacts, and that say beforehand what they would take."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgeforge.forecast.forecast import Forecast
    from edgeforge.stage_progress import Progress


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
    activations: str | None = None,
    max_memory: int | None = None,
    draft_positions: int | None = None,
    exit_layer: int | None = None,
    adapters: Sequence[str] = (),
    adapter_mode: str = "merged",
    bits_per_weight: float | None = None,
    max_size: int | None = None,
    max_kl: float | None = None,
    save_plan: str | Path | None = None,
    calibrate: bool = True,
    calibration: str | Path | None = None,
    calibration_tokens: int | None = None,
    calibration_length: int = 256,
    seed: int = 0,
    resume: str | Path | None = None,
    force: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Traces, quantizes and writes a model.

    Args:
        model: a checkpoint folder, a GGUF file, a hub id, or ``demo``.
        out: the output folder; it appears only when everything in it is complete.
        targets: names from ``edgeforge list targets``. A single target's artifact is ``out``
            itself; those of several targets are folders in it.
        recipe: a name from ``edgeforge list recipes``, or a YAML file of rules; None for
            ``int4-gptq`` (models under 1 billion parameters), ``int4`` (larger ones) or ``as-is``
            (a checkpoint that is quantized already).
        rotation: a name from ``edgeforge list rotations``: the weights are rotated that way before
            they are quantized.
        imported_scales: dtype of the scales of a checkpoint that is quantized already: ``float16``
            keeps them exactly, ``bfloat16`` rounds them, and every target can store bfloat16.
        context: declared context in tokens; None for the model's own, at most 4096.
        tokenizer: a folder, file or hub id from which to take the tokenizer instead.
        revision: branch, tag or commit of a hub id.
        ignore_config: fields of ``config.json`` that you know not to change the maths.
        strip: whether to leave out what only verification needs.
        weights: where an ExecuTorch artifact stores its weights: ``internal`` (the default) or
            ``external``, in a file of their own.
        profile: the processor for which a Core ML package is laid out: ``gpu`` (the default) or
            ``ane``.
        chunk: tokens of one Core ML prefill call, such as ``"64"`` (the default), or several sizes
            from which each call takes one, such as ``"16,64,256"``.
        cache_write: how a Core ML package writes its caches: ``slice`` (the default for
            ``ios18``) or ``onehot``.
        opset: version of Core ML's operator set: ``ios18`` (the default) or ``ios17``.
        lowering: the code that lowers for ExecuTorch: ``edgeforge`` (the default) or ``stock``.
        backend: ExecuTorch's delegate: ``xnnpack`` (the default), ``vulkan`` or ``coreml``.
        kv_cache: dtype of the caches of ONNX and ExecuTorch: ``fp32`` (the default) or ``int8``.
        activations: how products of ONNX and ExecuTorch take their activations: ``auto`` (the
            default) rounds them to 8 bits but for a few large columns, ``int8`` rounds all, and
            ``float`` none.
        max_memory: bytes that the device has for the model; a model that needs more is refused.
        draft_positions: how many of its last tokens' logits one call gives in a graph of its own,
            for speculative decoding; None or 1 for no such graph.
        exit_layer: the layer after which the model is cut, counted from 1: the last norm and the
            head follow it; None for the whole model.
        adapters: folders of adapters in peft's format that are merged into the weights before they
            are quantized, each ``DIR`` or ``DIR@weight``.
        adapter_mode: ``merged``, or ``separate`` for adapters that lie beside the base's weights
            and are switched on while it runs.
        bits_per_weight: budget of a mixed recipe: stored bits divided by parameters.
        max_size: budget of a mixed recipe: bytes of the stored weights.
        max_kl: budget of a mixed recipe: KL divergence on the calibration text, nats per token.
        save_plan: a ``.yaml`` file to which the plan is written as a recipe; one that holds another
            plan is replaced only by ``force``.
        calibrate: whether the default recipe may look at a calibration text; without it, it is
            ``int4``.
        calibration: the text on which calibrated recipes collect activations: a UTF-8 file,
            ``demo``, or ``self`` for what the model itself writes; None for ``demo`` where a recipe
            needs a text.
        calibration_tokens: how many tokens of the calibration text to use; None for 8,192, or for
            32,768 from a billion parameters on.
        calibration_length: tokens of each calibration sequence, at most the context.
        seed: seed of the draw of calibration sequences.
        resume: folder of the partial results of calibration; None for one in the cache.
        force: whether to replace an existing output folder of which EdgeForge wrote every file.
        threads: threads for quantization; None for one per processor, at most four.
        progress: called with a stage's name, how much of it is done, and its size.

    Returns:
        The artifacts' folders, in the order of ``targets``.

    Raises:
        EdgeForgeError: an option, the checkpoint or the output folder cannot be used.
        QuantizationError: the recipe or a weight is refused.
        ExportError: a target cannot write the model.
    """
    from edgeforge.calibration.text import CalibrationOptions
    from edgeforge.errors import UsageError
    from edgeforge.export_options import ExportOptions, scale_name
    from edgeforge.model.model import open_model
    from edgeforge.pipeline import export as run_export
    from edgeforge.planning.budget import Budget
    from edgeforge.stage_progress import no_progress
    from exporters.options import TargetOptions
    from exporters.registry import find_target

    chosen = [find_target(name) for name in dict.fromkeys(targets)]
    given, beside = tuple(map(str, adapters)), adapter_mode == "separate"
    if adapter_mode not in ("merged", "separate") or (beside and not given):
        raise UsageError(
            f"--adapter-mode {adapter_mode} is not possible: "
            f"{'give an --adapter with it' if beside else 'take merged or separate'}"
        )
    opened = open_model(
        str(model),
        revision=revision,
        tokenizer=tokenizer,
        ignore_config=ignore_config,
        exit_layer=exit_layer,
        adapters=() if beside else given,
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
            activations=activations,
            profile=profile,
            chunk=chunk,
            cache_write=cache_write,
            opset=opset,
            max_memory=max_memory,
            draft_positions=None if draft_positions == 1 else draft_positions,
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
        calibrate=calibrate,
        separate_adapters=given if beside else (),
    )
    return run_export(opened, chosen, Path(out), options, progress or no_progress)


def export_adapter(
    artifact: str | Path,
    adapter: str | Path,
    *,
    checkpoint: str | None = None,
    progress: Progress | None = None,
) -> str:
    """Adds an adapter to an artifact, beside its weights, which stay as they are.

    Args:
        artifact: a folder that `export` wrote; a whole copy takes its place in the end.
        adapter: the folder of an adapter in peft's format, or ``DIR@weight``.
        checkpoint: the base's folder, file or hub id, if it is not where it was then.
        progress: called with a stage's name, how much of it is done, and its size.

    Returns:
        The adapter's name, by which it is switched on.

    Raises:
        EdgeForgeError: the adapter, the checkpoint or the artifact cannot be used.
        ExportError: the folder is no artifact, or its target takes no adapters.
    """
    from edgeforge.separate_adapters import export_adapter as run_export_adapter
    from edgeforge.stage_progress import no_progress

    record = run_export_adapter(
        Path(artifact), str(adapter), checkpoint=checkpoint, progress=progress or no_progress
    )
    return record.name


def plan(
    model: str | Path,
    device: str,
    *,
    context: int | None = None,
    targets: Sequence[str] | None = None,
    recipes: Sequence[str] = (),
    os: str | None = None,
    memory: int | None = None,
    kv_cache: str | None = None,
    profile: str | None = None,
    chunk: str | None = None,
    opset: str | None = None,
    exit_layer: int | None = None,
    adapters: Sequence[str] = (),
    revision: str | None = None,
    ignore_config: Sequence[str] = (),
) -> Forecast:
    """Tells what a model would take on a phone, recipe by recipe; nothing is exported.

    Args:
        model: a checkpoint folder, a GGUF file, a ``config.json``, a hub id, of which only the
            configuration is read, or ``demo``.
        device: a name from ``edgeforge list phones``.
        context: declared context in tokens; None for the model's own, at most 4096.
        targets: names from ``edgeforge list targets``; None for ``coreml`` on iOS and ``onnx`` on
            Android.
        recipes: names from ``edgeforge list recipes`` or YAML files; none for all.
        os: version of the phone's system; None for the newest of which a limit is known.
        memory: bytes that an app may take, in place of the limit.
        kv_cache: as `export` takes it.
        profile: as `export` takes it.
        chunk: as `export` takes it.
        opset: as `export` takes it.
        exit_layer: as `export` takes it.
        adapters: folders of adapters that are to lie beside the weights, as `export` leaves them
            with ``adapter_mode="separate"``.
        revision: branch, tag or commit of a hub id.
        ignore_config: fields of ``config.json`` that you know not to change the maths.

    Raises:
        EdgeForgeError: the device, the version, an option or the configuration cannot be used.
        QuantizationError: there is no such recipe.
        ExportError: there is no such target, or none of them holds any of the recipes.
    """
    from edgeforge.checkpoint.adapter import open_adapters
    from edgeforge.forecast.forecast import forecast
    from edgeforge.forecast.sized_model import size_model
    from exporters.options import TargetOptions

    return forecast(
        size_model(
            str(model), revision=revision, ignore_config=ignore_config, exit_layer=exit_layer
        ),
        device,
        context=context,
        os_version=os,
        memory=memory,
        targets=targets,
        recipes=recipes,
        options=TargetOptions(kv_cache=kv_cache, profile=profile, chunk=chunk, opset=opset),
        adapters=open_adapters(adapters),
    )
