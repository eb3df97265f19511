"""Checks that the installed ExecuTorch is the version that EdgeForge works with."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Final

from exporters.errors import ExportError

SUPPORTED: Final = "1.4.1"


def require_executorch(why: str) -> str:
    """Returns the installed version of ExecuTorch.

    Args:
        why: what needs it, as the end of a sentence, such as ``this artifact runs in it``.

    Raises:
        ExportError: ExecuTorch is not installed, or is a version that EdgeForge is not tested
            with.
    """
    install = 'pip install "edgeforge[executorch]"'
    try:
        installed = version("executorch")
    except PackageNotFoundError:
        raise ExportError(f"ExecuTorch is not installed, and {why}: {install}") from None
    if installed != SUPPORTED:
        raise ExportError(
            f"ExecuTorch {installed} is installed; EdgeForge's artifacts are for {SUPPORTED}, and "
            f"{why}: {install}"
        )
    return installed
