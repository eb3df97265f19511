"""Readers of artifacts' meaning by the name of the target.

To add one, write a ``lifted.py`` in the target's folder and add a row to `READERS`. An artifact of
a target without one is verified all the same; what was not read is said.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from exporters.lifted import Reading
from exporters.manifest import Manifest


def _onnx(folder: Path, manifest: Manifest) -> Reading:
    from exporters.onnx.lifted import read_graphs
    from exporters.onnx.target import graphs_of

    return read_graphs(folder, graphs_of(folder), manifest.context)


def _coreml(folder: Path, manifest: Manifest) -> Reading:
    from exporters.coreml.carried import ANE_MULTIPLE
    from exporters.coreml.lifted import read_package
    from exporters.coreml.names import PACKAGE
    from exporters.coreml.package import open_package

    engine = manifest.options.get("profile") == "ane"
    package = open_package(folder / PACKAGE)
    return read_package(
        package,
        manifest.context,
        cache_multiple=ANE_MULTIPLE if engine else 1,
        floats="float16" if engine else "float32",
    )


def _executorch(folder: Path, manifest: Manifest) -> Reading:
    from exporters.executorch.lifted import read_program
    from exporters.executorch.target import MODEL

    return read_program(folder / MODEL, manifest.context)


READERS: Final[Mapping[str, Callable[[Path, Manifest], Reading]]] = {
    "onnx": _onnx,
    "coreml": _coreml,
    "executorch": _executorch,
}
