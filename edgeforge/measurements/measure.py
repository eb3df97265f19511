"""Measures artifacts on devices, each device in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

from device_harness.device_session import DeviceSession, open_on
from device_harness.devices.device import Device
from device_harness.devices.registry import open_device
from device_harness.errors import DeviceError
from device_harness.measuring.bench import ArmRatio, Bench, DeviceRecord
from device_harness.measuring.clock import Clock, SystemClock
from device_harness.measuring.lane import Arm, Site
from device_harness.measuring.protocol import measure_point
from device_harness.measuring.record import Cell, Measured
from device_harness.measuring.sending import Sending
from device_harness.registry import taken_options
from edgeforge.errors import UsageError
from edgeforge.measurements.device_facts import edgeforge_version, look, told
from edgeforge.measurements.host_texts import HostTexts
from edgeforge.measurements.instructions import counted, require_counting
from edgeforge.measurements.options import BenchOptions
from edgeforge.measurements.prompts import Prompts
from edgeforge.measurements.user_runner import run_on
from edgeforge.stage_progress import Progress, no_progress
from edgeforge.verification.artifacts import find_artifacts
from edgeforge.verification.freshness import sha256_of
from exporters.manifest import MANIFEST, Manifest
from exporters.modules.manifest import is_module

_ON_THIS_MACHINE: Final = ("host", "mac")
"""Kinds of devices that run on this machine's own processor, as emulated ones do."""


@dataclass(frozen=True)
class Subject:
    """An artifact to measure.

    Attributes:
        folder: as the user named it.
        manifest: its manifest.
        measured: what a record says of it.
        prompts: its prompts.
    """

    folder: Path
    manifest: Manifest
    measured: Measured
    prompts: Prompts


@dataclass(frozen=True)
class Found:
    """What one device gave."""

    device: DeviceRecord
    cells: tuple[Cell, ...] = ()
    ratios: tuple[ArmRatio, ...] = ()


class Stopped(Exception):
    """The measurement was interrupted."""


def measure(
    folders: Sequence[Path],
    options: BenchOptions,
    progress: Progress = no_progress,
    clock: Clock | None = None,
) -> Bench:
    """Measures artifacts on devices.

    A device that fails is recorded and does not stop the others. Devices that compute on this
    machine's processor take turns, for they would slow each other down.

    Args:
        folders: artifacts, or folders that hold some. Several of them take turns on each device.
        options: what the user asked for.
        progress: told of each device's runs.
        clock: to wait by; None for this machine's.

    Raises:
        UsageError: a length does not fit a context, or artifacts of modules are named beside
            others, or with options that they do not have.
        ExportError: a folder is no artifact.
        CheckpointError: a tokenizer cannot be read.
    """
    if options.rules.runs < 1:
        raise UsageError(f"{options.rules.runs} runs measure nothing: ask for at least one")
    found_folders = find_artifacts(folders)
    if any(map(is_module, found_folders)):
        from edgeforge.measurements.modules import measure_modules  # which imports torch

        return measure_modules(found_folders, options, progress, clock or SystemClock())
    subjects = [_subject(folder) for folder in found_folders]
    _require_options(subjects, options)
    points = options.points({str(each.folder): each.manifest.context for each in subjects})
    if options.rules.minutes and any(output < 2 for _, output in points):
        raise UsageError("a sustained run needs an --output of at least 2, whose speed it follows")
    if options.instructions:
        require_counting(options.devices)
    if options.runner is not None:
        options.runner.require_devices(options.devices)
    turn, stop = threading.Lock(), threading.Event()
    texts = HostTexts(options.threads, options.runtime, turn)
    work = partial(
        _on_device,
        subjects=subjects,
        points=points,
        options=options,
        texts=texts,
        turn=turn,
        stop=stop,
        progress=progress,
        clock=clock or SystemClock(),
    )
    pool = ThreadPoolExecutor(len(options.devices))
    try:
        found = list(pool.map(work, options.devices))
    finally:
        stop.set()  # after Ctrl-C, threads end with the run that they are in
        pool.shutdown(wait=False, cancel_futures=True)
        texts.close()
    return Bench(
        devices=tuple(each.device for each in found),
        cells=tuple(cell for each in found for cell in each.cells),
        ratios=tuple(ratio for each in found for ratio in each.ratios),
    )


def _on_device(
    name: str,
    *,
    subjects: Sequence[Subject],
    points: Sequence[tuple[int, int]],
    options: BenchOptions,
    texts: HostTexts,
    turn: threading.Lock,
    stop: threading.Event,
    progress: Progress,
    clock: Clock,
) -> Found:
    """Measures everything on one device."""
    record, cells, ratios = DeviceRecord(name), list[Cell](), list[ArmRatio]()

    def tell(done: int, of: int) -> None:
        if stop.is_set():
            raise Stopped
        progress(f"measure on {name}", done, of)

    try:
        with open_device(name, progress=progress) as device:
            facts = device.facts()
            record = DeviceRecord(name, told(facts, name), device.limits)
            is_here = facts.emulated or facts.kind in _ON_THIS_MACHINE
            site = Site(name, partial(look, device), options.rules, clock)
            if options.runner is not None:
                for each in subjects:
                    tell(len(cells), len(subjects))
                    found = run_on(site, device, options.runner, each.measured, each.manifest)
                    cells.append(replace(found, edgeforge=edgeforge_version()))
                return Found(record, tuple(cells))
            for number, (prompt, output) in enumerate(points):
                if number:  # the sustained run is of the first lengths
                    site.rules = replace(options.rules, minutes=0.0)
                arms = [_arm(device, each, options) for each in subjects]
                with _turn(turn if is_here else None):
                    turns = measure_point(site, arms, prompt, output, tell)
                for cell, each in zip(turns.cells, subjects, strict=True):
                    known = replace(cell, edgeforge=edgeforge_version())
                    given = each.prompts.of(prompt)
                    known = texts.judged(known, each.folder, each.manifest, given)
                    if options.instructions:
                        with _turn(turn if is_here else None):
                            known = counted(known, each.folder)
                    cells.append(known)
                ratios += turns.ratios
    except DeviceError as error:
        record = replace(record, failure=str(error))
    return Found(record, tuple(cells), _trusted(ratios, cells))


def _trusted(ratios: Sequence[ArmRatio], cells: Sequence[Cell]) -> tuple[ArmRatio, ...]:
    """The ratios of which neither side's text failed: the speed of garbage is none."""
    bad = {
        (cell.artifact.manifest, cell.prompt, cell.output)
        for cell in cells
        if cell.text.verdict == "failed"
    }
    return tuple(
        each
        for each in ratios
        if not bad & {(side, each.prompt, each.output) for side in (each.of, each.against)}
    )


def _arm(device: Device, subject: Subject, options: BenchOptions) -> Arm:
    given = taken_options(subject.manifest.target, options.runtime)
    sending = Sending(device)

    def start() -> DeviceSession:
        sending.begin()
        return open_on(device, subject.folder, subject.manifest, options.threads, given)

    return Arm(
        artifact=subject.measured,
        open=start,
        prompt=subject.prompts.of,
        threads=options.threads,
        options=given,
        was_installed=sending.was_needed,
    )


def _require_options(subjects: Sequence[Subject], options: BenchOptions) -> None:
    """Refuses an option that no artifact's runtime takes; the others are left without it.

    Raises:
        UsageError: names the option.
    """
    for name, value in options.runtime.items():
        if value is not None and not any(
            name in taken_options(each.manifest.target, options.runtime) for each in subjects
        ):
            targets = ", ".join(dict.fromkeys(each.manifest.target for each in subjects))
            raise UsageError(
                f"{targets} artifacts have no option --{name.replace('_', '-')}: leave it out"
            )


def _subject(folder: Path) -> Subject:
    manifest = Manifest.read(folder)
    measured = Measured(
        folder=str(folder),
        target=manifest.target,
        recipe=manifest.recipe,
        model=manifest.source.model,
        checkpoint=manifest.source.sha256,
        manifest=sha256_of(folder / MANIFEST),
        context=manifest.context,
        bits_per_weight=manifest.bits_per_weight,
        bytes=sum(record.size for record in manifest.files.values()),
        options={key: each for key, each in manifest.options.items() if each is not None},
    )
    return Subject(folder, manifest, measured, Prompts(folder, manifest))


@contextmanager
def _turn(turn: threading.Lock | None) -> Iterator[None]:
    if turn is None:
        yield
        return
    with turn:
        yield
