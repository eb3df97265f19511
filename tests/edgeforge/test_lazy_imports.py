"""What must answer at once loads none of the heavy packages."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "onnx", "onnxruntime", "transformers")


@pytest.mark.parametrize(
    "modules",
    [
        "edgeforge",
        "edgeforge.cli.app",
        "exporters.registry",
        "quant.plans.recipes",
        "device_harness.registry",
        "edgeforge.cli.inspect_report",
        "exporters.coreml.reader",
        "exporters.executorch.stock.names",
    ],
)
def test_loads_nothing_heavy(modules):
    program = f"import sys, {modules}; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
