"""One artifact on its way through a measurement: a process on the device, and its runs so far."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Final, Protocol

from device_harness.devices.device import Condition
from device_harness.errors import DeviceError, LogitsNotFiniteError
from device_harness.measuring.clock import Clock
from device_harness.measuring.conditions import ClockLimits, Rested, cool_down
from device_harness.measuring.fallback import fell_back
from device_harness.measuring.record import Cell, Measured, Outcome, Run, Start, TextCheck
from device_harness.measuring.rules import Rules
from device_harness.session import Tokens
from device_harness.timed_run import TimedRun

MOST_FAILURES: Final = 2
"""After so many failed runs in a row, an artifact is not run again."""


class TimedSession(Protocol):
    """An artifact in a process on a device, as `device_harness.device_session` has it."""

    @property
    def runtime(self) -> str:
        """The runtime's name, version and threads."""

    @property
    def limits(self) -> tuple[str, ...]:
        """What a run there cannot tell, one sentence each."""

    @property
    def processor(self) -> str:
        """The processor that runs the artifact; empty if not known."""

    def load(self) -> Mapping[str, Any]:
        """Loads the artifact; ``seconds`` of what it gives is how long that took."""

    def timed(self, prompt: Tokens, output: int) -> TimedRun:
        """Runs a prompt and generates greedily, timed on the device itself."""

    def close(self) -> None:
        """Ends the process."""


@dataclass(frozen=True)
class Arm:
    """An artifact to measure.

    Attributes:
        artifact: what it is.
        open: starts a fresh process of it on the device.
        prompt: its prompt of a number of tokens, ``int64[t]``.
        threads: that the runtime was asked to take; None for its default.
        options: of the runtime.
        was_installed: whether the last ``open`` put it on the device, so that its first run is the
            first ever; None where the device does not say.
    """

    artifact: Measured
    open: Callable[[], TimedSession]
    prompt: Callable[[int], Tokens]
    threads: int | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    was_installed: Callable[[], bool | None] = lambda: None


@dataclass
class Site:
    """A device that is measured on, with what has been seen of it.

    Attributes:
        name: the device's.
        look: asks how it is now; None where it cannot be asked.
        rules: how to measure.
        clock: to wait by.
        limits: the highest clocks it has allowed.
    """

    name: str
    look: Callable[[], Condition | None]
    rules: Rules
    clock: Clock
    limits: ClockLimits = field(default_factory=ClockLimits)

    def rest(self) -> Rested:
        """Leaves the device alone until it is cool."""
        rested = cool_down(self.look, self.rules, self.clock)
        self.limits.see(rested.condition)
        return rested


class Lane:
    """Runs one arm at one length of prompt and of output.

    Args:
        site: where.
        arm: what.
        prompt: tokens of the prompt.
        output: tokens to generate.

    Attributes:
        cell: what was found so far.
        rounds: the run of each round, by its number.
        session: the process; None where there is none now.
    """

    def __init__(self, site: Site, arm: Arm, prompt: int, output: int) -> None:
        self.site, self.arm = site, arm
        self.cell = Cell(
            arm.artifact,
            site.name,
            prompt,
            output,
            rules=site.rules,
            at=site.clock.now(),
            threads=arm.threads,
            options=arm.options,
        )
        self.rounds: dict[int, Run] = {}
        self.session: TimedSession | None = None
        self.tokens: Tokens | None = None
        self._failures = 0

    @property
    def has_ended(self) -> bool:
        """Whether the arm is not to be run any more."""
        return bool(self.cell.failure)

    def begin(self) -> None:
        """Starts a fresh process, runs it cold, then as often as it takes to be warm."""
        while not self.has_ended and self.session is None:
            self._open()

    def run_round(self, number: int) -> None:
        """One warm run that counts, if the device lets it."""
        self.begin()
        if not self.has_ended:
            self.rounds[number] = self.run("warm", "counted")

    def close(self) -> None:
        """Ends the process."""
        if self.session is not None:
            with suppress(DeviceError):
                self.session.close()
            self.session = None

    def run(self, start: Start, outcome: Outcome, load_seconds: float | None = None) -> Run:
        """Runs once and keeps what came of it; a failure ends the process."""
        rested = self.site.rest() if outcome == "counted" else Rested(None, "unknown", 0.0)
        run = Run(
            start=start,
            outcome=outcome,
            at=self.site.clock.now(),
            load_seconds=load_seconds,
            waited_seconds=rested.waited,
            cool=rested.cool,
            before=_json(rested.condition),
        )
        try:
            run = self.filled(run, self.timed())
        except LogitsNotFiniteError as error:
            return self._end_without_text(replace(run, outcome="failed", reason=str(error)))
        except DeviceError as error:
            return self.fail(replace(run, outcome="failed", reason=str(error)))
        self._failures = 0
        if outcome == "counted":
            run = self._judged(run, rested)
        return self._keep(run)

    def timed(self) -> TimedRun:
        """One run, of which nothing is kept.

        Raises:
            DeviceError: the device fails.
            LogitsNotFiniteError: it gives logits that are no numbers.
        """
        assert self.session is not None
        if self.tokens is None:
            self.tokens = self.arm.prompt(self.cell.prompt)
        timed = self.session.timed(self.tokens, self.cell.output)
        if timed.not_finite:
            runtime = self.session.runtime.split(" (")[0]
            where = timed.where or "the runtime does not show where they come from"
            raise LogitsNotFiniteError(
                f"{runtime} gives NaN or infinite logits in {timed.not_finite} calls; {where}: "
                f"times of them mean nothing"
            )
        return timed

    def filled(self, run: Run, timed: TimedRun) -> Run:
        """A run with what was timed of it."""
        return replace(
            run,
            first_token_seconds=timed.first_token_seconds,
            step_seconds=timed.step_seconds,
            tokens=timed.tokens,
            peak_bytes=timed.peak_bytes,
        )

    def fail(self, run: Run) -> Run:
        """Keeps a failed run and ends the process; after two in a row, the arm has ended."""
        self._failures += 1
        self.close()
        if self._failures >= MOST_FAILURES:
            words = f"{self._failures} runs in a row failed, the last because {run.reason}"
            self.cell = replace(self.cell, failure=words)
        return self._keep(run)

    def _open(self) -> None:
        begun = self.site.clock.now()
        try:
            self.session = self.arm.open()
            loaded = self.session.load()["seconds"]
        except DeviceError as error:
            self.fail(Run("cold", "failed", begun, reason=str(error)))
            return
        first_ever = self.arm.was_installed() is True and not self.cell.runs
        processor = self.session.processor
        fell = fell_back(self.arm.artifact.options, self.arm.options, processor)
        notes = [*self.cell.notes, *([f"{self.arm.artifact.folder}: {fell}"] if fell else [])]
        self.cell = replace(
            self.cell,
            runtime=self.session.runtime,
            processor=processor,
            notes=tuple(dict.fromkeys([*notes, *self.session.limits])),
        )
        self.run("first-ever" if first_ever else "cold", "counted", float(loaded))
        for _ in range(self.site.rules.warm_up):
            if self.session is not None:
                self.run("warm", "warm-up")

    def _judged(self, run: Run, rested: Rested) -> Run:
        """Excludes a run of a device that was warm, or that slowed its clocks."""
        after = self.site.look()
        self.site.limits.see(after)
        reason = self.site.limits.dropped(rested.condition) or self.site.limits.dropped(after)
        if rested.cool == "not cool":
            reason = f"the device was not cool after {rested.waited:.0f} s of waiting"
        run = replace(run, after=_json(after))
        return replace(run, outcome="excluded", reason=reason) if reason else run

    def _end_without_text(self, run: Run) -> Run:
        """Ends the arm: it would give no numbers again."""
        self.close()
        text = TextCheck("failed", reason=run.reason)
        self.cell = replace(self.cell, failure=run.reason, text=text)
        return self._keep(run)

    def _keep(self, run: Run) -> Run:
        self.cell = replace(self.cell, runs=(*self.cell.runs, run))
        return run


def _json(condition: Condition | None) -> Mapping[str, Any] | None:
    return None if condition is None else condition.as_json()
