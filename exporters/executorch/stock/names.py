"""Which weight is which in a program that ExecuTorch's exporter wrote.

Its exporter keeps no names: data is called by a digest of itself, constants by a number. Right
after the export every tensor of the file is therefore held against the store's weights, by the
digest of its integers and scales; what matched is written beside the program. Reading back needs
that file for names alone: integers and scales come from the program.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

import numpy as np

from exporters.errors import ExportError
from exporters.executorch.backends import XNNPACK
from exporters.executorch.blobs import narrow_to_bfloat16
from exporters.executorch.reader import read_pte
from exporters.executorch.stock.bytes_found import digests_of_bytes, find_bytes
from exporters.executorch.tensors import FileTensor, file_tensors
from quant.store.store import WeightStore, weight_digest

NAMES: Final = "weight_names.json"
_VERSION = 1


def write_names(program: Path, store: WeightStore, backend: str) -> None:
    """Writes ``weight_names.json`` beside a program.

    Args:
        program: the .pte.
        store: the weights it was made of.
        backend: whose delegates it has.

    Raises:
        ExportError: the program holds integers that are no weight's, or a weight is not in it.
    """
    noted: dict[str, object] = {"version": _VERSION}
    if backend == XNNPACK:
        noted["places"] = _named_tensors(program, store.digests)
    else:
        noted["bytes"] = find_bytes(program, store, backend)
        noted["rows"] = {name: _rows(store, name) for name in store.names()}
        noted["digests"] = store.digests
    text = json.dumps(noted, indent=1)
    (program.parent / NAMES).write_text(text + "\n", encoding="utf-8")


def _rows(store: WeightStore, name: str) -> int:
    return next(iter(store.extents(name).values())).shape[0]


def _named_tensors(program: Path, digests: Mapping[str, str]) -> dict[str, dict[str, object]]:
    """The weights that each tensor of a program is, and the dtype that its values had."""
    names: dict[str, list[str]] = {}
    for name, digest in digests.items():
        names.setdefault(digest, []).append(name)
    places: dict[str, dict[str, object]] = {}
    missing = dict.fromkeys(digests)
    for tensor in file_tensors(read_pte(program)):
        for dtype in _RESTORED if tensor.datatype == "fp32" else ("",):
            found = names.get(_digest(tensor, dtype))
            if found:
                places[_place(tensor)] = {"weights": found, "dtype": dtype}
                for name in found:
                    missing.pop(name, None)
                break
        else:
            if tensor.group_size != 0:
                raise ExportError(
                    f"{tensor.reader} got a {tensor.format} tensor of shape {list(tensor.shape)} "
                    f"from ExecuTorch's exporter whose integers are no weight's: use "
                    f"--lowering edgeforge"
                )
    if missing:
        raise ExportError(
            f"ExecuTorch's exporter did not keep {next(iter(missing))} as it was given "
            f"({len(missing)} weights in all): use --lowering edgeforge"
        )
    return places


def stored_digests(program: Path) -> dict[str, str]:
    """`quant.store.store.weight_digest` of every weight, read from the program itself.

    A weight that is held in several places, and not the same in all of them, gets a text that no
    digest equals.

    Raises:
        ExportError: a file is missing, cut short, damaged, or of another schema.
    """
    path = program.parent / NAMES
    found: dict[str, dict[str, None]] = {}
    try:
        noted = json.loads(path.read_text(encoding="utf-8"))
        if noted["version"] != _VERSION:
            raise ExportError(f"{path} is of another version: export the model again")
        if "bytes" in noted:
            given = (noted["bytes"], noted["rows"], noted["digests"])
            return digests_of_bytes(program, *given)
        places = dict(noted["places"])
        for tensor in file_tensors(read_pte(program)):
            place = places.pop(_place(tensor), None)
            if place is not None:
                digest = _digest(tensor, place["dtype"])
                for name in place["weights"]:
                    found.setdefault(name, {})[digest] = None
        for place in places.values():  # the program does not read it there
            for name in place["weights"]:
                found.setdefault(name, {})["nothing"] = None
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        if isinstance(error, ExportError):
            raise
        raise ExportError(f"{path} cannot be read: {error}") from error
    return {name: " or ".join(sorted(digests)) for name, digests in found.items()}


def _place(tensor: FileTensor) -> str:
    return " ".join((tensor.reader, *tensor.key))


def _digest(tensor: FileTensor, dtype: str) -> str:
    """A tensor's digest, its values taken for widened ones of a dtype (empty: as they are)."""
    narrow = _RESTORED[dtype]
    return weight_digest(
        {part: _changed(stored.blocks(), narrow) for part, stored in tensor.parts.items()}
    )


def _changed(blocks: Iterable[bytes], change: Callable[[bytes], bytes] | None) -> Iterator[bytes]:
    return (change(block) if change else block for block in blocks)


def _narrow_to_float16(data: bytes) -> bytes:
    """float32 that is exactly a float16, as that; else its own bits, so that it shows."""
    wide = np.frombuffer(data, np.float32)
    with np.errstate(over="ignore"):
        narrow = wide.astype(np.float16)
    return narrow.tobytes() if (narrow.astype(np.float32) == wide).all() else data


_RESTORED: Final[Mapping[str, Callable[[bytes], bytes] | None]] = {
    "": None,
    "bf16": narrow_to_bfloat16,
    "fp16": _narrow_to_float16,
}
