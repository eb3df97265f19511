"""Stores in a cache folder: keys, whole or not at all, damage, full disks, two makers at once."""

import json
import os
import resource
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from quant.errors import (
    QuantizationError,
    StoreDamagedError,
    StoreFullError,
    StoreUnreadableError,
)
from quant.formats.formats import parse_format
from quant.plans.plan import Assignment, QuantPlan
from quant.sealed_json import seal, unseal
from quant.store import cached
from quant.store.cached import find_store, new_store, store_key
from quant.store.fill import fill_store
from quant.store.store import WeightStore
from tests.oracles.small_store import KEY, PLAN, SHAPES, Source, digest_of, make


def left_in(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir())


@contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    """Stands in for a full disk: the system refuses to let a file grow past this."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_the_key_follows_what_determines_the_bytes(monkeypatch):
    other = QuantPlan("mine", {**PLAN.weights, "half": Assignment(parse_format("fp32"), "cast")})
    keys = [
        store_key("s", "m", PLAN),
        store_key("t", "m", PLAN),
        store_key("s", "n", PLAN),
        store_key("s", "m", other),
    ]
    assert len(set(keys)) == len(keys)
    assert store_key("s", "m", QuantPlan("another name", PLAN.weights)) == keys[0]
    monkeypatch.setattr(cached, "ROUNDING_VERSION", 999)  # other integers from the same algorithm
    assert store_key("s", "m", PLAN) != keys[0]
    assert all(len(key) == 40 for key in keys)


def test_a_store_is_found_only_when_it_is_whole(tmp_path):
    assert find_store(tmp_path, KEY) is None
    with new_store(tmp_path, KEY, PLAN, SHAPES) as writer:
        fill_store(Source(), PLAN, writer)
        assert find_store(tmp_path, KEY) is None
    found = find_store(tmp_path, KEY)
    assert found is not None and found.plan == PLAN
    assert left_in(tmp_path) == [KEY]


@pytest.mark.parametrize("error", [KeyboardInterrupt, QuantizationError("bad")])
def test_an_interrupted_store_leaves_nothing(tmp_path, error):
    with (
        pytest.raises(BaseException, match=r"bad|^$"),
        new_store(tmp_path, KEY, PLAN, SHAPES) as writer,
    ):
        writer.write("norm", "value", 0, memoryview(bytes(16)))
        raise error
    assert left_in(tmp_path) == []


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def lengthen(file: Path) -> None:
    with file.open("ab") as stream:
        stream.write(b"\0")


def lie_about_header(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.write(struct.pack("<Q", 1 << 62))


def garble_header(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.seek(8)
        stream.write(b"[1, 2, 3]")


def drop_digest(file: Path) -> None:
    notes = json.loads((file.parent / "store.json").read_text())
    del notes["digests"]["norm"]
    (file.parent / "store.json").write_text(json.dumps(notes))


DAMAGE = {
    "cut short": cut,
    "too long": lengthen,
    "empty": lambda file: os.truncate(file, 0),
    "seven bytes": lambda file: os.truncate(file, 7),
    "no weights": Path.unlink,
    "a header past the end": lie_about_header,
    "a header that is no JSON": garble_header,
    "no notes": lambda file: (file.parent / "store.json").unlink(),
    "notes cut short": lambda file: cut(file.parent / "store.json"),
    "notes of another kind": lambda file: (file.parent / "store.json").write_text("[]"),
    "notes that lack a weight": drop_digest,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_store_is_made_again(tmp_path, damage):
    store = make(tmp_path)
    whole = digest_of(store.folder)
    DAMAGE[damage](store.file)
    with pytest.raises(QuantizationError, match="holds"):
        WeightStore(store.folder)
    assert find_store(tmp_path, KEY) is None
    assert left_in(tmp_path) == []
    assert digest_of(make(tmp_path).folder) == whole


def flip(file: Path, at: int) -> None:
    """Changes one bit of a file, which keeps its size."""
    with file.open("r+b") as stream:
        stream.seek(at)
        (byte,) = stream.read(1)
        stream.seek(at)
        stream.write(bytes([byte ^ 0x10]))


def test_one_changed_bit_of_any_part_is_found_and_made_again(tmp_path):
    store = make(tmp_path)
    whole = digest_of(store.folder)
    found = find_store(tmp_path, KEY)
    assert found is not None and found.digests == store.digests
    pristine = store.file.read_bytes()
    places = [(n, e) for n in store.names() for e in store.extents(n).values()]
    assert len(places) > len(PLAN.weights)
    for name, extent in places:
        flip(store.file, extent.offset + extent.nbytes // 2)
        told: list[str] = []
        assert find_store(tmp_path, KEY, told.append) is None
        assert left_in(tmp_path) == []
        assert told == [
            f"a damaged weight store was removed and is made again: {store.folder} holds 1 of 8 "
            f"weights otherwise than they were written ({name})"
        ]
        again = make(tmp_path)
        assert digest_of(again.folder) == whole and again.file.read_bytes() == pristine


def test_a_store_without_a_digest_of_its_notes_is_not_taken(tmp_path):
    store = make(tmp_path)
    notes = unseal((store.folder / "store.json").read_text())
    (store.folder / "store.json").write_text(json.dumps(notes))
    with pytest.raises(StoreDamagedError, match="its content differs from its digest"):
        WeightStore(store.folder)


@pytest.mark.parametrize(
    "part", [b'"BF16"', b'"shape":[40,', b"relative_error", b'"digests"', b'"checksums"', b"int8"]
)
def test_one_changed_bit_of_the_header_or_the_notes_is_found(tmp_path, part):
    store = make(tmp_path)
    whole = digest_of(store.folder)
    files = [file for file in store.folder.iterdir() if part in file.read_bytes()]
    assert files
    for file in files:
        # The byte after the name: a digit of a shape, or the letters of a value.
        flip(file, file.read_bytes().index(part) + len(part) - 2)
        told: list[str] = []
        assert find_store(tmp_path, KEY, told.append) is None
        assert len(told) == 1 and str(store.folder) in told[0]
        assert digest_of(make(tmp_path).folder) == whole


@contextmanager
def limited(kind: int, amount: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (amount, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))


@pytest.mark.skipif(sys.platform != "linux", reason="counts open files in Linux's /proc")
def test_a_system_out_of_file_handles_leaves_a_whole_store_where_it_is(tmp_path):
    store = make(tmp_path)
    free = max(int(name) for name in os.listdir("/proc/self/fd")) + 1
    # From the first file to the last that opening and checking the store needs.
    refused = 0
    for handles in range(free + 4):
        if handles < 3:
            continue
        with limited(resource.RLIMIT_NOFILE, handles):
            try:
                find_store(tmp_path, KEY)
            except StoreUnreadableError as error:
                refused += 1
                assert "Too many open files" in str(error) and "left as it is" in str(error)
        assert left_in(tmp_path) == [KEY]
    assert refused >= 2
    assert find_store(tmp_path, KEY) is not None
    assert (tmp_path / KEY).stat().st_ino == store.folder.stat().st_ino


OUT_OF_MEMORY = """
import resource, sys
from pathlib import Path
from quant.errors import StoreUnreadableError
from quant.store.cached import find_store
find_store(Path(sys.argv[1]) / "absent", "key")
with open("/proc/self/statm") as file:
    pages = int(file.read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + (1 << 20), -1))
try:
    find_store(Path(sys.argv[1]), sys.argv[2])
except StoreUnreadableError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_a_system_out_of_memory_leaves_a_whole_store_where_it_is(tmp_path):
    plan = QuantPlan("large", {"half": Assignment(parse_format("fp16"), "cast")})
    with new_store(tmp_path, KEY, plan, {"half": (1024, 8192)}) as writer:
        writer.note("half", 0.0)
    done = subprocess.run(
        [sys.executable, "-c", OUT_OF_MEMORY, str(tmp_path), KEY],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "cannot be read (Cannot allocate memory); it is left as it is" in done.stdout
    assert left_in(tmp_path) == [KEY]
    assert find_store(tmp_path, KEY) is not None


def test_a_store_of_another_version_is_refused(tmp_path):
    store = make(tmp_path)
    notes = unseal((store.folder / "store.json").read_text())
    (store.folder / "store.json").write_text(seal({**notes, "version": 99}))
    with pytest.raises(QuantizationError, match=r"store of version 99; this .* reads version 2"):
        WeightStore(store.folder)


def test_who_comes_second_takes_the_firsts_store(tmp_path):
    with new_store(tmp_path, KEY, PLAN, SHAPES) as writer:
        fill_store(Source(), PLAN, writer)
        other = threading.Thread(target=make, args=(tmp_path,))
        other.start()
        other.join()
        inode = (tmp_path / KEY).stat().st_ino
    assert (tmp_path / KEY).stat().st_ino == inode
    assert left_in(tmp_path) == [KEY]
    assert find_store(tmp_path, KEY) is not None


RACER = """
import sys, time, importlib.util
from pathlib import Path
spec = importlib.util.spec_from_file_location("racer", sys.argv[1])
racer = importlib.util.module_from_spec(spec)
spec.loader.exec_module(racer)
cache = Path(sys.argv[2])
(cache / f"ready-{sys.argv[3]}").touch()
while len(list(cache.glob("ready-*"))) < 2:
    time.sleep(0.001)
print(racer.make(cache / "stores").digests["embed"])
"""


def test_two_processes_may_make_one_store(tmp_path):
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, __file__, str(tmp_path), str(number)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    shown = [racer.communicate(timeout=60)[0] for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0]
    assert shown[0] == shown[1] == make(tmp_path / "mine").digests["embed"] + "\n"
    assert left_in(tmp_path / "stores") == [KEY]


def test_a_full_disk_is_met_before_the_work(tmp_path):
    asked: list[str] = []

    class Watched(Source):
        def read_rows(self, name, start, stop):
            asked.append(name)
            return super().read_rows(name, start, stop)

    with largest_file(1000), pytest.raises(StoreFullError) as caught:
        make(tmp_path, Watched())
    assert "has no room for this model (File too large)" in str(caught.value)
    assert "EDGEFORGE_CACHE" in str(caught.value)
    # An output folder's writer must not take it for its own disk's lack of space.
    assert caught.value.__cause__ is None and caught.value.__context__ is None
    assert not asked
    assert left_in(tmp_path) == []


def test_a_disk_that_fills_up_at_the_notes_leaves_nothing(tmp_path, monkeypatch):
    with (
        ExitStack() as full,
        pytest.raises(StoreFullError),
        new_store(tmp_path, KEY, PLAN, SHAPES) as writer,
    ):
        fill_store(Source(), PLAN, writer)
        monkeypatch.setattr(json, "dumps", lambda *_, **__: "x" * 100_000)
        full.enter_context(largest_file(90_000))
    assert left_in(tmp_path) == []


def test_a_cache_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(QuantizationError, match=r"cannot be written \(Not a directory\): set EDGE"):
        make(tmp_path / "file" / "stores")


def test_what_a_killed_process_left_is_removed_and_a_live_ones_is_not(tmp_path):
    left = tmp_path / f".key.partial-{os.getpid()}-1"  # its number is that of a live process
    left.mkdir()
    (left / "weights.safetensors").touch()
    with new_store(tmp_path, "other", PLAN, SHAPES) as writer:
        make(tmp_path)
        assert left_in(tmp_path) == sorted([writer.folder.name, KEY])
        fill_store(Source(), PLAN, writer)
    assert left_in(tmp_path) == sorted([KEY, "other"])


def test_a_source_that_changed_makes_no_store(tmp_path):
    def changed() -> None:
        raise QuantizationError("it changed")

    with (
        pytest.raises(QuantizationError, match="it changed"),
        new_store(tmp_path, KEY, PLAN, SHAPES, changed) as writer,
    ):
        fill_store(Source(), PLAN, writer)
    assert left_in(tmp_path) == []
