"""Where a frontend put the integers of quantized weights in the file that it wrote.

The runtimes' frontends keep no names. Right after the export the bytes that the file must hold
for each weight are searched for, and their places are written beside it. Reading back takes the
bytes at these places and undoes the layout; only names and places come from the record.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from exporters.damaged_files import one_sentence
from exporters.errors import ExportError
from exporters.executorch.stock.bytes_found import channels_last, digests_of_bytes, find_bytes
from quant.input_files import read_input
from quant.json_input import JsonError, parse_json
from quant.store.store import WeightStore

PLACES: Final = "weight_places.json"
_VERSION: Final = 1
_LARGEST: Final = 64 << 20


def write_places(
    file: Path,
    folder: Path,
    store: WeightStore | None,
    layout: str,
    floats: Mapping[str, str],
    taps: Mapping[str, int] | None = None,
) -> dict[str, str]:
    """Finds the weights in a file, and writes their places into the artifact's folder.

    Args:
        file: the file with the weights.
        folder: the artifact.
        store: the weights; None for none.
        layout: whose layouts the file has: ``xnnpack`` or ``coreml``.
        floats: the weights that the file holds as floats, with the reason.
        taps: of kernels whose channels may lie last in the file, how many taps each has.

    Returns:
        ``floats``, and the weights that the frontend changed.
    """
    if store is None:
        return dict(floats)
    lost = dict(floats)
    places: dict[str, object] = {}
    for name in store.names():
        if name in floats:
            continue
        try:
            more = (channels_last(taps[name]),) if taps is not None and name in taps else ()
            places |= find_bytes(file, store, layout, [name], more)
        except ExportError:
            lost[name] = "the frontend wrote its integers or scales in another form"
    noted = {
        "version": _VERSION,
        "file": file.relative_to(folder).as_posix(),
        "places": places,
        "rows": {name: store.extents(name)["codes"].shape[0] for name in places},
    }
    (folder / PLACES).write_text(json.dumps(noted, indent=1) + "\n", encoding="utf-8")
    return lost


def read_digests(folder: Path) -> dict[str, str]:
    """Computes `quant.store.store.weight_digest` of the weights from the file itself.

    Raises:
        ExportError: the record or the file is missing or damaged.
    """
    path = folder / PLACES
    if not path.is_file():
        return {}
    with one_sentence(path, "places of weights"):
        try:
            noted: Any = parse_json(read_input(path, _LARGEST))
        except JsonError as error:
            raise ExportError(f"{path} cannot be read: it {error}") from None
        if noted["version"] != _VERSION:
            raise ExportError(f"{path} has another version: export the module again")
        return digests_of_bytes(folder / noted["file"], noted["places"], noted["rows"], {})
