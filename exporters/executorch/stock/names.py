"""Finds out which weight each tensor is in a program that ExecuTorch's exporter wrote.

The exporter does not keep the weights' names: it names data by a digest of the data, and constants
by a number. Right after the export, the digest of every tensor's integers and scales is therefore
compared with those of the store's weights, and the matches are written beside the program. Reading
back takes only names from that file; integers and scales come from the program.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from exporters.damaged_files import one_sentence
from exporters.errors import ExportError
from exporters.executorch.backends import XNNPACK
from exporters.executorch.blobs import narrow_to_bfloat16
from exporters.executorch.reader import read_pte
from exporters.executorch.tensors import FileTensor, file_tensors
from quant.input_files import read_input
from quant.json_input import JsonError, parse_json
from quant.quoted import quoted
from quant.store.store import WeightStore, weight_digest

NAMES: Final = "weight_names.json"
_VERSION = 1
_LARGEST_NAMES: Final = 64 << 20


def write_names(program: Path, store: WeightStore, backend: str) -> None:
    """Writes ``weight_names.json`` beside a program.

    Args:
        program: the .pte.
        store: the store of the weights that it was made from.
        backend: the backend of its delegates.

    Raises:
        ExportError: the program holds integers that belong to no weight, or lacks a weight.
    """
    from exporters.executorch.stock.bytes_found import find_bytes  # with torch

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
    """The names of the weights that equal each tensor, and the dtype that its values had."""
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
                    f"from ExecuTorch's exporter whose integers belong to no weight: use "
                    f"--lowering edgeforge"
                )
    if missing:
        raise ExportError(
            f"ExecuTorch's exporter changed {next(iter(missing))} ({len(missing)} weights in all): "
            f"use --lowering edgeforge"
        )
    return places


def stored_digests(program: Path) -> dict[str, str]:
    """Computes `quant.store.store.weight_digest` of every weight from the program itself.

    When the program holds a weight in several places and these differ, its text lists every digest
    found, so that it equals no digest of the store.

    Raises:
        ExportError: a file is missing, cut short, damaged, or has another schema.
    """
    path = program.parent / NAMES
    found: dict[str, dict[str, None]] = {}
    with one_sentence(path, "names of weights"):
        try:
            noted: Any = parse_json(read_input(path, _LARGEST_NAMES))
        except JsonError as error:
            raise ExportError(f"{path} cannot be read: it {error}") from None
        if noted["version"] != _VERSION:
            raise ExportError(
                f"{path} has version {quoted(noted['version'])}; this EdgeForge reads {_VERSION}: "
                f"export the model again"
            )
        if "bytes" in noted:
            from exporters.executorch.stock.bytes_found import digests_of_bytes  # with torch

            given = (noted["bytes"], noted["rows"], noted["digests"])
            return digests_of_bytes(program, *given)
        places = dict(noted["places"])
        for tensor in file_tensors(read_pte(program)):
            place = places.pop(_place(tensor), None)
            if place is not None:
                digest = _digest(tensor, place["dtype"])
                for name in place["weights"]:
                    found.setdefault(name, {})[digest] = None
        for place in places.values():  # the program does not hold these tensors any more
            for name in place["weights"]:
                found.setdefault(name, {})["nothing"] = None
    return {name: " or ".join(sorted(digests)) for name, digests in found.items()}


def _place(tensor: FileTensor) -> str:
    return " ".join((tensor.reader, *tensor.key))


def _digest(tensor: FileTensor, dtype: str) -> str:
    """A tensor's digest after its values are narrowed to a dtype; an empty dtype keeps them."""
    narrow = _RESTORED[dtype]
    return weight_digest(
        {part: _changed(stored.blocks(), narrow) for part, stored in tensor.parts.items()}
    )


def _changed(blocks: Iterable[bytes], change: Callable[[bytes], bytes] | None) -> Iterator[bytes]:
    return (change(block) if change else block for block in blocks)


def _narrow_to_float16(data: bytes) -> bytes:
    """Narrows float32 to float16 where that is exact; otherwise returns the bytes unchanged."""
    wide = np.frombuffer(data, np.float32)
    with np.errstate(over="ignore"):
        narrow = wide.astype(np.float16)
    return narrow.tobytes() if (narrow.astype(np.float32) == wide).all() else data


_RESTORED: Final[Mapping[str, Callable[[bytes], bytes] | None]] = {
    "": None,
    "bf16": narrow_to_bfloat16,
    "fp16": _narrow_to_float16,
}
