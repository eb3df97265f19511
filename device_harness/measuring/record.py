"""`Cell`: what was measured of one artifact on one device, run by run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, get_args

from device_harness.measuring.conditions import Cool
from device_harness.measuring.rules import Rules
from device_harness.measuring.statistics import Summary, summarize

Start = Literal["first-ever", "cold", "warm"]
Outcome = Literal["counted", "warm-up", "excluded", "failed"]
TextVerdict = Literal["passed", "failed", "not checked"]
Figure = Literal["prefill", "decode", "first_token"]
STARTS: Final[tuple[str, ...]] = get_args(Start)
OUTCOMES: Final[tuple[str, ...]] = get_args(Outcome)
TEXT_VERDICTS: Final[tuple[str, ...]] = get_args(TextVerdict)
COOLS: Final[tuple[str, ...]] = get_args(Cool)
FIGURES: Final[tuple[str, ...]] = get_args(Figure)


@dataclass(frozen=True)
class Measured:
    """The artifact that a cell is of, as its manifest has it; no name of a file is looked at.

    Attributes:
        folder: as the user named it.
        target: the runtime's format.
        recipe: how it was quantized.
        model: the checkpoint, as the user named it at the export.
        checkpoint: digest of the checkpoint.
        manifest: digest of ``edgeforge.json``, which has the digests of all other files.
        context: the declared context, in tokens.
        bits_per_weight: stored bits divided by parameters.
        bytes: of all files.
        options: of the target, as the user gave them at the export: a backend, a profile.
    """

    folder: str
    target: str
    recipe: str
    model: str
    checkpoint: str
    manifest: str
    context: int
    bits_per_weight: float
    bytes: int
    options: Mapping[str, object] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """What to call it."""
        return f"{self.folder} ({self.target}, {self.recipe})"


@dataclass(frozen=True)
class Run:
    """One run: a prompt, then tokens one by one. Every run is kept, failed ones too.

    Attributes:
        start: ``first-ever``, the first process after the artifact was put on the device;
            ``cold``, the first run of a fresh process; or ``warm``, a later one of the same.
        outcome: ``counted``; ``warm-up``; ``excluded``, with the reason; or ``failed``.
        reason: why it does not count, a phrase; empty where it does.
        at: when it began, seconds since 1970, by the host's clock.
        load_seconds: from opening the files until the model could run; None of a warm run.
        first_token_seconds: from the prompt to the logits of its last position.
        step_seconds: of each later token.
        tokens: what was generated: one more than there are steps.
        peak_bytes: the peak resident memory so far of the process that runs the artifact.
        waited_seconds: how long the device was left alone before.
        cool: whether it was as cool then as the rules want it.
        before: its condition then; None where it could not be asked.
        after: its condition after the run.
    """

    start: Start
    outcome: Outcome
    at: float
    reason: str = ""
    load_seconds: float | None = None
    first_token_seconds: float | None = None
    step_seconds: tuple[float, ...] = ()
    tokens: tuple[int, ...] = ()
    peak_bytes: int | None = None
    waited_seconds: float = 0.0
    cool: Cool = "unknown"
    before: Mapping[str, Any] | None = None
    after: Mapping[str, Any] | None = None

    def figure(self, name: Figure, prompt: int) -> float | None:
        """A figure of the run; None where it has none.

        Args:
            name: ``prefill`` or ``decode``, tokens a second, or ``first_token``, seconds.
            prompt: tokens of the prompt.
        """
        if name == "decode":
            seconds = sum(self.step_seconds)
            return len(self.step_seconds) / seconds if seconds > 0 else None
        if not self.first_token_seconds:
            return None
        return (
            self.first_token_seconds
            if name == "first_token"
            else (prompt / self.first_token_seconds)
        )


@dataclass(frozen=True)
class TextCheck:
    """The text that the device generated, held against what this host would have chosen.

    Attributes:
        verdict: ``passed``, ``failed`` or ``not checked``.
        agreed: of the text that agrees least, for how many tokens this host chooses the same one
            after the same text.
        of: how many tokens it has.
        leading: how many of them come before the first that differs.
        allowed: how many may differ.
        reference: the runtime on this host; empty where nothing was run.
        reason: why it failed or was not checked, a phrase; empty where it passed.
    """

    verdict: TextVerdict
    agreed: int = 0
    of: int = 0
    leading: int = 0
    allowed: int = 0
    reference: str = ""
    reason: str = ""

    @property
    def is_not_finite(self) -> bool:
        """Whether there is no text, as the logits were NaN or infinite."""
        return self.verdict == "failed" and not self.of


@dataclass(frozen=True)
class Point:
    """One run of a sustained series, during which the device is never left alone.

    Attributes:
        seconds: when it began, since the series began.
        prefill: tokens a second.
        decode: tokens a second.
        after: the device's condition after it; None where it could not be asked.
    """

    seconds: float
    prefill: float
    decode: float
    after: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Runner:
    """A user's own program on the device, whose figures were read from what it printed.

    Attributes:
        path: of the program.
        arguments: that it was given.
        parser: which form of output was read, such as ``llama-bench``.
        figures: what it says, by name: tokens a second, seconds or bytes as the name tells.
    """

    path: str
    arguments: tuple[str, ...]
    parser: str
    figures: Mapping[str, float]


@dataclass(frozen=True)
class Cell:
    """One artifact on one device, with one length of prompt and of output.

    Attributes:
        artifact: what was measured.
        device: the device's name.
        prompt: tokens of the prompt.
        output: tokens generated, the first of which comes of the prompt itself.
        rules: how it was measured.
        at: when that began, seconds since 1970, by the host's clock.
        edgeforge: the version that measured.
        runs: every run, in order.
        runtime: the runtime's name, version and threads there.
        processor: which processor ran it, as the runtime says; empty where it does not.
        threads: that were asked for; None for the runtime's default.
        options: of the runtime, that were asked for.
        text: whether what was generated is text.
        sustained: the series, if one was asked for.
        notes: what a reader must know, one sentence each.
        failure: why there is no figure, one sentence; empty where there is.
        instructions: counted in one run, by class; None where they were not counted.
        runner: the user's own program, where one ran in place of EdgeForge's.
        shapes: of a module, the inputs of a call by name, each as ``dtype[dims]``; empty of a
            language model. A run of a module is calls with the same inputs, ``output`` at most:
            its first call stands where that of the prompt does, and each later one is a step.
    """

    artifact: Measured
    device: str
    prompt: int
    output: int
    rules: Rules = field(default_factory=Rules)
    at: float = 0.0
    edgeforge: str = ""
    runs: tuple[Run, ...] = ()
    runtime: str = ""
    processor: str = ""
    threads: int | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    text: TextCheck = field(default_factory=lambda: TextCheck("not checked"))
    sustained: tuple[Point, ...] = ()
    notes: tuple[str, ...] = ()
    failure: str = ""
    instructions: Mapping[str, int] | None = None
    runner: Runner | None = None
    shapes: Mapping[str, str] = field(default_factory=dict)

    @property
    def lengths(self) -> str:
        """What a run takes, in words."""
        return lengths_text(self.prompt, self.output, self.shapes)

    @property
    def unit(self) -> str:
        """What a second has some of, in words."""
        return "calls" if self.shapes else "tokens"

    @property
    def counted(self) -> list[Run]:
        """The warm runs that count."""
        return [run for run in self.runs if run.start == "warm" and run.outcome == "counted"]

    @property
    def cold(self) -> Run | None:
        """The first run of a fresh process that counts."""
        found = [run for run in self.runs if run.start != "warm" and run.outcome == "counted"]
        return found[0] if found else None

    @property
    def peak_bytes(self) -> int | None:
        """The largest peak of any run."""
        return max((run.peak_bytes for run in self.runs if run.peak_bytes), default=None)

    def summary(self, figure: Figure) -> Summary | None:
        """A figure over the runs that count; None where it has none.

        The speed of a text that is none is no speed: it is None where the text failed.
        """
        if self.text.verdict == "failed":
            return None
        found = [run.figure(figure, self.prompt) for run in self.counted]
        return summarize([value for value in found if value is not None])

    @property
    def failed(self) -> str:
        """Why the cell has no figure to trust, one sentence or phrase; empty where it has."""
        if self.failure or self.text.verdict == "failed":
            return self.failure or self.text.reason
        if self.runner is None and self.instructions is None and not self.counted:
            reasons = [run.reason for run in self.runs if run.outcome in ("failed", "excluded")]
            return f"no run counts: {reasons[-1]}" if reasons else "no run counts"
        return ""


def lengths_text(prompt: int, output: int, shapes: Mapping[str, str]) -> str:
    """What a run takes, in words.

    >>> lengths_text(128, 32, {}), lengths_text(1, 101, {"x": "float32[1, 3]"})
    ('128 + 32 tokens', 'calls with x float32[1, 3]')
    """
    if not shapes:
        return f"{prompt} + {output} tokens"
    return f"calls with {', '.join(f'{name} {text}' for name, text in shapes.items())}"
