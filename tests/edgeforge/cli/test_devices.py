"""The commands of `edgeforge devices`."""

from __future__ import annotations

import json

import pytest

from device_harness.devices.arm64.instructions import Instructions
from edgeforge.cli.instruction_table import instruction_lines


def test_set_up_prints_where_the_root_is(arm64_root, edgeforge):
    shown = edgeforge("devices", "setup", "arm64", "--quiet")
    assert (shown.code, shown.out.strip()) == (0, str(arm64_root.folder))


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (("setup", "ios"), 2, "there is nothing to set up for 'ios': only arm64 has a set-up"),
        (("instructions", "{artifact}", "--device", "host"), 2, "counted on emulated cores"),
        (("instructions", "{artifact}", "--device", "arm64:m1"), 6, "no emulated core 'm1'"),
        (("instructions", "{artifact}", "--kleidiai", "both"), 2, "give on or off"),
        (("instructions", "{artifact}", "--prompt", "600"), 6, "600 + 24 do not fit"),
        (("instructions", "/nowhere"), 5, "/nowhere"),
        (("setp",), 2, "Did you mean 'setup'?"),
    ],
)
def test_a_wrong_command_is_one_sentence(arm64_root, artifact, edgeforge, words, code, sentence):
    shown = edgeforge("devices", *(word.format(artifact=artifact) for word in words))
    assert shown.code == code and sentence in shown.err
    assert shown.err.count("edgeforge: ") == 1 and "Traceback" not in shown.err


def test_instructions_are_told_as_ratios_and_no_latency(arm64_root, artifact, edgeforge):
    shown = edgeforge(
        *("devices", "instructions", str(artifact), str(artifact), "-q"),
        *("--prompt", "4", "--output", "2", "--json"),
    )
    first, second = json.loads(shown.out)
    assert first["artifact"] == str(artifact) and first["device"] == "arm64:cortex-a76"
    assert first["prefill"]["dot"] == second["prefill"]["dot"] > 0
    rows = []
    for each in (first, second):
        each.pop("artifact")
        rows.append(Instructions(**each))
    lines = instruction_lines(["a", "b"], rows)
    assert lines[2].split()[2] == lines[2].split()[4] == "1.000"
    text = "\n".join(lines)
    assert "no latency" in text and "ms" not in text.split()
