"""The errors a user can meet: one sentence each, with the command line's exit code."""

from __future__ import annotations

from typing import ClassVar


class EdgeForgeError(Exception):
    """Base of every error whose message is meant for the user.

    Attributes:
        exit_code: What the command line exits with: 1 a check failed, 2 usage, 3 checkpoint,
            4 quantization, 5 export, 6 device.
    """

    exit_code: ClassVar[int] = 1


class UsageError(EdgeForgeError, ValueError):
    """What was asked for cannot be done as asked: an option, a name or an output folder."""

    exit_code: ClassVar[int] = 2


class CheckpointError(EdgeForgeError, ValueError):
    """A checkpoint is missing, damaged, or holds something EdgeForge does not read."""

    exit_code: ClassVar[int] = 3


class DiskFullError(EdgeForgeError, OSError):
    """The disk, a quota or a file size limit stopped an output from being written."""

    exit_code: ClassVar[int] = 5


class CheckFailed(EdgeForgeError):
    """A check ran to its end and found the artifact wanting."""

    exit_code: ClassVar[int] = 1
