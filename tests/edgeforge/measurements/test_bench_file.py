"""``bench.json`` is added to, written whole, and never replaces what is none."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest

from device_harness.measuring.rules import Rules
from edgeforge.errors import UsageError
from edgeforge.measurements.bench_file import (
    add_to_file,
    keep_with_artifacts,
    read_bench_file,
    write_bench_file,
)
from edgeforge.measurements.keep import refuse_places
from edgeforge.measurements.measure import measure
from edgeforge.measurements.options import BenchOptions

QUICK = BenchOptions(prompts=(4,), outputs=(3,), rules=Rules(runs=1, warm_up=0), threads=1)


@pytest.fixture(scope="module")
def found(artifacts):
    return measure([artifacts.int4, artifacts.int8], QUICK)


def test_each_artifact_keeps_its_share_and_what_others_measured(artifacts, found, tmp_path):
    folders = {}
    for name in ("int4", "int8"):
        folders[name] = shutil.copytree(getattr(artifacts, name), tmp_path / name)

    def here(bench):
        cells = [
            replace(c, artifact=replace(c.artifact, folder=str(folders[c.artifact.recipe])))
            for c in bench.cells
        ]
        return replace(bench, cells=tuple(cells))

    phone = replace(
        found,
        devices=(replace(found.devices[0], name="phone"),),
        cells=tuple(replace(cell, device="phone") for cell in found.cells),
        ratios=(),
    )
    for bench in (found, phone, found):
        assert keep_with_artifacts(here(bench)) == [folders[n] / "bench.json" for n in folders]
    for name, folder in folders.items():
        read = read_bench_file(folder / "bench.json")
        assert [(c.device, c.artifact.recipe) for c in read.cells] == [
            ("host", name),
            ("phone", name),
        ]
        assert [each.name for each in read.devices] == ["host", "phone"]
        assert len(read.ratios) == 2  # prefill and decode of the two, in both
    # What was measured of an earlier export is not this artifact's any more.
    again = [replace(c, artifact=replace(c.artifact, manifest="f" * 64)) for c in here(found).cells]
    keep_with_artifacts(replace(found, cells=tuple(again[:1]), ratios=()))
    assert len(read_bench_file(folders["int4"] / "bench.json").cells) == 1


def test_a_file_that_cannot_be_read_is_told_in_a_sentence(found, tmp_path):
    path = tmp_path / "bench.json"
    write_bench_file(found, path)
    assert read_bench_file(path) == found
    content = path.read_text()
    for spoilt, words in (
        (content.replace('"schema_version": 1', '"schema_version": 2'), "read it with a newer"),
        (content.replace('"prompt": 4', '"prompt": 5'), "changed by hand or damaged"),
        (content[: len(content) // 2], "is not valid JSON"),
        ("[]", "is no bench of EdgeForge"),
        ("", "is not valid JSON"),
    ):
        path.write_text(spoilt)
        with pytest.raises(UsageError, match=words):
            read_bench_file(path)
        with pytest.raises(UsageError, match="name another place with --out"):
            add_to_file(found, path)
        assert path.read_text() == spoilt


def test_what_would_be_lost_is_refused_before(artifacts, tmp_path):
    folder = shutil.copytree(artifacts.int4, tmp_path / "artifact")
    (tmp_path / "notes.txt").write_text("mine")
    for out, history, words in (
        (folder / "model.onnx", None, "which would be lost"),
        (None, folder / "edgeforge.json", "which would be lost"),
        (tmp_path / "notes.txt", None, "is not valid JSON"),
        (tmp_path / "a.json", tmp_path / "a.json", "which would be lost"),
        (tmp_path, None, "is a folder"),
        (tmp_path / "no" / "bench.json", None, "existing folder"),
    ):
        with pytest.raises(UsageError, match=words):
            refuse_places([folder], out, history, beside=True)
    (folder / "bench.json").write_text(json.dumps({"kind": "mine"}))
    with pytest.raises(UsageError, match="is no bench of EdgeForge"):
        refuse_places([folder], None, None, beside=True)
    refuse_places([folder], None, None, beside=False)
