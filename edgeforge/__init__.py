"""EdgeForge compiles language models for phones: one trace, one quantization, verified artifacts.

This module also offers the functions of `edgeforge.api` and imports them when they are first used,
so that ``import edgeforge`` stays fast.
"""

# Until `_leave_current_folder` has run, a file of the current folder may stand in for any module
# that Python itself has not imported yet, `__future__` and `typing` included.
import os
import sys
from importlib.util import find_spec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from edgeforge.api import (
        bench,
        check,
        compare,
        conversation,
        diagnose,
        export,
        export_adapter,
        export_module,
        load,
        plan,
        report,
        verify,
        verify_module,
    )

DISTRIBUTION = "edgeforge"
_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

__all__ = [
    "bench",
    "check",
    "compare",
    "conversation",
    "diagnose",
    "export",
    "export_adapter",
    "export_module",
    "load",
    "plan",
    "report",
    "verify",
    "verify_module",
]


def _refuse_intruders() -> None:
    """Refuses an installation in which another package has taken the name of one of ours.

    The other three top-level packages have plain names, such as ``quant``, that are not unique.

    Raises:
        ImportError: Python finds another package, or none, under one of the names.
    """
    from importlib import import_module

    for floor in ("device_harness", "exporters", "quant"):
        spec = find_spec(floor)
        # A package elsewhere is an intruder, and its code is not run to learn that.
        is_beside = spec is not None and spec.origin == os.path.join(_ROOT, floor, "__init__.py")
        found = import_module(floor) if is_beside else None
        if getattr(found, "DISTRIBUTION", None) != DISTRIBUTION:
            where = "nowhere" if spec is None else spec.origin or spec.submodule_search_locations
            raise ImportError(
                f"edgeforge needs its own package {floor!r}, but Python finds {where}: uninstall "
                f"or rename that one, or use a virtual environment with edgeforge alone"
            )


def _leave_current_folder() -> None:
    """Takes the current folder off the path of a process that is EdgeForge's command line.

    ``python -m edgeforge`` puts it first, and an empty or relative entry of ``PYTHONPATH``
    anywhere: an artifact's ``json.py`` would be run in place of Python's own. A folder from which
    EdgeForge itself was loaded stays.
    """
    program = sys.argv[0] if sys.argv else ""
    if program != "-m" and os.path.basename(program) != DISTRIBUTION:
        return
    if program == "-m" and not sys.flags.safe_path and sys.path[0] != _ROOT:
        del sys.path[0]
    entries = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if not sys.flags.ignore_environment and entries != [""]:
        wanted = {os.path.abspath(entry) for entry in entries if os.path.isabs(entry)}
        relative = {os.path.abspath(entry) for entry in entries if not os.path.isabs(entry)}
        sys.path[:] = [entry for entry in sys.path if entry not in relative - wanted - {_ROOT}]


def __getattr__(name: str) -> object:
    if name in __all__:
        from edgeforge import api

        return getattr(api, name)
    raise AttributeError(f"module 'edgeforge' has no attribute {name!r}")


_leave_current_folder()
_refuse_intruders()
