"""Reads the ``.npz`` files of `edgeforge coreml-run`, within bounds."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
import numpy.typing as npt

from edgeforge.errors import UsageError
from quant.input_files import open_input
from quant.quoted import quoted

Arrays = dict[str, npt.NDArray[Any]]
MOST_BYTES: Final = 4 << 30
_ENDING: Final = ".npy"


def read_arrays(path: Path) -> Arrays:
    """Reads every array of an ``.npz`` file.

    Raises:
        UsageError: the file is missing, is no ``.npz`` file of numbers, or claims more than it
            holds.
    """
    try:
        with open_input(path) as stream:
            if stream.read(6) == np.lib.format.MAGIC_PREFIX:
                raise UsageError(f"{path} holds one array without a name; save it with numpy.savez")
            with zipfile.ZipFile(stream) as archive:
                return _read(path, archive)
    except FileNotFoundError:
        raise UsageError(f"there is no file {path}") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from error
    except UsageError:
        raise
    except MemoryError:
        raise UsageError(f"{path} holds arrays too large for this machine") from None
    except Exception as error:  # zipfile, zlib and NumPy raise errors of many classes
        raise UsageError(f"{path} is not an .npz file of numbers: {error}") from error


def _read(path: Path, archive: zipfile.ZipFile) -> Arrays:
    members = archive.infolist()
    claimed = sum(member.file_size for member in members)
    if claimed > MOST_BYTES:
        raise UsageError(
            f"{path} claims arrays of {claimed} bytes in all; at most {MOST_BYTES} are read"
        )
    found: Arrays = {}
    for member in members:
        with archive.open(member) as stream:
            # `stream` ends where the member's claimed size does.
            _check_header(member, stream)
        with archive.open(member) as stream:
            array = np.lib.format.read_array(stream, allow_pickle=False)
        found[member.filename.removesuffix(_ENDING)] = array
    return found


def _check_header(member: zipfile.ZipInfo, stream: IO[bytes]) -> None:
    """Compares what a header claims with what its member holds: NumPy would first make room."""
    version = np.lib.format.read_magic(stream)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        raise ValueError(f"the array {quoted(member.filename)} has format version {version}")
    shape, _, dtype = readers[version](stream)
    if dtype.hasobject or math.prod(shape) * dtype.itemsize > member.file_size:
        raise ValueError(
            f"the array {quoted(member.filename)} claims {dtype}{quoted(shape)} in "
            f"{member.file_size} bytes"
        )
