"""Finds the bytes of weights in a program whose delegates' formats EdgeForge cannot read.

Vulkan's and Core ML's delegates have formats of their own. How their exporters lay integers and
scales out is known, so the bytes that they must hold for each weight are known too. Right after the
export, these bytes are searched for in the file once. Reading back takes the bytes at the places
that were found and undoes the layout.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import torch

from exporters.errors import ExportError
from quant.formats.formats import IntFormat
from quant.input_files import open_input
from quant.store.store import WeightStore, weight_digest

_BFLOAT16, _FLOAT16, _FLOAT32 = torch.bfloat16, torch.float16, torch.float32

_ROUNDED: Final = "values in float16"
_MOST_OFTEN: Final = 64  # how often the bytes of a file may be read, all together
_UNLIKELY: Final = 64  # this many bytes do not occur elsewhere in a file by chance

Layout = tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[bytes, int], bytes]]
"""Two functions: one turns a part into the delegate's form; the other takes that form's bytes and
the number of rows, and returns the store's bytes."""


def _as(dtype: torch.dtype, data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype)


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def _flipped(mask: int) -> Layout:
    """The layout of codes as two's complement, which flips the highest bit of each code."""
    return lambda codes: codes ^ mask, lambda data, rows: _bytes(_as(torch.uint8, data) ^ mask)


_LAYOUTS: Final[Mapping[str, Layout]] = {
    "as stored": (lambda part: part, lambda data, rows: data),
    "signed of 4 bits": _flipped(0x88),
    "signed of 8 bits": _flipped(0x80),
    "nibbles swapped": (
        lambda codes: codes << 4 | codes >> 4,
        lambda data, rows: _bytes(_as(torch.uint8, data) << 4 | _as(torch.uint8, data) >> 4),
    ),
    "float32": (
        lambda scale: scale.float(),
        lambda data, rows: _bytes(_as(_FLOAT32, data).to(_BFLOAT16)),
    ),
    "float32, groups first": (
        lambda scale: scale.float().T,
        lambda data, rows: _bytes(_as(_FLOAT32, data).view(-1, rows).T.to(_BFLOAT16)),
    ),
    "float16": (
        lambda scale: scale.to(_FLOAT16),
        lambda data, rows: _bytes(_as(_FLOAT16, data).to(_BFLOAT16)),
    ),
    "values in float32": (lambda value: value.float(), lambda data, rows: data),
    # The only layout that cannot be undone; the bytes are compared with a digest of themselves.
    _ROUNDED: (lambda value: value.to(_FLOAT16), lambda data, rows: data),
}
_CODES: Final[Mapping[str, Mapping[int, tuple[str, ...]]]] = {
    "vulkan": {4: ("as stored",)},
    "coreml": {4: ("signed of 4 bits",), 8: ("signed of 8 bits",)},
    "xnnpack": {4: ("as stored", "nibbles swapped"), 8: ("signed of 8 bits",)},
}
_SCALES: Final[Mapping[str, tuple[str, ...]]] = {
    "vulkan": ("float32, groups first", "float32"),
    "coreml": ("float16",),
    "xnnpack": ("as stored", "float32"),
}
_VALUES: Final = {"vulkan": "values in float32", "coreml": _ROUNDED, "xnnpack": "values in float32"}

_CHANNELS_LAST: Final = "signed of 8 bits, channels last, taps "


def channels_last(taps: int) -> str:
    """The layout of a kernel's 8-bit codes in which the channels of each of its taps lie together.

    The store has the taps of each channel together.
    """
    return f"{_CHANNELS_LAST}{taps}"


def _layout(name: str) -> Layout:
    """A layout by its name.

    Raises:
        KeyError: there is none of this name.
    """
    if not name.startswith(_CHANNELS_LAST):
        return _LAYOUTS[name]
    taps = int(name.removeprefix(_CHANNELS_LAST))

    def laid(codes: torch.Tensor) -> torch.Tensor:
        return (codes ^ 0x80).reshape(len(codes), -1, taps).transpose(1, 2)

    def undone(data: bytes, rows: int) -> bytes:
        return _bytes(_as(torch.uint8, data).view(rows, taps, -1).transpose(1, 2) ^ 0x80)

    return laid, undone


Place = dict[str, object]
"""A part's ``offset``, ``nbytes`` and ``layout``, and its ``sha256`` if that cannot be undone."""


def find_bytes(
    program: Path,
    store: WeightStore,
    backend: str,
    names: Iterable[str] | None = None,
    more: Sequence[str] = (),
) -> dict[str, dict[str, list[Place]]]:
    """Finds the places of each part of each weight, by the weight's name and the part.

    Args:
        program: the file.
        store: the store of the weights.
        backend: whose layouts the file has.
        names: the weights to look for; None for all of the store.
        more: further layouts that codes may have there, such as `channels_last`.

    Raises:
        ExportError: the file does not hold a part.
    """
    found: dict[str, dict[str, list[Place]]] = {}
    with program.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as m:
        for name in store.names() if names is None else names:
            format, places = store.plan.weights[name].format, found.setdefault(name, {})
            if isinstance(format, IntFormat):
                codes = (*_CODES[backend][format.bits], *more)
                wanted = {"codes": codes, "scale": _SCALES[backend]}
            else:
                wanted = {"value": (_VALUES[backend],)}
            for part, layouts in wanted.items():
                places[part] = [
                    place
                    for layout in layouts
                    for place in _find(
                        m, _bytes(_layout(layout)[0](store.part(name, part))), layout
                    )
                ]
                if not places[part]:
                    raise ExportError(
                        f"ExecuTorch's exporter changed the {part} of {name}: use --backend xnnpack"
                    )
    return found


def _find(file: mmap.mmap, data: bytes, layout: str) -> Iterator[Place]:
    """Yields every copy; for a short part only the first, as its bytes may recur by chance."""
    offset = file.find(data)
    while offset >= 0:
        place: Place = {"offset": offset, "nbytes": len(data), "layout": layout}
        if layout == _ROUNDED:
            place["sha256"] = hashlib.sha256(data).hexdigest()
        yield place
        offset = file.find(data, offset + len(data)) if len(data) >= _UNLIKELY else -1


def digests_of_bytes(
    program: Path,
    places: Mapping[str, Mapping[str, list[Place]]],
    rows: Mapping[str, int],
    digests: Mapping[str, str],
) -> dict[str, str]:
    """Computes `quant.store.store.weight_digest` of every weight from the bytes at these places.

    Args:
        program: the .pte.
        places: the result of `find_bytes`.
        rows: the number of rows of each weight.
        digests: the digests of the store's weights. A weight whose values were rounded gets its
            digest from here, if its rounded values are still those that were written.
    """
    found: dict[str, str] = {}
    with open_input(program) as stream:
        size = stream.seek(0, 2)
        left = _MOST_OFTEN * size

        def read(place: Place) -> bytes:
            nonlocal left
            offset, nbytes = place["offset"], place["nbytes"]
            if not (isinstance(offset, int) and isinstance(nbytes, int)):
                raise TypeError("a place is no number of bytes")
            if min(offset, nbytes) < 0 or offset + nbytes > size:
                raise ValueError(f"a part of a weight lies past the end of {program.name}")
            left -= nbytes
            if left < 0:
                raise ValueError(f"the parts of weights take far more bytes than {program.name}")
            stream.seek(offset)
            return stream.read(nbytes)

        for name, parts in places.items():
            seen: set[str] = set()
            for i in range(max(map(len, parts.values()))):
                restored = {}
                for part, listed in parts.items():
                    place = listed[i % len(listed)]
                    data = read(place)
                    if place.get("sha256") == hashlib.sha256(data).hexdigest():
                        seen.add(digests[name])
                    else:
                        undo = _layout(str(place["layout"]))[1]
                        restored[part] = [undo(data, rows[name])]
                if restored:
                    seen.add(weight_digest(restored))
            found[name] = " or ".join(sorted(seen))
    return found
