"""The errors that users see: each message is one sentence, each class has an exit code."""

from __future__ import annotations

from typing import ClassVar


class EdgeForgeError(Exception):
    """Base of every error whose message is meant for the user.

    Attributes:
        exit_code: The command line's exit code: 1 for a failed check, 2 for usage, 3 for a
            checkpoint, 4 for quantization, 5 for export, 6 for a device.
    """

    exit_code: ClassVar[int] = 1


class UsageError(EdgeForgeError, ValueError):
    """An option, a name or an output folder that the user gave cannot be used."""

    exit_code: ClassVar[int] = 2


class CheckpointError(EdgeForgeError, ValueError):
    """A checkpoint is missing, damaged, or holds something EdgeForge does not read."""

    exit_code: ClassVar[int] = 3


class DiskFullError(EdgeForgeError, OSError):
    """The disk, a quota or a file size limit stopped an output from being written."""

    exit_code: ClassVar[int] = 5


class CheckFailed(EdgeForgeError):
    """A check ran to its end and the artifact did not pass it."""

    exit_code: ClassVar[int] = 1
