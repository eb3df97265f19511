"""A store that is left half done, and taken up again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from quant.errors import QuantizationError
from quant.formats.formats import parse_format
from quant.plans.plan import FLOAT32, Assignment, QuantPlan
from quant.store.partial import partial_store
from quant.store.store import WeightStore

SHAPES = {"a.weight": (8, 64), "norm.weight": (64,)}
PLAN = QuantPlan(
    "mine",
    {
        "a.weight": Assignment(parse_format("int4-g32"), "gptq"),
        "norm.weight": Assignment(FLOAT32, "cast"),
    },
)
NORM = torch.arange(64.0)
CODES, SCALE = torch.full((8, 32), 0x98, dtype=torch.uint8), torch.ones(8, 2).bfloat16()


def put(store, weight: str, part: str, value: torch.Tensor) -> None:
    store.write(weight, part, 0, value.view(torch.uint8).numpy().reshape(-1).data)


def put_all(store) -> None:
    put(store, "a.weight", "codes", CODES)
    put(store, "a.weight", "scale", SCALE)
    store.note("a.weight", 0.25)


def leave_half_done(cache: Path, folder: Path | None = None) -> None:
    with pytest.raises(KeyboardInterrupt), partial_store(cache, "key", PLAN, SHAPES, folder) as s:
        put(s, "norm.weight", "value", NORM)
        s.note("norm.weight", 0.0)
        s.keep_boundary({"index": 3}, iter([torch.ones(2), torch.zeros(3)]))
        s.keep_boundary({"index": 5}, iter([torch.arange(4.0)]))
        put_all(s)  # noted, but not made to last
        raise KeyboardInterrupt


@pytest.mark.parametrize("own_folder", [False, True])
def test_what_was_kept_is_there_again_and_the_store_appears_whole(tmp_path, own_folder):
    cache, folder = tmp_path / "cache", tmp_path / "partial" if own_folder else None
    leave_half_done(cache, folder)
    assert not (cache / "key").exists()
    with partial_store(cache, "key", PLAN, SHAPES, folder) as store:
        assert store.done == {"norm.weight": 0.0}
        assert store.boundary == {"file": "boundary-1.bin", "index": 5}
        kept = np.fromfile(store.boundary_file(), np.float32)
        assert kept.tolist() == [0.0, 1.0, 2.0, 3.0]
        assert torch.equal(store.writer.part("norm.weight", "value")[0], NORM)
        put_all(store)
    whole = WeightStore(cache / "key")
    assert torch.equal(whole.part("a.weight", "codes"), CODES)
    assert torch.equal(whole.part("norm.weight", "value")[0], NORM)
    assert whole.relative_error == {"a.weight": 0.25, "norm.weight": 0.0}
    if folder is None:
        assert [path.name for path in cache.iterdir()] == ["key"]
    else:
        assert folder.is_dir() and not list(folder.iterdir())


def test_partial_results_of_another_model_are_refused(tmp_path):
    leave_half_done(tmp_path / "cache", tmp_path / "partial")
    with (
        pytest.raises(QuantizationError, match="partial results of another model"),
        partial_store(tmp_path / "cache", "other", PLAN, SHAPES, tmp_path / "partial"),
    ):
        pass
    leave_half_done(tmp_path / "cache", tmp_path / "partial")  # they are still there


def test_a_damaged_journal_is_named(tmp_path):
    leave_half_done(tmp_path / "cache", tmp_path / "partial")
    (tmp_path / "partial" / "progress.json").write_text("{")
    with (
        pytest.raises(QuantizationError, match=r"progress\.json is not a journal"),
        partial_store(tmp_path / "cache", "key", PLAN, SHAPES, tmp_path / "partial"),
    ):
        pass


def test_a_file_cut_short_is_named(tmp_path):
    leave_half_done(tmp_path / "cache", tmp_path / "partial")
    file = tmp_path / "partial" / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with (
        pytest.raises(QuantizationError, match="bytes and not"),
        partial_store(tmp_path / "cache", "key", PLAN, SHAPES, tmp_path / "partial"),
    ):
        pass


def test_a_run_that_left_no_journal_begins_anew(tmp_path):
    leave_half_done(tmp_path / "cache", tmp_path / "partial")
    journal = tmp_path / "partial" / "progress.json"
    assert json.loads(journal.read_text())["version"] == 1
    journal.unlink()
    with partial_store(tmp_path / "cache", "key", PLAN, SHAPES, tmp_path / "partial") as store:
        assert store.done == {} and store.boundary is None
        put(store, "norm.weight", "value", NORM)
        store.note("norm.weight", 0.0)
        put_all(store)


def test_two_at_once_are_refused(tmp_path):
    with (
        pytest.raises(QuantizationError, match="another process is quantizing the same model"),
        partial_store(tmp_path, "key", PLAN, SHAPES),
        partial_store(tmp_path, "key", PLAN, SHAPES),
    ):
        pass


@pytest.mark.parametrize(
    "change",
    [
        {"boundary": {"file": "../precious", "index": 5}},
        {"boundary": {"file": 3}},
        {"boundary": []},
        {"done": []},
        {"done": {"norm.weight": "0"}},
    ],
)
def test_a_journal_that_was_altered_is_refused_and_no_file_is_removed(tmp_path, change):
    cache, folder = tmp_path / "cache", tmp_path / "partial"
    leave_half_done(cache, folder)
    (tmp_path / "precious").write_text("a stranger's")
    journal = json.loads((folder / "progress.json").read_text())
    (folder / "progress.json").write_text(json.dumps({**journal, **change}))
    with (
        pytest.raises(QuantizationError, match="is not a journal of partial results"),
        partial_store(cache, "key", PLAN, SHAPES, folder) as store,
    ):
        store.keep_boundary({"index": 7}, iter([torch.ones(1)]))
    assert (tmp_path / "precious").read_text() == "a stranger's"
