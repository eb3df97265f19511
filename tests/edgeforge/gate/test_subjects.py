"""What of a report still holds: digests decide."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from edgeforge.gate.policy_file import read_policy
from edgeforge.gate.subjects import find_subjects, look
from exporters.manifest import Manifest
from quant.sealed_json import seal, unseal

POLICY = Path("edgeforge-policy.yaml")


@pytest.fixture
def stale(room):
    """Why the report of the int8 artifact does not hold, a phrase each."""

    def reasons(checkpoint: str | None = None) -> list[str]:
        (found,) = find_subjects(read_policy(POLICY), [Path("int8")])
        look([found], checkpoint)
        assert bool(found.report) is not bool(found.stale or found.changed)
        return [*found.changed, *found.stale]

    assert reasons() == []
    return reasons


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "old", "new", "reason"),
    [
        ("int8/edgeforge.json", b" ", b"  ", "edgeforge.json changed"),
        ("int8/report.json", b"0.", b"1.", "its report was changed or damaged"),
        ("int8/report.json", b'"tokens": 1024', b'"tokens": 1025', "changed or damaged"),
        ("held.txt", b"e", b"E", "the evaluated text changed"),
    ],
)
def test_one_changed_byte_is_enough(stale, room, name, old, new, reason):
    path = room / name
    before = path.read_bytes()
    path.write_bytes(before.replace(old, new, 1))
    assert path.read_bytes() != before
    (found,) = stale()
    assert reason in found
    path.write_bytes(before)
    assert stale() == []


def test_one_changed_byte_of_any_file_that_the_manifest_records_is_enough(stale, room):
    for name in Manifest.read(room / "int8").files:
        flip(room / "int8" / name)
        assert stale() == [f"{name} was changed after it was written: its SHA-256 differs"]
        flip(room / "int8" / name)
    assert stale() == []


def test_the_checkpoint_counts_where_it_is_at_hand(stale, build, room):
    copy = shutil.copytree(build / "model", room / "model")
    assert stale(str(copy)) == []
    flip(copy / "model.safetensors")
    assert stale(str(copy)) == ["the checkpoint changed"]
    shutil.rmtree(copy)
    assert stale(str(copy)) == []


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("version: 1\ntext: held.txt\ntokens: 512\n", "it is of 1024 tokens, not 512"),
        ("version: 1\ntext: held.txt\n", "it is of 1024 tokens, not default"),
        ("version: 1\ntokens: 1024\n", "the evaluated text changed"),
        ("version: 1\ntext: none.txt\ntokens: 1024\n", "the evaluated text changed"),
    ],
)
def test_another_text_or_count_of_tokens_is_measured_anew(stale, room, text, reason):
    POLICY.write_text(text)
    assert stale() == [reason]


@pytest.mark.parametrize(
    ("part", "value", "reason"),
    [
        ("tools", {"edgeforge": "0.0.1"}, r"edgeforge is .* and was 0\.0\.1"),
        ("tools", {"onnxruntime": "1.0"}, r"onnxruntime is .* and was 1\.0"),
        ("processor", "another", "it was measured on another processor"),
        ("bounds", "0" * 64, "it was held against other bounds"),
        ("options", {"precision": "fp32"}, "the runtime has other options"),
        ("checkpoint", "0" * 64, "it is of another checkpoint"),
    ],
)
def test_what_made_the_report_is_what_would_make_it_now(stale, room, part, value, reason):
    path = room / "int8" / "report.json"
    content = unseal(path.read_bytes())
    made = content["freshness"][part]
    content["freshness"][part] = {**made, **value} if part == "tools" else value
    path.write_text(seal(content))
    assert re.fullmatch(reason, stale()[0])


@pytest.mark.parametrize("name", ["checks", "freshness", "sums", "lowering"])
def test_a_sealed_report_that_is_not_complete_does_not_hold(stale, room, name):
    path = room / "int8" / "report.json"
    content = unseal(path.read_bytes())
    for value in (7, "text", None if name != "sums" else [7]):
        path.write_text(seal({**content, name: value}))
        assert stale() == ["its report is not complete"]
    path.write_text(seal({key: each for key, each in content.items() if key != name}))
    assert stale() == ["its report is not complete"]
    path.write_text(seal({**content, "schema_version": 2}))
    assert stale() == ["its report has schema version 2"]
    path.unlink()
    assert stale() == ["it has no report"]
