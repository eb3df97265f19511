"""Runs llama.cpp's own quantizers: ggml's code for the integers, llama-quantize's for the types.

The module compiles ggml's C files for quantization from a checkout (of llama.cpp, or of ggml alone)
with the flags of ggml's own build, and calls them matrix by matrix; ggml's ``to_float`` gives the
values back. It uses no importance matrix, as ``llama-quantize`` does by default.

Each tensor's type follows the rules of llama.cpp's ``src/llama-quant.cpp`` for models without
experts that are not Falcon. "Layers with more bits" are layers i of n where ``i < n/8``,
``i >= 7n/8`` or ``(i - n/8) % 3 == 2``, with integer division:

- The head, or the embedding that is tied to it: Q6_K (Q8_0 in Q8_0).
- Q4_K_M: Q4_K; values (or a fused q, k, v) and down projections of layers with more bits Q6_K.
- Q3_K_M: Q3_K; values (or a fused q, k, v) Q5_K in the first two layers, else Q4_K; down
  projections Q4_K (Q5_K in the first sixteenth of layers); output projections Q4_K.
- Q2_K: Q2_K; values (or a fused q, k, v) Q4_K where four or more query heads share a key, else
  Q3_K; down and output projections Q3_K.
- Q4_0 and Q8_0: the type of the same name.
- Where blocks of 256 columns do not divide a row, another type replaces the type: Q4_0 replaces
  Q2_K and Q3_K, Q5_0 replaces Q4_K, Q5_1 replaces Q5_K, and Q8_0 replaces Q6_K.
"""

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch

from edgeforge.model.model import Model

FILE_TYPES: Final = ("Q2_K", "Q3_K_M", "Q4_0", "Q4_K_M", "Q8_0")
# The numbers of ggml.h's `enum ggml_type`, which are written to files and so never change.
_NUMBERS: Final = {
    "Q4_0": 2,
    "Q5_0": 6,
    "Q5_1": 7,
    "Q8_0": 8,
    "Q2_K": 10,
    "Q3_K": 11,
    "Q4_K": 12,
    "Q5_K": 13,
    "Q6_K": 14,
}
_FALLBACKS: Final = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
# The category of a checkpoint's tensor in llama.cpp, by the part of its name before ".weight".
_CATEGORIES: Final = {
    "qkv_proj": "values",
    "v_proj": "values",
    "o_proj": "attention output",
    "out_proj": "attention output",
    "down_proj": "down",
    "proj_2": "down",
}
# Functions of ggml's runtime that the quantizers' file refers to and never calls.
_ABSENT: Final = (
    "ggml_backend_tensor_memset",
    "ggml_backend_tensor_set",
    "ggml_backend_buffer_get_usage",
)
_TO_FLOAT: Final = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


class _Traits(ctypes.Structure):
    """The first fields of ggml.h's `struct ggml_type_traits`."""

    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", _TO_FLOAT),
    ]


class Ggml:
    """ggml's quantizers, compiled from a checkout.

    Args:
        checkout: a folder of llama.cpp, or of ggml alone.
        keep: where the compiled library is kept, or is already; None to compile it anew.

    Raises:
        SystemExit: the folder does not hold these sources, or they do not compile.
    """

    def __init__(self, checkout: Path, keep: Path | None = None) -> None:
        root = checkout / "ggml" if (checkout / "ggml" / "src").is_dir() else checkout
        if not (root / "src" / "ggml-quants.c").is_file():
            raise SystemExit(
                f"{checkout} is not a checkout of llama.cpp or ggml: src/ggml-quants.c is missing"
            )
        if keep is None or not keep.is_file():
            with tempfile.TemporaryDirectory() as folder:
                library = _compile(root, Path(folder))
                self._library = ctypes.CDLL(str(library))
                if keep is not None:
                    keep.parent.mkdir(parents=True, exist_ok=True)
                    partial = keep.with_name(f".{keep.name}.{os.getpid()}")
                    shutil.copyfile(library, partial)
                    partial.replace(keep)
        else:
            self._library = ctypes.CDLL(str(keep.resolve()))
        self._library.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
        self._library.ggml_quantize_chunk.restype = ctypes.c_size_t
        self._library.ggml_quantize_chunk.argtypes = [
            ctypes.c_int,
            ctypes.c_void_p,
            ctypes.c_void_p,
            *[ctypes.c_int64] * 3,
            ctypes.c_void_p,
        ]

    def block(self, kind: str) -> int:
        """Returns the number of columns in a block of a type."""
        return int(self._traits(kind).blck_size)

    def stored(self, weight: torch.Tensor, kind: str) -> tuple[torch.Tensor, int]:
        """Returns a matrix's stored values, ``float32[rows, columns]``, and their stored bytes."""
        traits = self._traits(kind)
        values = np.ascontiguousarray(weight.float().numpy())
        rows, columns = values.shape
        size = values.size // traits.blck_size * traits.type_size
        packed: np.ndarray = np.zeros(size, np.uint8)
        found = np.empty_like(values)
        written = self._library.ggml_quantize_chunk(
            _NUMBERS[kind], values.ctypes.data, packed.ctypes.data, 0, rows, columns, None
        )
        assert written == size, (kind, written, size)
        traits.to_float(packed.ctypes.data, found.ctypes.data, values.size)
        return torch.from_numpy(found), size

    def _traits(self, kind: str) -> _Traits:
        found: _Traits = self._library.ggml_get_type_traits(_NUMBERS[kind]).contents
        assert found.type_name.decode().upper() == kind, found.type_name
        return found


def _compile(root: Path, folder: Path) -> Path:
    """Compiles the parts of ggml that quantize into a shared library.

    Raises:
        SystemExit: a file does not compile.
    """
    stubs = folder / "absent.c"
    stubs.write_text("".join(f"void {name}(void) {{ __builtin_trap(); }}\n" for name in _ABSENT))
    # Newer checkouts have a header for these two, which cmake makes; older ones take them as flags.
    (folder / "ggml-version.h").write_text("")
    flags = [
        "-O3",
        "-w",
        "-fPIC",
        "-D_GNU_SOURCE",
        "-DNDEBUG",
        '-DGGML_VERSION="none"',
        '-DGGML_COMMIT="none"',
        f"-I{root}/include",
        f"-I{root}/src",
        f"-I{folder}",
    ]
    cc, cxx = os.environ.get("CC", "gcc"), os.environ.get("CXX", "g++")
    sources = {
        "quants.o": [cc, "-std=gnu11", root / "src" / "ggml-quants.c"],
        "ggml.o": [cc, "-std=gnu11", root / "src" / "ggml.c"],
        "threading.o": [cxx, root / "src" / "ggml-threading.cpp"],
        "absent.o": [cc, stubs],
    }
    commands = [[*source, "-c", "-o", folder / name, *flags] for name, source in sources.items()]
    library = folder / "ggml.so"
    commands.append([cxx, "-shared", "-o", library, *(folder / name for name in sources), "-lm"])
    for command in commands:
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{root} does not compile:\n{done.stderr[-2000:]}")
    return library


@dataclass(frozen=True)
class Stacked:
    """Rows of a matrix that are one tensor in llama.cpp, and the tensor's type."""

    rows: int
    kind: str


def types_of(model: Model, file_type: str, ggml: Ggml) -> dict[str, list[Stacked]]:
    """Returns every matrix's types, piece by piece: llama.cpp does not stack as EdgeForge does."""
    found: dict[str, list[Stacked]] = {}
    layers = model.spec.layers
    for name, shape in model.weights.shapes().items():
        if len(shape) != 2:
            continue
        role = model.weights.roles()[name]
        for tensor, rows in model.weights.pieces(name):
            part = tensor.removesuffix(".weight").rpartition(".")[2]
            category = _CATEGORIES.get(part, "other")
            if role == "head" or (role == "embedding" and model.spec.tied):
                category = "output"
            layer = next((int(p) for p in tensor.split(".") if p.isdigit()), 0)
            shared = layers[0].num_heads // layers[0].num_kv_heads
            kind = _kind(file_type, category, layer, len(layers), shared)
            while shape[1] % ggml.block(kind):
                kind = _FALLBACKS[kind]
            found.setdefault(name, []).append(Stacked(rows, kind))
    return found


def _kind(file_type: str, category: str, layer: int, layers: int, shared: int) -> str:
    eighth = layers // 8
    more_bits = layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
    match file_type, category:
        case ("Q8_0", _):
            return "Q8_0"
        case (_, "output"):
            return "Q6_K"
        case ("Q4_0", _):
            return "Q4_0"
        case ("Q4_K_M", "values" | "down"):
            return "Q6_K" if more_bits else "Q4_K"
        case ("Q4_K_M", _):
            return "Q4_K"
        case ("Q3_K_M", "values"):
            return "Q5_K" if layer < 2 else "Q4_K"
        case ("Q3_K_M", "down"):
            return "Q5_K" if layer < layers // 16 else "Q4_K"
        case ("Q3_K_M", "attention output"):
            return "Q4_K"
        case ("Q3_K_M", _):
            return "Q3_K"
        case ("Q2_K", "values"):
            return "Q4_K" if shared >= 4 else "Q3_K"
        case ("Q2_K", "down" | "attention output"):
            return "Q3_K"
        case ("Q2_K", _):
            return "Q2_K"
    raise SystemExit(f"there is no file type {file_type}; known: {', '.join(FILE_TYPES)}")


def quantized(
    model: Model, weights: Mapping[str, torch.Tensor], file_type: str, ggml: Ggml
) -> Iterator[tuple[str, torch.Tensor, float]]:
    """Yields name, stored values and stored bits of every matrix as llama-quantize stores it."""
    for name, pieces in types_of(model, file_type, ggml).items():
        parts, size, first = [], 0, 0
        for piece in pieces:
            rows = weights[name][first : first + piece.rows]
            values, nbytes = ggml.stored(rows, piece.kind)
            parts.append(values)
            size, first = size + nbytes, first + piece.rows
        yield name, torch.cat(parts), 8.0 * size
