"""Tables of the demo model alone, which other scripts measure and write into the page.

They compare algorithms and formats that are not offered for real models, or not by default.
"""

import subprocess
import sys
from typing import Final

from yardstick import ROOT

# By block: the script and its arguments.
DEMO_TABLES: Final = {
    "algorithms": ["quality_table.py", "--tokens", "4096"],
    "two-bits": [
        *("recipe_sweep.py", "int2-g32-signed-gptq", "int2-g32:gptq-order"),
        *("int2-g32-asym:gptq-order", "--tokens", "4096"),
    ],
    "rotation": [
        *("recipe_sweep.py", "int4-pc", "int4", "int4-g128", "int4-g64"),
        *("--rotations", "all", "--tokens", "4096"),
    ],
    "palettes": [
        *("recipe_sweep.py", "lut2", "lut3", "lut4", "lut6", "lut2-weighted", "lut3-weighted"),
        *("lut4-weighted", "lut2-gptq", "lut3-gptq", "lut4-gptq", "int4-g128"),
        *("--tokens", "4096"),
    ],
    "activations": ["recipe_sweep.py", "int8", "w8a8", "w8a8-static", "--tokens", "4096"],
}


def write_demo_table(name: str) -> None:
    """Measures a table and writes its block.

    Args:
        name: a key of `DEMO_TABLES`.

    Raises:
        SystemExit: the script failed.
    """
    script, *arguments = DEMO_TABLES[name]
    command = [sys.executable, f"benchmarks/{script}", *arguments, "--page", name]
    print(f"\n{name}: {' '.join(command[1:])}", flush=True)
    if subprocess.run(command, cwd=ROOT).returncode:
        raise SystemExit(f"{name} was not written: benchmarks/{script} failed, as it says above")
