"""EdgeForge compiles language models for phones: one trace, one quantization, verified artifacts.

This module also offers the functions of `edgeforge.api` and imports them when they are first used,
so that ``import edgeforge`` stays fast.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgeforge.api import bench, export, load, verify

DISTRIBUTION = "edgeforge"

__all__ = ["bench", "export", "load", "verify"]


def _refuse_intruders() -> None:
    """Refuses an installation in which another package has taken the name of one of ours.

    The other three top-level packages have plain names, such as ``quant``, that are not unique.

    Raises:
        ImportError: Python finds another package, or none, under one of the names.
    """
    from importlib import import_module

    for floor in ("device_harness", "exporters", "quant"):
        spec = find_spec(floor)
        found = None if spec is None else import_module(floor)
        if getattr(found, "DISTRIBUTION", None) != DISTRIBUTION:
            where = "nowhere" if spec is None else spec.origin or spec.submodule_search_locations
            raise ImportError(
                f"edgeforge needs its own package {floor!r}, but Python finds {where}: uninstall "
                f"or rename that one, or use a virtual environment with edgeforge alone"
            )


def __getattr__(name: str) -> object:
    if name in __all__:
        from edgeforge import api

        return getattr(api, name)
    raise AttributeError(f"module 'edgeforge' has no attribute {name!r}")


_refuse_intruders()
