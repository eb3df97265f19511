"""Reading a package's weights back takes memory for blocks of them, not for the whole file."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import pytest

from exporters.coreml.blob_file import BLOB_TYPES, BlobFile
from exporters.coreml.function import FileValue, FunctionBuilder
from exporters.coreml.weights import DESCALE
from exporters.errors import ExportError
from quant.store.store import weight_digest
from tests.oracles.small_package import write_package

ROWS, COLUMNS, GROUP = 8192, 32768, 4
SIZES = {"codes": ROWS * COLUMNS // 2, "scale": 2 * ROWS * COLUMNS // GROUP, "factors": 4 * ROWS}
DTYPES = {"codes": "int4", "scale": "fp16", "factors": "fp32"}
WEIGHT = "model__layers__0__mlp__down_proj__weight"


def large_package(folder: Path, scaled: bool) -> Path:
    """A package with one int4 weight, whose 256 MiB are zeros that take no place on the disk."""
    places, end = {}, 64
    for name, size in SIZES.items():
        places[name], end = end, -(-(end + 64 + size) // 64) * 64
    builder = FunctionBuilder("main", "CoreML8")
    x = builder.input("x", "fp16", (1, COLUMNS))
    parts = {
        "data": FileValue("int4", (ROWS, COLUMNS), places["codes"]),
        "scale": FileValue("fp16", (ROWS, COLUMNS // GROUP), places["scale"]),
    }
    kind = "constexpr_blockwise_shift_scale"
    weight = builder.constexpr(kind, WEIGHT, "fp16", (ROWS, COLUMNS), parts)
    builder.output(builder.call("linear", "y", "fp16", (1, ROWS), x=x, weight=weight))
    if scaled:
        builder.stored(WEIGHT + DESCALE, FileValue("fp32", (ROWS,), places["factors"]))
    package = write_package(folder, [builder])
    with open(package / "Data/com.apple.CoreML/weights/weight.bin", "wb") as file:
        file.write(struct.pack("<II56x", len(SIZES), 2))
        for name, size in SIZES.items():
            file.seek(places[name])
            code, start = BLOB_TYPES[DTYPES[name]], places[name] + 64
            file.write(struct.pack("<IIQQQ32x", 0xDEADBEEF, code, size, start, 0))
        file.write(struct.pack("<f", 1.0) * ROWS)
    return package


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
@pytest.mark.parametrize("scaled", [False, True])
def test_digests_of_a_large_package_take_little_memory(scaled, tmp_path):
    package = large_package(tmp_path, scaled)
    script = """
import sys
from pathlib import Path
from device_harness.memory import resident_peak
from exporters.coreml.package import open_package
from exporters.coreml.reader import stored_digests
from exporters.coreml.structure import structure_of
package = Path(sys.argv[1])
structure_of(open_package(package))
before = resident_peak()
print(*stored_digests(package).values())
print(resident_peak() - before)
"""
    run = [sys.executable, "-c", script, str(package)]
    digest, grown = subprocess.run(run, capture_output=True, text=True, check=True).stdout.split()
    zeros = {"codes": bytes([0x88]) * SIZES["codes"], "scale": bytes(SIZES["scale"])}
    assert digest == weight_digest({part: [data] for part, data in zeros.items()})
    assert int(grown) < 32e6, f"{int(grown) / 1e6:.0f} MB for a file of {sum(SIZES.values())}"


def test_a_file_cut_short_after_opening_is_noticed(tmp_path):
    package = large_package(tmp_path, False)
    path = package / "Data/com.apple.CoreML/weights/weight.bin"
    blob = BlobFile(path).read(64)
    with open(path, "r+b") as file:
        file.truncate(64 + 64 + 100)
    assert next(blob.blocks(100)) == bytes(100)
    with pytest.raises(ExportError, match=rf"weight\.bin is {SIZES['codes'] - 100} bytes too"):
        list(blob.blocks(1 << 20))
