"""The public Python API: the command line's work as functions.

>>> import edgeforge
>>> folder = edgeforge.export("demo", "out/demo")       # doctest: +SKIP
>>> edgeforge.verify(folder).lowering.kl_mean           # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from device_harness.measuring.bench import Bench
    from device_harness.session import Session
    from edgeforge.diagnosis.diagnose import Diagnosis
    from edgeforge.forecast.forecast import Forecast
    from edgeforge.gate.result import GateResult
    from edgeforge.generation.conversation import Conversation
    from edgeforge.reports.paired import Comparison
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
    activations: str | None = None,
    max_memory: int | None = None,
    draft_positions: int | None = None,
    exit_layer: int | None = None,
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
    from edgeforge.export_options import ExportOptions, scale_name
    from edgeforge.model.model import open_model
    from edgeforge.pipeline import export as run_export
    from edgeforge.planning.budget import Budget
    from edgeforge.stage_progress import no_progress
    from exporters.options import TargetOptions
    from exporters.registry import find_target

    chosen = [find_target(name) for name in dict.fromkeys(targets)]
    opened = open_model(
        str(model),
        revision=revision,
        tokenizer=tokenizer,
        ignore_config=ignore_config,
        exit_layer=exit_layer,
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
    )
    return run_export(opened, chosen, Path(out), options, progress or no_progress)


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
        revision: branch, tag or commit of a hub id.
        ignore_config: fields of ``config.json`` that you know not to change the maths.

    Raises:
        EdgeForgeError: the device, the version, an option or the configuration cannot be used.
        QuantizationError: there is no such recipe.
        ExportError: there is no such target, or none of them holds any of the recipes.
    """
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
    )


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


def bench(
    *artifacts: str | Path,
    device: str | Sequence[str] = "host",
    prompt: int | Sequence[int] | None = None,
    output: int | Sequence[int] | None = None,
    prefill: int | None = None,
    decode: int | None = None,
    runs: int = 6,
    warm_up: int = 1,
    rest: float = 0.0,
    cool_to: float | None = None,
    longest_wait: float = 600.0,
    minutes: float = 0.0,
    threads: int | None = None,
    precision: str | None = None,
    compute_units: str | None = None,
    kleidiai: str | None = None,
    history: str | Path | None = None,
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> Bench:
    """Measures artifacts on devices, each in a process of its own, and checks what they generate.

    Of one artifact, on one device and with one length, the figures are attributes of the result
    itself, such as ``decode_tokens_per_second``.

    Args:
        artifacts: folders that `export` wrote, or that hold such. Several take turns, and each is
            held against the first.
        device: where to run: ``host``, or names from ``edgeforge devices``.
        prompt: tokens of the prompt, one length or several; None for 128.
        output: tokens to generate, one number or several; None for 32.
        prefill: in place of ``prompt``, shortened where the context does not hold it.
        decode: in place of ``output``: tokens that are timed one by one after the first; shortened
            where the context does not hold them.
        runs: warm runs that count.
        warm_up: runs after the cold one that do not.
        rest: seconds to leave a device alone before each run.
        cool_to: degrees Celsius that it may have then; None for any.
        longest_wait: seconds to wait for that, at most.
        minutes: of a run of the first lengths without a rest afterwards; 0 for none.
        threads: threads for the runtime; None for the runtime's default.
        precision: rounding of the interpreter of Core ML packages, as `verify` takes it.
        compute_units: compute units of Core ML on a Mac, as `verify` takes them.
        kleidiai: whether onnxruntime uses KleidiAI's kernels on arm64 devices: ``on`` or ``off``.
        history: a file to add the figures to, a line of JSON each; None for none.
        out: a ``bench.json`` to write or add to; None for none.
        progress: called with a stage's name, how much of it is done, and its size.

    Raises:
        LogitsNotFiniteError: an artifact gives NaN or infinite logits.
        BenchFailed: what a device generates is not the model's text.
        DeviceError: a device could not be reached, or its runtime is not installed, or failed. As
            the two above, it is raised when all has been measured, and has it as ``bench``.
        UsageError: a length does not fit the context, or a file cannot be written there.
        ExportError: a folder is no artifact.
    """
    from device_harness.measuring.rules import Rules
    from edgeforge.measurements.bench_file import add_to_file
    from edgeforge.measurements.history import read_history
    from edgeforge.measurements.keep import refuse_places
    from edgeforge.measurements.measure import measure
    from edgeforge.measurements.options import BenchOptions, lengths, parse_devices
    from edgeforge.measurements.result import require_measured
    from edgeforge.stage_progress import no_progress

    options = BenchOptions(
        devices=parse_devices([device] if isinstance(device, str) else device),
        prompts=lengths(prefill if prompt is None else prompt, "prompt"),
        outputs=lengths(decode + 1 if output is None and decode is not None else output, "output"),
        rules=Rules(
            runs=runs,
            warm_up=warm_up,
            rest=rest,
            cool_to=cool_to,
            longest_wait=longest_wait,
            minutes=minutes,
        ),
        threads=threads,
        runtime={"precision": precision, "compute_units": compute_units, "kleidiai": kleidiai},
        fits=prefill is not None or decode is not None,
    )
    folders = [Path(each) for each in artifacts]
    place = None if out is None else Path(out)
    lines = None if history is None else Path(history)
    refuse_places(folders, place, lines, beside=False)
    earlier = None if lines is None else read_history(lines)
    found = measure(folders, options, progress or no_progress)
    if place is not None:
        add_to_file(found, place)
    if earlier is not None:
        earlier.append(found)
    require_measured(found)
    return found


def load(
    artifact: str | Path,
    *,
    threads: int | None = None,
    precision: str | None = None,
    compute_units: str | None = None,
) -> Session:
    """Opens an artifact to run it token by token.

    Use the session in a ``with`` statement, or call its ``close``: some runtimes run in a process
    of their own, which must be ended. It gives logits as the runtime does, NaN and infinity too;
    `device_harness.finite.require_finite` refuses these.

    Args:
        artifact: a folder that `export` wrote.
        threads: threads for the runtime; None for the runtime's default.
        precision: rounding of the interpreter of Core ML packages, as `verify` takes it.
        compute_units: compute units of Core ML on a Mac, as `verify` takes them.

    Raises:
        DeviceError: the artifact's runtime is not installed, or failed.
        ExportError: the folder is no artifact.
    """
    from device_harness.registry import open_session
    from exporters.manifest import Manifest

    folder = Path(artifact)
    options = {"precision": precision, "compute_units": compute_units}
    return open_session(folder, Manifest.read(folder), threads, options)


def conversation(
    artifact: str | Path,
    *,
    system: str | None = None,
    chat_template: str | Path | None = None,
    template_values: Mapping[str, object] | None = None,
    max_tokens: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    threads: int | None = None,
    device: str = "host",
) -> AbstractContextManager[Conversation]:
    """Opens an artifact to talk with, for a ``with`` statement.

    >>> with edgeforge.conversation("out/demo") as talk:    # doctest: +SKIP
    ...     print(talk.say("Name a colour.").text)

    Args:
        artifact: a folder that `export` wrote.
        system: what the model is told before the first message; None for nothing.
        chat_template: a Jinja file to use in place of the artifact's own template.
        template_values: further names for the template, such as ``enable_thinking``.
        max_tokens: the largest number of tokens of an answer; None for what the context has room
            for.
        temperature: divisor of the logits; 0 always takes the likeliest token.
        top_p: draw only from the likeliest tokens whose probabilities add up to this.
        seed: seed of the draws.
        threads: threads for the runtime; None for the runtime's default.
        device: where to run, as ``--device`` takes it.

    Raises:
        CheckpointError: the artifact has no tokenizer, or its template cannot be read.
        UsageError: the artifact has no chat template, or a value of sampling is out of range.
        DeviceError: the device cannot be reached, or the runtime failed.
        ExportError: the folder is no artifact.
    """
    from edgeforge.generation.conversation import ChatOptions, open_conversation
    from edgeforge.generation.sampling import Sampling

    template = None if chat_template is None else Path(chat_template)
    sampling = Sampling(temperature, top_p, seed)
    options = ChatOptions(system, template, template_values or {}, max_tokens, sampling)
    return open_conversation(Path(artifact), options, threads=threads, device=device)
