"""Weight stores: their bytes, their parts, and what becomes of half-made and damaged ones."""

import hashlib
import json
import math
import os
import resource
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from quant.errors import QuantizationError, StoreFullError
from quant.formats.formats import parse_format
from quant.plans.plan import Assignment, QuantPlan
from quant.quantizers import rtn
from quant.store import fill as quantize
from quant.store.fill import fill_store
from quant.store.store import WeightStore, find_store, new_store, store_key, weight_digest

FORMATS = {
    "embed": ((40, 64), "int4-g32"),
    "norm": ((64,), "fp32"),
    "asym": ((33, 64), "int4-g32-asym"),
    "eight": ((17, 64), "int8-pc"),
    "two": ((33, 64), "int2-g16-asym"),
    "three": ((17, 64), "int3-g32"),
    "half": ((9, 64), "fp16"),
    "brain": ((9, 64), "bf16"),
}
SHAPES = {name: shape for name, (shape, _) in FORMATS.items()}
PLAN = QuantPlan(
    "mine",
    {
        name: Assignment(parse_format(format), "rtn" if format.startswith("int") else "cast")
        for name, (_, format) in FORMATS.items()
    },
)
KEY = "a" * 40


class Source:
    """Random weights held in memory."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.weights = {
            name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()
        }

    def shapes(self):
        return SHAPES

    def pieces(self, name):
        return [(name, 1 if len(SHAPES[name]) == 1 else SHAPES[name][0])]

    def read_rows(self, name, start, stop):
        return self.weights[name].reshape(-1, self.weights[name].shape[-1])[start:stop]


def make(cache: Path, source: Source | None = None, key: str = KEY, **options) -> WeightStore:
    with new_store(cache, key, PLAN, SHAPES) as writer:
        fill_store(source or Source(), PLAN, writer, **options)
    return WeightStore(cache / key)


def digest_of(folder: Path) -> str:
    return hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest()


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


@pytest.mark.parametrize(("threads", "chunk"), [(1, 1 << 20), (1, 64), (3, 128), (2, 640)])
def test_bytes_and_notes_do_not_depend_on_threads_or_chunks(tmp_path, monkeypatch, threads, chunk):
    expected = make(tmp_path / "once", threads=1)
    monkeypatch.setattr(quantize, "CHUNK_WEIGHTS", chunk)
    found = make(tmp_path / "again", threads=threads)
    assert digest_of(found.folder) == digest_of(expected.folder)
    assert found.digests == expected.digests
    assert found.relative_error == pytest.approx(expected.relative_error, rel=1e-5)


class LateFirst(Source):
    """The first row of a weight is there when the last is asked for: its chunk comes last."""

    def __init__(self) -> None:
        super().__init__()
        self.last_asked = {name: threading.Event() for name in SHAPES}
        self.order: list[tuple[str, int]] = []

    def read_rows(self, name, start, stop):
        rows = super().read_rows(name, start, stop)
        if stop == math.prod(SHAPES[name]) // 64:
            self.last_asked[name].set()
        elif start == 0:
            assert self.last_asked[name].wait(30)
        self.order.append((name, start))
        return rows


def test_notes_do_not_depend_on_the_order_of_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(quantize, "CHUNK_WEIGHTS", 64)
    late = LateFirst()
    turned = make(tmp_path / "turned", late, threads=2)
    embed = [start for name, start in late.order if name == "embed"]
    assert embed.index(0) >= 38 and embed[:38] == list(range(1, 39))
    forwards = make(tmp_path / "forwards", threads=1)
    texts = [(store.folder / "store.json").read_text() for store in (turned, forwards)]
    assert texts[0] == texts[1]


class Together(Source):
    """Four threads must have asked for rows before the first gets any."""

    def __init__(self) -> None:
        super().__init__()
        self.barrier = threading.Barrier(4)
        self.met = threading.local()

    def read_rows(self, name, start, stop):
        if not getattr(self.met, "others", False):
            self.barrier.wait(30)
            self.met.others = True
        return super().read_rows(name, start, stop)


def test_four_threads_at_once_make_the_bytes_of_one(tmp_path, monkeypatch):
    monkeypatch.setattr(quantize, "CHUNK_WEIGHTS", 64)
    alone = make(tmp_path / "alone", threads=1)
    for attempt in range(5):
        together = make(tmp_path / f"together {attempt}", Together(), threads=4)
        assert together.file.read_bytes() == alone.file.read_bytes()
        assert together.relative_error == alone.relative_error


def test_parts_equal_the_weight_quantized_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(quantize, "CHUNK_WEIGHTS", 128)
    source = Source()
    store = make(tmp_path, source)
    for name, assignment in PLAN.weights.items():
        if assignment.algorithm != "rtn":
            continue
        whole = rtn.RTN.quantize_rows(source.weights[name], assignment.format)
        assert torch.equal(store.part(name, "codes"), whole.codes)
        assert torch.equal(store.part(name, "scale"), whole.scale)
        if whole.zero_point is not None:
            assert torch.equal(store.part(name, "zero_point"), whole.zero_point)
    assert torch.equal(store.part("norm", "value")[0], source.weights["norm"])
    assert torch.equal(store.part("half", "value"), source.weights["half"].half())
    assert torch.equal(store.part("brain", "value"), source.weights["brain"].bfloat16())


def test_the_safetensors_library_sees_the_same_tensors(tmp_path):
    store = make(tmp_path)
    assert list(store.names()) == list(SHAPES)
    with safe_open(store.file, "pt") as opened:
        names = set(opened.keys())
        for name in store.names():
            for part, extent in store.extents(name).items():
                tensor = opened.get_tensor(f"{name}:{part}")
                assert torch.equal(tensor, store.part(name, part))
                assert tuple(tensor.shape) == extent.shape
                assert extent.nbytes == tensor.numel() * tensor.element_size()
                assert extent.offset % tensor.element_size() == 0
                names.remove(f"{name}:{part}")
        assert not names
    assert store.nbytes == store.file.stat().st_size


def test_writing_to_a_part_never_reaches_the_file(tmp_path):
    store = make(tmp_path)
    before = digest_of(store.folder)
    for name in store.names():
        for part in store.extents(name):
            store.part(name, part).zero_()
    assert digest_of(store.folder) == before
    assert WeightStore(store.folder).part("embed", "codes").any()


def test_released_pages_read_as_before(tmp_path):
    store = make(tmp_path)
    codes = store.part("embed", "codes")
    before = codes.clone()
    store.release()
    assert torch.equal(codes, before)


def test_relative_errors_are_those_of_what_is_stored(tmp_path):
    source = Source()
    store = make(tmp_path, source)
    for name, weight in source.weights.items():
        stored = decoded(store, name).reshape(weight.shape)
        wanted = np.linalg.norm(weight.numpy() - stored) / np.linalg.norm(weight.numpy())
        assert store.relative_error[name] == pytest.approx(wanted, rel=1e-4), name
    assert store.relative_error["norm"] == 0.0


def decoded(store: WeightStore, name: str) -> np.ndarray:
    """A weight as its stored parts say, by nothing of ours but the names of the parts."""
    parts = {part: store.part(name, part) for part in store.extents(name)}
    if "value" in parts:
        return parts["value"].double().numpy()
    format = PLAN.weights[name].format
    codes = parts["codes"].numpy()
    scale = parts["scale"].double().numpy()
    codes = apart(codes, format.bits)
    zero = np.full(scale.shape, 2 ** (format.bits - 1))
    if "zero_point" in parts:
        zero = apart(parts["zero_point"].numpy(), format.bits)[:, : scale.shape[1]]
    width = codes.shape[1] // scale.shape[1]
    return (codes - np.repeat(zero, width, 1).astype(float)) * np.repeat(scale, width, 1)


def apart(packed: np.ndarray, bits: int) -> np.ndarray:
    """One code an element, by NumPy's own bits."""
    stream = np.unpackbits(packed, axis=1, bitorder="little")
    whole = stream[:, : stream.shape[1] // bits * bits].reshape(len(packed), -1, bits)
    return whole @ (1 << np.arange(bits))


def test_an_all_zero_weight_has_no_error(tmp_path):
    source = Source()
    source.weights["embed"].zero_()
    assert make(tmp_path, source).relative_error["embed"] == 0.0


def test_digests_are_sha256_of_the_parts_by_name(tmp_path):
    store = make(tmp_path)
    data = store.file.read_bytes()
    for name in store.names():
        expected = hashlib.sha256()
        for part, extent in sorted(store.extents(name).items()):
            expected.update(f"{part}:".encode())
            expected.update(data[extent.offset : extent.offset + extent.nbytes])
        assert store.digests[name] == expected.hexdigest()[:32]


def test_one_bit_changes_one_digest(tmp_path):
    first = make(tmp_path / "first")
    source = Source()
    source.weights["norm"].view(torch.int32)[3] ^= 1
    second = make(tmp_path / "second", source)
    changed = {n for n in SHAPES if first.digests[n] != second.digests[n]}
    assert changed == {"norm"}


def test_a_digest_does_not_depend_on_how_bytes_are_cut():
    whole = weight_digest({"codes": [b"abcdef"], "scale": [b"xy"]})
    assert weight_digest({"scale": [b"x", b"y"], "codes": [b"ab", b"", b"cdef"]}) == whole
    assert weight_digest({"codes": [b"abcde"], "scale": [b"fxy"]}) != whole


def test_the_key_follows_what_determines_the_bytes():
    other = QuantPlan("mine", {**PLAN.weights, "half": Assignment(parse_format("fp32"), "cast")})
    keys = [
        store_key("s", "m", PLAN),
        store_key("t", "m", PLAN),
        store_key("s", "n", PLAN),
        store_key("s", "m", other),
    ]
    assert len(set(keys)) == len(keys)
    assert store_key("s", "m", QuantPlan("another name", PLAN.weights)) == keys[0]
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


def test_a_store_of_another_version_is_refused(tmp_path):
    store = make(tmp_path)
    notes = json.loads((store.folder / "store.json").read_text())
    (store.folder / "store.json").write_text(json.dumps({**notes, "version": 99}))
    with pytest.raises(QuantizationError, match="another version"):
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


def test_what_a_killed_process_left_is_removed_after_a_day(tmp_path):
    old, new = tmp_path / ".key.partial-1-1", tmp_path / ".key.partial-2-2"
    for folder in (old, new):
        folder.mkdir()
        (folder / "weights.safetensors").touch()
    yesterday = time.time() - 25 * 3600
    os.utime(old, (yesterday, yesterday))
    make(tmp_path)
    assert left_in(tmp_path) == [new.name, KEY]
