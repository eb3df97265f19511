"""Adapters that lie beside an artifact's weights, and the targets whose files can hold them.

An adapter adds ``(x A) B`` to the products of some weights. The base's bytes stay as they are, and
without an adapter the artifact computes what it computed before.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from exporters.errors import ExportError

if TYPE_CHECKING:
    from exporters.adapter_pair import Pair

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class _Target:
    """How a target's artifacts take adapters.

    Attributes:
        write: takes the folder, the adapter's name, what it adds by weight, and all weights that
            an adapter may change; returns the name of the file that holds the adapter.
        check: refuses options of artifacts that take none.
    """

    write: Callable[[Path, str, Mapping[str, Pair], Collection[str]], str]
    check: Callable[[Mapping[str, object]], None] = lambda options: None


SEPARATE: Final = ("onnx", "coreml", "executorch")
"""The targets whose artifacts take adapters while they run."""


def write_adapter(
    target: str, folder: Path, name: str, pairs: Mapping[str, Pair], weights: Collection[str]
) -> str:
    """Writes an adapter beside an artifact's weights, and makes the artifact take it.

    Args:
        target: the artifact's target.
        folder: the artifact, or a copy of it that nobody uses yet.
        name: the adapter's name, by which it is switched on.
        pairs: what it adds, by the weight's name.
        weights: all weights that an adapter may change, so that further adapters find their place.

    Returns:
        The name of the file, or of the package, that holds it.

    Raises:
        ExportError: the target, or a product, takes no adapter.
    """
    return _targets()[target].write(folder, name, pairs, weights)


def check_separate(target: str, name: str, options: Mapping[str, object]) -> None:
    """Refuses, before any work, an adapter that cannot lie beside the weights.

    Args:
        target: the artifact's target.
        name: the adapter's name.
        options: the target's options that the user set, by name.

    Raises:
        ExportError: the target's files hold none, or the name cannot be a file's.
    """
    if target not in SEPARATE:
        raise ExportError(
            f"--adapter-mode separate is written for {' and '.join(SEPARATE)}, and not for "
            f"{target}: leave it out, and the adapter is merged into the weights"
        )
    if not _NAME.fullmatch(name):
        raise ExportError(
            f"the adapter's folder is named {name[:80]!r}, and files of an artifact are named "
            f"after it: rename it, with letters, digits, '.', '-' and '_'"
        )
    _targets()[target].check(options)


def _targets() -> dict[str, _Target]:
    from exporters.coreml import adapters as coreml
    from exporters.executorch import adapters as executorch
    from exporters.onnx.adapters import write_onnx_adapter

    return {
        "onnx": _Target(write_onnx_adapter),
        "coreml": _Target(
            lambda folder, name, pairs, _: coreml.write_coreml_adapter(folder, name, pairs),
            coreml.check_options,
        ),
        "executorch": _Target(
            lambda folder, name, pairs, _: executorch.write_executorch_adapter(folder, name, pairs),
            executorch.check_options,
        ),
    }
