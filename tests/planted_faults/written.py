"""Writes an artifact with a fault, as an exporter with a bug would write it.

The fault is in what is lowered, or in one step of the lowering; all else is EdgeForge's own. The
manifest records the checkpoint and the plan as always, and the digests of what the files now hold.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest.mock import patch

from edgeforge.artifact_manifest import write_manifest
from exporters.blobs import Blob
from exporters.manifest import Manifest, record_files
from exporters.target import ExportRequest
from quant.program.program import Program
from tests.planted_faults.captured import Captured

Change = Callable[[Program], Program]
Within = Callable[[Captured], AbstractContextManager[None]]


@dataclass(frozen=True)
class Fault:
    """A fault that an exporter may have.

    Attributes:
        name: its name in tests and tables.
        about: what is wrong, in words.
        fact: the name of the check of the meaning that must name it; empty where none can.
        weights: whether the stored weights are others, which the weight store tells.
        everywhere: changes the program of every entry point.
        shipped: changes the program of the entry points that apps call, and of no other.
        request: changes what the target is given; takes a folder for files of its own.
        edit: changes the written files, by target.
        within: a context in which the files are written, by target.
        fits: whether a program can have this fault.
    """

    name: str
    about: str
    fact: str = ""
    weights: bool = False
    everywhere: Callable[[Captured], Change] | None = None
    shipped: Callable[[Captured], Change] | None = None
    request: Callable[[ExportRequest, Path], ExportRequest] | None = None
    edit: Mapping[str, Callable[[Path, Captured], None]] = field(default_factory=dict)
    within: Mapping[str, Callable[[Captured], AbstractContextManager[None]]] = field(
        default_factory=dict
    )
    fits: Callable[[Captured], bool] = lambda captured: True


def write_faulty(captured: Captured, fault: Fault | None, folder: Path, apart: Path) -> Manifest:
    """Writes an artifact with a fault; with none, a sound one.

    Args:
        captured: what a sound export would write.
        fault: the fault.
        folder: the artifact's folder, which does not exist.
        apart: a folder for files that the fault needs, such as an altered weight store.

    Returns:
        The artifact's manifest.
    """
    folder.mkdir(parents=True)
    request, target = captured.request, captured.target
    sound = shipped = captured.program
    if fault is not None and fault.everywhere is not None:
        sound = shipped = fault.everywhere(captured)(captured.program)
    if fault is not None and fault.shipped is not None:
        shipped = fault.shipped(captured)(captured.program)
    request = replace(request, program=sound)
    if fault is not None and fault.request is not None:
        apart.mkdir(parents=True, exist_ok=True)
        request = fault.request(request, apart)
    with ExitStack() as contexts:
        contexts.enter_context(_tables_by_content())
        if shipped is not sound:
            contexts.enter_context(_shipped_from(shipped, sound))
            if target.name == "coreml":
                request = replace(request, program=shipped)
        if fault is not None and target.name in fault.within:
            contexts.enter_context(fault.within[target.name](captured))
        lowered = target.write(request, folder)
    if fault is not None and target.name in fault.edit:
        fault.edit[target.name](folder, captured)
    write_manifest(captured.run, target, captured.made, lowered, captured.warnings, folder)
    refresh(folder, captured)
    return Manifest.read(folder)


def refresh(folder: Path, captured: Captured) -> None:
    """Records in the manifest what the files hold now."""
    manifest = Manifest.read(folder)
    digests = captured.target.stored_digests(folder)
    weights = {
        name: replace(record, digest=digests.get(name, record.digest))
        for name, record in manifest.weights.items()
    }
    replace(manifest, weights=weights, files=record_files(folder)).write(folder)


@contextmanager
def _tables_by_content() -> Iterator[None]:
    """Entry points share tables of equal names; here only those of equal content."""
    from exporters.coreml.weight_file import WeightFile as CoremlFile
    from exporters.executorch.state import MethodLowering
    from exporters.onnx.weight_file import WeightFile as OnnxFile

    place_bytes, place = OnnxFile.place_bytes, CoremlFile.place

    def onnx_place(self, key, data):
        return place_bytes(self, (key, _digest(data)), data)

    def coreml_place(self, key, dtype, count, blob):
        if isinstance(blob, Blob) and isinstance(blob.source, bytes):
            key = (key, _digest(blob.source))
        return place(self, key, dtype, count, blob)

    def executorch_table(self, key, data, shape):
        buffer = self.file.constant(f"{key} {_digest(data)}", Blob(data))
        return self.method.constant("float32", shape, buffer, key)

    with (
        patch.object(OnnxFile, "place_bytes", onnx_place),
        patch.object(CoremlFile, "place", coreml_place),
        patch.object(MethodLowering, "table", executorch_table),
    ):
        yield


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


@contextmanager
def _shipped_from(shipped: Program, sound: Program) -> Iterator[None]:
    """Lowers what apps call from one program, and what only `verify` calls from another."""
    from exporters import last_token
    from exporters.coreml import names, state

    keep, lowering = last_token.keep_last_token, state.FunctionLowering

    def lower(program, bank, name, *rest):
        given = sound if name == names.VERIFY else program
        return lowering(given, bank, name, *rest)

    with (
        patch.object(last_token, "keep_last_token", lambda program: keep(shipped)),
        patch.object(state, "FunctionLowering", lower),
    ):
        yield
