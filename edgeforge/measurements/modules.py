"""Measures artifacts of modules: how long a call with the example inputs takes, on this host."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from device_harness.devices.registry import open_device
from device_harness.measuring.bench import ArmRatio, Bench, DeviceRecord
from device_harness.measuring.clock import Clock
from device_harness.measuring.lane import Arm, Site
from device_harness.measuring.protocol import measure_point
from device_harness.measuring.record import Cell, Measured, TextCheck
from device_harness.module_session import ModuleSession
from device_harness.module_worker import MOST_CALLS
from device_harness.session import Tokens
from edgeforge.errors import UsageError
from edgeforge.measurements.device_facts import edgeforge_version, look, told
from edgeforge.measurements.options import BenchOptions
from edgeforge.modules.samples import Sample, read_samples
from edgeforge.modules.verify import relative_difference
from edgeforge.stage_progress import Progress
from edgeforge.verification.freshness import sha256_of
from exporters.manifest import MODULE_MANIFEST
from exporters.modules.manifest import SAMPLES, ModuleManifest, is_module

_HOST: Final = "host"


@dataclass
class Subject:
    """An artifact of a module to measure.

    Attributes:
        folder: as the user named it.
        manifest: its manifest.
        sample: the call: the example inputs, or the first ones that verify the artifact.
        sessions: every process that ran it.
    """

    folder: Path
    manifest: ModuleManifest
    sample: Sample
    sessions: list[ModuleSession] = field(default_factory=list)

    @property
    def shapes(self) -> dict[str, str]:
        """The inputs of a call, each as ``dtype[dims]``."""
        return {
            name: f"{array.dtype}{list(array.shape)}" for name, array in self.sample.inputs.items()
        }

    def open(self, threads: int | None) -> ModuleSession:
        """Starts a fresh process of it."""
        self.sessions.append(ModuleSession(self.folder, threads, self.sample.inputs))
        return self.sessions[-1]

    def judged(self, cell: Cell) -> Cell:
        """A cell that says whether its last outputs are those of the quantized module."""
        given = next((each.outputs for each in reversed(self.sessions) if each.outputs), None)
        if cell.text.verdict == "failed" or given is None:
            return cell
        worst = {
            name: relative_difference(given[name], wanted)
            for name, wanted in self.sample.quantized.items()
        }
        limit = self.manifest.tolerance
        bad = [name for name, value in worst.items() if not value <= limit]  # NaN is bad, too
        reason = ""
        if bad:
            reason = (
                f"the output {bad[0]} differs from the quantized module's by "
                f"{worst[bad[0]]:.3g} of its range; {limit:g} is allowed"
            )
        text = TextCheck(
            "failed" if bad else "passed",
            agreed=len(worst) - len(bad),
            of=len(worst),
            leading=len(worst) - len(bad),
            reference="the quantized module",
            reason=reason,
        )
        return replace(cell, text=text)


def measure_modules(
    folders: Sequence[Path], options: BenchOptions, progress: Progress, clock: Clock
) -> Bench:
    """Measures artifacts of modules by turns, by the protocol of language models.

    A run is a call with the artifact's first sample and further ones with the same inputs, for half
    a second or `device_harness.module_worker.MOST_CALLS` calls. What a cell calls its text is
    whether the outputs are the quantized module's.

    Args:
        folders: the artifacts.
        options: what the user asked for.
        progress: told of the runs.
        clock: to wait by.

    Raises:
        UsageError: an option is one of language models, or an artifact is none of a module.
        ExportError: a folder is no artifact.
    """
    _refuse(folders, options)
    subjects = [_subject(folder) for folder in folders]
    shapes = {tuple(each.shapes.items()) for each in subjects}
    if len(shapes) > 1:
        raise UsageError(
            f"{subjects[0].folder} and the others take inputs of other shapes, which are no "
            f"measure of each other: measure them in calls of their own"
        )
    with open_device(_HOST, progress=progress) as device:
        record = DeviceRecord(_HOST, told(device.facts(), _HOST), device.limits)
        site = Site(_HOST, partial(look, device), options.rules, clock)
        turns = measure_point(
            site,
            [_arm(each, options.threads) for each in subjects],
            1,
            MOST_CALLS + 1,
            lambda done, of: progress(f"measure on {_HOST}", done, of),
        )
    cells = tuple(
        each.judged(replace(cell, edgeforge=edgeforge_version(), shapes=each.shapes))
        for cell, each in zip(turns.cells, subjects, strict=True)
    )
    return Bench((record,), cells, tuple(_told_ratios(turns.ratios, cells)))


def _told_ratios(ratios: Iterable[ArmRatio], cells: Sequence[Cell]) -> list[ArmRatio]:
    """The ratios of warm calls, but of those whose outputs are not the module's."""
    bad = {cell.artifact.manifest for cell in cells if cell.text.verdict == "failed"}
    return [
        each for each in ratios if each.figure == "decode" and not bad & {each.of, each.against}
    ]


def _refuse(folders: Sequence[Path], options: BenchOptions) -> None:
    """Refuses what a measurement of modules does not have.

    Raises:
        UsageError: names it.
    """
    others = [folder for folder in folders if not is_module(folder)]
    if others:
        raise UsageError(f"{others[0]} is no artifact of a module: measure it in a call of its own")
    given: dict[str, object] = {
        f"--{name.replace('_', '-')}": value for name, value in options.runtime.items()
    }
    given |= {"--instructions": options.instructions or None, "--runner": options.runner}
    given |= {"--prompt": options.prompts or None, "--output": options.outputs or None}
    for name, value in given.items():
        if value is not None:
            raise UsageError(
                f"{name} is for language models: a module is called with its example inputs, so "
                f"leave it out"
            )
    if options.devices != (_HOST,):
        raise UsageError(
            f"modules are measured on {_HOST} alone, not on {', '.join(options.devices)}: leave "
            f"--device out"
        )


def _arm(subject: Subject, threads: int | None) -> Arm:
    return Arm(
        artifact=_measured(subject),
        open=partial(subject.open, threads),
        prompt=_no_tokens,
        threads=threads,
    )


def _no_tokens(count: int) -> Tokens:
    return np.zeros(count, np.int64)


def _subject(folder: Path) -> Subject:
    return Subject(folder, ModuleManifest.read(folder), read_samples(folder / SAMPLES)[0])


def _measured(subject: Subject) -> Measured:
    manifest = subject.manifest
    return Measured(
        folder=str(subject.folder),
        target=manifest.target,
        recipe=manifest.recipe,
        model=manifest.source or manifest.module,
        checkpoint="",
        manifest=sha256_of(subject.folder / MODULE_MANIFEST),
        context=0,
        bits_per_weight=manifest.bits_per_weight,
        bytes=sum(record.size for record in manifest.files.values()),
    )
