"""Runs a user's script to get a module: ``script.py:factory``. It is the user's own code."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeforge.errors import UsageError
from edgeforge.modules.trace import place_of
from quant.suggestion import did_you_mean

if TYPE_CHECKING:
    from edgeforge.modules.trace import DynamicShapes
    from edgeforge.modules.values import Example

_FORM = "(module, example_inputs) or (module, example_inputs, dynamic_shapes)"


@dataclass(frozen=True)
class Made:
    """What a factory returns.

    Attributes:
        module: the module.
        example: the example inputs.
        dynamic_shapes: by input, ``{axis: torch.export.Dim}``; None where all sizes are fixed.
    """

    module: object
    example: Example
    dynamic_shapes: DynamicShapes = None


def run_factory(source: str) -> Made:
    """Runs a script and calls one of its functions without arguments.

    The script's folder is on the path of imports meanwhile, behind everything else.

    Args:
        source: ``script.py:factory``.

    Raises:
        UsageError: there is no such script or function, its code fails, or it returns something
            else than a module with example inputs.
    """
    script, _, name = source.rpartition(":")
    path = Path(script).expanduser()
    if not name or path.suffix != ".py":
        raise UsageError(
            f"{source!r} names no factory: give script.py:factory, or a folder of "
            f"sentence-transformers"
        )
    try:
        code = path.read_bytes()
    except OSError as error:
        raise UsageError(f"the script {path} cannot be read: {error.strerror}") from error
    with _importing_from(path.resolve().parent):
        namespace = _run(path, code)
        factory = namespace.get(name)
        if not callable(factory):
            known = [
                key for key, value in namespace.items() if isinstance(value, types.FunctionType)
            ]
            raise UsageError(
                f"{path} has no function {name!r}{did_you_mean(name, known)}; it has "
                f"{', '.join(known) or 'none'}"
            )
        try:
            made = factory()
        except (Exception, SystemExit) as error:  # the user's own code may raise anything
            raise UsageError(
                f"the factory {name} fails{place_of(error)}: {type(error).__name__}: {error}"
            ) from error
    if not isinstance(made, tuple) or len(made) not in (2, 3):
        raise UsageError(f"the factory {name} returns a {type(made).__name__}; it returns {_FORM}")
    return Made(*made)


def _run(path: Path, code: bytes) -> dict[str, Any]:
    module = types.ModuleType(path.stem)
    module.__file__ = str(path)
    try:
        exec(compile(code, str(path), "exec"), module.__dict__)
    except SyntaxError as error:
        raise UsageError(
            f"the script {error.filename}:{error.lineno} is not Python: {error.msg}"
        ) from error
    except (Exception, SystemExit) as error:
        raise UsageError(
            f"the script fails{place_of(error)}: {type(error).__name__}: {error}"
        ) from error
    return module.__dict__


@contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    """Lets a script import what lies beside it; nothing there stands in for another module."""
    sys.path.append(str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
