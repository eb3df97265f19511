"""A store that is left half done, and taken up again."""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from quant.errors import QuantizationError, StoreDamagedError, StoreUnreadableError
from quant.formats.formats import parse_format
from quant.plans.plan import FLOAT32, Assignment, QuantPlan
from quant.store.partial import JOURNAL_VERSION, partial_store
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
        s.note("norm.weight", 0.0, 7)
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
    assert whole.tokens == {"norm.weight": 7}  # noted before the interruption
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


def damage(file: Path, at: int) -> None:
    """Changes a byte of a file."""
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["weights.safetensors", "progress.json"])
@pytest.mark.parametrize("at", [100, -1])
def test_damaged_partial_results_are_made_again(tmp_path, name, at):
    cache, told = tmp_path / "cache", []
    leave_half_done(cache)
    file = cache / ".key.resume" / name
    if name == "weights.safetensors" and at == -1:
        # The norm's bytes are the first of the store; the last are of a weight that was not kept.
        at = -(len(file.read_bytes()) - file.read_bytes().index(NORM.numpy().tobytes())) + 9
    damage(file, at)
    with partial_store(cache, "key", PLAN, SHAPES, tell=told.append) as store:
        assert store.done == {} and store.boundary is None
        assert len(told) == 1 and str(cache / ".key.resume") in told[0]
        assert told[0].startswith("damaged partial results were removed and are made again: ")
        put(store, "norm.weight", "value", NORM)
        store.note("norm.weight", 0.0)
        put_all(store)
    assert torch.equal(WeightStore(cache / "key").part("norm.weight", "value")[0], NORM)
    assert [path.name for path in cache.iterdir()] == ["key"]


def test_damaged_partial_results_in_a_folder_of_the_users_are_named_and_left(tmp_path):
    leave_half_done(tmp_path / "cache", tmp_path / "partial")
    file = tmp_path / "partial" / "weights.safetensors"
    damage(file, file.read_bytes().index(NORM.numpy().tobytes()) + 9)
    before = {path: path.read_bytes() for path in (tmp_path / "partial").iterdir()}
    words = r"holds norm\.weight otherwise than it was kept: name another folder, or remove"
    with (
        pytest.raises(StoreDamagedError, match=words),
        partial_store(tmp_path / "cache", "key", PLAN, SHAPES, tmp_path / "partial"),
    ):
        pass
    assert {path: path.read_bytes() for path in (tmp_path / "partial").iterdir()} == before


def test_a_damaged_state_between_layers_costs_only_that_state(tmp_path):
    leave_half_done(tmp_path)
    boundary = tmp_path / ".key.resume" / "boundary-1.bin"
    for change in (lambda: damage(boundary, 5), boundary.unlink):
        change()
        told: list[str] = []
        with (
            pytest.raises(KeyboardInterrupt),
            partial_store(tmp_path, "key", PLAN, SHAPES, tell=told.append) as store,
        ):
            assert store.done == {"norm.weight": 0.0} and store.boundary is None
            assert len(told) == 1 and "boundary-1.bin is damaged and not used" in told[0]
            raise KeyboardInterrupt


def test_a_weight_written_anew_after_it_was_kept_is_no_damage(tmp_path):
    """AWQ divides norms that are kept already; a run may be killed right then."""
    leave_half_done(tmp_path)
    with (
        pytest.raises(KeyboardInterrupt),
        partial_store(tmp_path, "key", PLAN, SHAPES) as store,
    ):
        put(store, "norm.weight", "value", NORM / 2)
        raise KeyboardInterrupt
    told: list[str] = []
    with partial_store(tmp_path, "key", PLAN, SHAPES, tell=told.append) as store:
        assert store.done == {"norm.weight": 0.0} and not told
        put_all(store)
    assert torch.equal(WeightStore(tmp_path / "key").part("norm.weight", "value")[0], NORM / 2)


@pytest.mark.skipif(sys.platform != "linux", reason="counts open files in Linux's /proc")
def test_partial_results_that_cannot_be_read_now_are_left(tmp_path):
    leave_half_done(tmp_path)
    folder = tmp_path / ".key.resume"
    kept = {path: path.read_bytes() for path in folder.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    first = max(int(name) for name in os.listdir("/proc/self/fd")) + 1
    refused = 0
    for handles in range(3, first + 3):
        resource.setrlimit(resource.RLIMIT_NOFILE, (handles, hard))
        try:
            with partial_store(tmp_path, "key", PLAN, SHAPES) as store:
                raise KeyboardInterrupt
        except (QuantizationError, OSError) as error:
            refused += isinstance(error, StoreUnreadableError)
        except KeyboardInterrupt:
            assert store.done == {"norm.weight": 0.0}
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert {path: path.read_bytes() for path in folder.iterdir()} == kept
    assert refused


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
    assert json.loads(journal.read_text())["version"] == JOURNAL_VERSION
    journal.unlink()
    with partial_store(tmp_path / "cache", "key", PLAN, SHAPES, tmp_path / "partial") as store:
        assert store.done == {} and store.boundary is None
        put(store, "norm.weight", "value", NORM)
        store.note("norm.weight", 0.0)
        put_all(store)


def test_results_of_a_source_that_changed_are_not_kept(tmp_path):
    states = iter([True, False])

    def unchanged() -> None:
        if not next(states):
            raise QuantizationError("it changed")

    folder = tmp_path / "partial"
    with (
        pytest.raises(QuantizationError, match="it changed"),
        partial_store(tmp_path / "cache", "key", PLAN, SHAPES, folder, unchanged) as store,
    ):
        put(store, "norm.weight", "value", NORM)
        store.note("norm.weight", 0.0)
        store.keep()
        put_all(store)
        store.keep()
    assert not (tmp_path / "cache" / "key").exists()
    with partial_store(tmp_path / "cache", "key", PLAN, SHAPES, folder) as store:
        assert store.done == {"norm.weight": 0.0}
        put_all(store)


def test_a_source_that_changed_at_the_end_makes_no_store(tmp_path):
    def changed() -> None:
        raise QuantizationError("it changed")

    with (
        pytest.raises(QuantizationError, match="it changed"),
        partial_store(tmp_path / "cache", "key", PLAN, SHAPES, None, changed) as store,
    ):
        put(store, "norm.weight", "value", NORM)
        store.note("norm.weight", 0.0)
        put_all(store)
    assert not (tmp_path / "cache" / "key").exists()


@pytest.mark.parametrize("name", ["weights.safetensors", "store.json", "thesis.txt"])
def test_a_users_folder_is_not_taken_for_partial_results(tmp_path, name):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text("years of work")
    with (
        pytest.raises(QuantizationError, match=f"holds {name}, which EdgeForge did not write"),
        partial_store(tmp_path / "cache", "key", PLAN, SHAPES, tmp_path / "mine"),
    ):
        pass
    assert [path.name for path in (tmp_path / "mine").iterdir()] == [name]
    assert (tmp_path / "mine" / name).read_text() == "years of work"


def test_a_link_in_place_of_the_lock_is_not_written_through(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "thesis").write_text("years of work")
    (tmp_path / "mine" / "lock").symlink_to(tmp_path / "thesis")
    with (
        pytest.raises(QuantizationError, match="cannot be written"),
        partial_store(tmp_path / "cache", "key", PLAN, SHAPES, tmp_path / "mine"),
    ):
        pass
    assert (tmp_path / "thesis").read_text() == "years of work"


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
