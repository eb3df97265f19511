"""Takes a shared library's constructors out of what is run when it is loaded.

Those of torch's library register some thousand operators, for 5 seconds under the emulator at every
start. Of that library only plain C functions are called: the thread pool, the processor's
detection, and KleidiAI's kernels. ExecuTorch's results are the same bits without them.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Final

from device_harness.errors import SetupError

_DYNAMIC: Final = 2  # the type of the program header that holds the loader's table
_INIT_ARRAY_SIZE, _FINI_ARRAY_SIZE, _END = 0x1B, 0x1C, 0


def leave_out_constructors(library: Path) -> None:
    """Sets the sizes of a 64-bit ELF file's lists of constructors and destructors to zero.

    Raises:
        SetupError: it is no such file.
    """
    with library.open("r+b") as file:
        try:
            head = file.read(64)
            if head[:6] != b"\x7fELF\x02\x01":
                raise ValueError("no ELF file of 64 bits")
            (offset,) = struct.unpack_from("<Q", head, 0x20)
            (count,) = struct.unpack_from("<H", head, 0x38)
            file.seek(offset)
            headers = list(struct.iter_unpack("<IIQQQQQQ", file.read(56 * count)))
            begin, size = next((each[2], each[5]) for each in headers if each[0] == _DYNAMIC)
            file.seek(begin)
            entries = list(struct.iter_unpack("<qQ", file.read(size)))
        except (ValueError, struct.error, StopIteration) as error:
            raise SetupError(f"{library} is no shared library: {error}") from error
        for at, (tag, _) in enumerate(entries):
            if tag in (_INIT_ARRAY_SIZE, _FINI_ARRAY_SIZE):
                file.seek(begin + 16 * at)
                file.write(struct.pack("<qQ", tag, 0))
            elif tag == _END:
                break
