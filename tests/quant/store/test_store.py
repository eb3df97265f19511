"""Weight stores: their bytes, their parts, the notes and digests beside them."""

import hashlib
import json
import math
import os
import re
import struct
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from quant.quantizers import rtn
from quant.sealed_json import seal, unseal
from quant.store import fill as quantize
from quant.store.store import WeightStore, weight_digest
from tests.oracles.small_store import PLAN, SHAPES, Source, digest_of, make


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


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_store_larger_than_the_machines_memory_is_read(tmp_path):
    store = make(tmp_path / "store", threads=1)
    name = next(store.names())
    part = next(iter(store.extents(name)))
    expected = store.part(name, part).clone()
    notes_file = store.folder / "store.json"
    notes = unseal(notes_file.read_bytes())
    memory = int(re.search(r"MemTotal: +(\d+) kB", Path("/proc/meminfo").read_text())[1]) * 1024
    # One more part, a hole of the file: as large as the memory is, and a half of it.
    text = json.loads(store.file.read_bytes()[8:].split(b"}}", 1)[0] + b"}}")
    begin = max(row["data_offsets"][1] for key, row in text.items() if key != "__metadata__")
    hole = memory * 3 // 2 + 8 * 1024**3
    extra = {"dtype": "U8", "shape": [hole], "data_offsets": [begin, begin + hole]}
    header = json.dumps(text | {f"{name}:hole": extra}).encode()
    whole = store.file.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    store.file.write_bytes(struct.pack("<Q", len(header)) + header + whole[8 + length :])
    os.truncate(store.file, 8 + len(header) + begin + hole)
    notes_file.write_text(seal(notes | {"header": zlib.crc32(header)}))
    large = WeightStore(store.folder)
    assert torch.equal(large.part(name, part), expected)
    large.part(name, part).zero_()
    assert torch.equal(WeightStore(store.folder).part(name, part), expected)


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
