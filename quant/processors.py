"""What is known of this machine's processor, and the default number of threads."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path


def default_threads() -> int:
    """Returns one thread per processor, four at most."""
    return min(4, os.cpu_count() or 1)


def processor_name() -> str:
    """The model's name; the architecture where the system does not tell it."""
    place = Path("/proc/cpuinfo")
    if place.is_file():
        named = re.search(r"^model name\s*:\s*(.+)$", place.read_text(errors="replace"), re.M)
        if named:
            return named[1].strip()
    return platform.processor() or platform.machine()


def processor_kind() -> str:
    """Returns the processor's name and the vectors that PyTorch uses on it.

    Where two processors differ in these, products of floats may be rounded differently.
    """
    import torch

    return f"{processor_name()}, {torch.backends.cpu.get_cpu_capability()}"
