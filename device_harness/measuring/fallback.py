"""Whether a runtime fell back to another processor than the one that was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

_ASKED: Final[Mapping[tuple[str, str], str]] = {
    ("backend", "vulkan"): "GPU",
    ("backend", "coreml"): "Neural Engine or GPU",
    ("profile", "ane"): "Neural Engine",
    ("compute_units", "cpu-and-gpu"): "GPU",
    ("compute_units", "cpu-and-ne"): "Neural Engine",
}
"""By an option of the export or of the run, the processor that it is for."""


def fell_back(exported: Mapping[str, object], given: Mapping[str, str], ran: str) -> str:
    """Names a silent fall-back, one sentence; empty where there is none, or it is not known.

    Args:
        exported: options of the export, from the manifest.
        given: options of the run.
        ran: which processor ran, as the runtime says; empty where it does not.

    >>> fell_back({"backend": "vulkan"}, {}, "CPU")
    'it was to run on GPU (backend vulkan) and ran on CPU: the runtime fell back'
    >>> fell_back({"backend": "vulkan"}, {}, "GPU 120, CPU 3"), fell_back({}, {}, "CPU")
    ('', '')
    """
    asked = {**{name: str(value) for name, value in exported.items()}, **given}
    for (name, value), processor in _ASKED.items():
        if ran and asked.get(name) == value and not any(p in ran for p in processor.split(" or ")):
            return (
                f"it was to run on {processor} ({name.replace('_', ' ')} {value}) and ran on "
                f"{ran}: the runtime fell back"
            )
    return ""
