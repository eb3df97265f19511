"""Starts Python in a process of its own, in which no file of the current folder becomes code.

A user stands in folders that strangers made: an artifact, or a checkpoint that was unpacked here.
``python -m`` and ``python -c`` put the current folder first on the path, so that its ``json.py``
would be run in place of Python's own; so would an empty or relative entry of ``PYTHONPATH``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Final

PYTHON: Final = "EDGEFORGE_PYTHON"
_ROOT: Final = Path(__file__).absolute().parents[1]
# The packages come from where this process found them, though that folder be on the child's path
# in another place or, as a checkout's, nowhere.
_BEGIN: Final = """
import sys
from importlib.util import module_from_spec, spec_from_file_location
root, module = sys.argv[1:3]
del sys.argv[1:3]
for name in ("quant", "exporters", "device_harness", "edgeforge"):
    place = f"{root}/{name}"
    spec = spec_from_file_location(
        name, f"{place}/__init__.py", submodule_search_locations=[place]
    )
    sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
from importlib import import_module
import_module(module).main()
"""


def python_command(module: str, *arguments: str) -> list[str]:
    """Returns the command that runs the function ``main`` of one of EdgeForge's modules.

    Args:
        module: the module's full name.
        arguments: what ``main`` finds in ``sys.argv``.
    """
    return [*interpreter(), "-P", "-c", _BEGIN, str(_ROOT), module, *arguments]


def interpreter() -> list[str]:
    """Returns the command that starts this Python again.

    Where it runs in an emulator, or by a loader of its own, its file alone cannot be started:
    whoever starts it there says how in ``$EDGEFORGE_PYTHON``, as a list in JSON.
    """
    given = os.environ.get(PYTHON)
    return [str(word) for word in json.loads(given)] if given else [sys.executable]


def script_command(script: Path, *arguments: str) -> list[str]:
    """Returns the command that runs a file which imports nothing of EdgeForge.

    Args:
        script: the file.
        arguments: what it finds in ``sys.argv``.
    """
    return [sys.executable, "-P", str(script), *arguments]


def module_command(module: str, *arguments: str) -> list[str]:
    """Returns the command that runs a module of another package as a program.

    Args:
        module: the module's name, such as ``pip``.
        arguments: what it finds in ``sys.argv``.
    """
    return [sys.executable, "-P", "-m", module, *arguments]


def python_environment() -> dict[str, str]:
    """Returns this process's environment, without what leads a child to the current folder.

    >>> import os, unittest.mock
    >>> with unittest.mock.patch.dict(os.environ, PYTHONPATH="/a::b:/c"):
    ...     python_environment()["PYTHONPATH"]
    '/a:/c'
    """
    environment = dict(os.environ)
    given = environment.pop("PYTHONPATH", "")
    kept = [entry for entry in given.split(os.pathsep) if os.path.isabs(entry)]
    if kept:
        environment["PYTHONPATH"] = os.pathsep.join(kept)
    return environment
