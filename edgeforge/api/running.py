"""Functions that run artifacts: timed, token by token, or in conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from device_harness.measuring.bench import Bench
    from device_harness.session import Session
    from edgeforge.generation.conversation import Conversation
    from edgeforge.stage_progress import Progress


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
    adapter: str | None = None,
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
        adapter: name of an adapter of the artifact, to be switched on; None for none.

    Raises:
        DeviceError: the artifact's runtime is not installed, or failed.
        ExportError: the folder is no artifact.
    """
    from device_harness.registry import open_session
    from exporters.manifest import Manifest

    folder = Path(artifact)
    manifest = Manifest.read(folder)
    options = {"precision": precision, "compute_units": compute_units}
    if adapter is not None:
        options["adapter"] = manifest.require_adapter(adapter, str(folder))
    return open_session(folder, manifest, threads, options)


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
    adapter: str | None = None,
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
        adapter: name of an adapter of the artifact, to be switched on; None for none.

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
    return open_conversation(
        Path(artifact), options, threads=threads, device=device, adapter=adapter
    )
