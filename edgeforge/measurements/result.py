"""What becomes of a measurement that has no figures to trust."""

from __future__ import annotations

from collections.abc import Sequence

from device_harness.errors import DeviceError, LogitsNotFiniteError
from device_harness.measuring.bench import Bench
from edgeforge.errors import CheckFailed


class BenchFailed(CheckFailed):
    """What a device generated is not the model's text.

    Attributes:
        bench: everything that was measured.
    """

    def __init__(self, message: str, bench: Bench) -> None:
        super().__init__(message)
        self.bench = bench


class BenchNotFinite(LogitsNotFiniteError):
    """An artifact gives NaN or infinite logits.

    Attributes:
        bench: everything that was measured.
    """

    def __init__(self, message: str, bench: Bench) -> None:
        super().__init__(message)
        self.bench = bench


class DevicesFailed(DeviceError):
    """At least one device could not be reached, or could not run what it was given.

    Attributes:
        bench: everything that was measured, also on the others.
    """

    def __init__(self, message: str, bench: Bench) -> None:
        super().__init__(message)
        self.bench = bench


def require_measured(bench: Bench) -> None:
    """Refuses a measurement in which a device failed, or generated what is no text.

    Raises:
        DevicesFailed: a device could not be reached, or nothing counts that ran on it.
        BenchNotFinite: all that failed gave NaN or infinite logits.
        BenchFailed: a text is not the model's.
    """
    lost = [_of_device(each.name, each.failure) for each in bench.devices if each.failure]
    texts, finite = [], True
    for cell in bench.cells:
        words = f"{cell.artifact.folder} on {cell.device}, {cell.lengths}"
        if cell.text.verdict == "failed":
            texts.append(f"{words}: {cell.text.reason}")
            finite = finite and not cell.text.is_not_finite
        elif cell.failed:
            lost.append(f"{words}: {cell.failed}")
    if lost:
        raise DevicesFailed(_sentence([*lost, *texts]), bench)
    if texts:
        raise (BenchFailed if finite else BenchNotFinite)(_sentence(texts), bench)


def _of_device(name: str, failure: str) -> str:
    """A failure that names its device, once."""
    return failure if failure.startswith(name) else f"{name}: {failure}"


def _sentence(problems: Sequence[str]) -> str:
    more = f" (and {len(problems) - 1} more)" if problems[1:] else ""
    return f"{problems[0]}{more}"
