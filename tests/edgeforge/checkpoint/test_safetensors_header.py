"""The safetensors reader against the safetensors library, and against headers that lie."""

import json
import struct
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save, save_file

from edgeforge.checkpoint import safetensors_header
from edgeforge.checkpoint.safetensors_header import read_safetensors
from edgeforge.errors import CheckpointError

F32_4 = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


def write(path: Path, header: object, data: bytes = bytes(16)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def values(path: Path, entry) -> bytes:
    return path.read_bytes()[entry.offset : entry.offset + entry.nbytes]


shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
dtypes = st.sampled_from(["float32", "float16", "float64", "int64", "int8", "uint8", "bool"])


@settings(max_examples=60, deadline=None)
@given(
    tensors=st.dictionaries(st.text(max_size=8), st.tuples(dtypes, shapes), max_size=6),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_file_of_the_library_reads_back(tmp_path_factory, tensors, seed):
    tensors = {n: v for n, v in tensors.items() if n != "__metadata__"}
    random = np.random.default_rng(seed)
    arrays = {
        name: random.integers(0, 2, shape).astype(dtype) for name, (dtype, shape) in tensors.items()
    }
    path = tmp_path_factory.mktemp("st") / "model.safetensors"
    save_file(arrays, path, metadata={"format": "pt"})
    entries = read_safetensors(path)
    assert entries.keys() == arrays.keys()
    for name, array in arrays.items():
        entry = entries[name]
        assert (entry.dtype, entry.shape) == (str(array.dtype), array.shape)
        assert values(path, entry) == array.tobytes()


REFUSED = {
    "header longer than the file": (struct.pack("<Q", 1000) + b"{}", "cut short"),
    "header of 2**63 bytes": (struct.pack("<Q", 2**63) + b"{}", "damaged"),
    "a header that is not JSON": (struct.pack("<Q", 4) + b"{xx}", "not valid JSON"),
    "not UTF-8": (struct.pack("<Q", 3) + b'{"\xff', "not valid JSON"),
    "a list": (struct.pack("<Q", 2) + b"[]", "not a JSON object but a list"),
    "seven bytes": (b"1234567", "7 bytes, too few"),
    "empty": (b"", "0 bytes, too few"),
    "deep nesting": (struct.pack("<Q", 400_000) + b"[" * 400_000, "nested too deep|more than a"),
    "git lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
        "Git LFS pointer.*git lfs pull",
    ),
    "another format": (b"GGUF\x03\0\0\0\x01\0\0\0\0\0\0\0", "not a safetensors file|cut short"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_is_not_safetensors_is_refused(tmp_path, case):
    content, words = REFUSED[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=words) as caught:
        read_safetensors(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def tensor(**changes):
    return {"a": {**F32_4, **changes}}


def pair(begin: int, end: int, shape: list[int]):
    return {"a": F32_4, "b": {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}}


LIES = {
    "unknown dtype": (tensor(dtype="Q4"), "unknown dtype 'Q4'"),
    "dtype not text": (tensor(dtype=4), "unknown dtype"),
    "shape not a list": (tensor(shape=4), "not a list of counts"),
    "negative shape": (tensor(shape=[-4]), "not a list of counts"),
    "fractional shape": (tensor(shape=[4.0]), "not a list of counts"),
    "true as a size": (tensor(shape=[True, 4]), "not a list of counts"),
    "overflowing shape": (tensor(shape=[2**32, 2**32]), "too large to address"),
    "overflow behind a zero": (
        {"a": {"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}},
        "too large to address",
    ),
    "1000 dimensions": (tensor(shape=[4] + [1] * 999), "1000 dimensions"),
    "begin past end": (tensor(data_offsets=[16, 0]), "begins at byte 16, past its end"),
    "three offsets": (tensor(data_offsets=[0, 16, 16]), "not two counts"),
    "negative offset": (tensor(data_offsets=[-16, 0]), "not two counts"),
    "wrong size": (tensor(shape=[5]), "takes 20 bytes.*span 16"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 16]}}, "has no shape"),
    "tensor is a list": ({"a": ["F32", [4], [0, 16]]}, "not described by an object"),
    "metadata of numbers": ({"__metadata__": {"a": 1}, "a": F32_4}, "strings to strings"),
    "outside the file": (pair(1000, 1016, [4]), "984 bytes past the end"),
    "overlap": (pair(8, 24, [4]), "overlaps 'a' by 8 bytes"),
    "hole": (
        {"a": {"dtype": "U8", "shape": [4], "data_offsets": [12, 16]}},
        "hole of 12 unused bytes after the header",
    ),
    "empty tensor inside another": (pair(8, 8, [0]), "overlaps"),
    "trailing bytes": ({"a": {**F32_4, "shape": [2], "data_offsets": [0, 8]}}, "8 bytes after its"),
    "truncated data": (tensor(shape=[8], data_offsets=[0, 32]), "is 16 bytes short .*cut short"),
    "duplicate tensor": (
        b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},'
        b'"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
        "'a' occurs twice",
    ),
    "duplicate field": (
        b'{"a":{"dtype":"F32","shape":[2],"shape":[4],"data_offsets":[0,16]}}',
        "'shape' occurs twice",
    ),
    "NaN": (b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,16]}}', "NaN is not JSON"),
    "a number of 5000 digits": (
        b'{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,16]}}' % (b"9" * 5000),
        "not valid JSON",
    ),
    "a lone surrogate": (
        b'{"\\ud800":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
        "not valid JSON",
    ),
}


@pytest.mark.parametrize("case", LIES)
def test_a_header_that_lies_is_refused(tmp_path, case):
    header, words = LIES[case]
    path = write(tmp_path / "model.safetensors", header)
    with pytest.raises(CheckpointError, match=words) as caught:
        read_safetensors(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_four_bit_tensors_are_listed(tmp_path):
    header = {"a": {"dtype": "F4", "shape": [4, 2], "data_offsets": [0, 4]}}
    path = write(tmp_path / "model.safetensors", header, bytes(4))
    assert read_safetensors(path)["a"].dtype == "float4_e2m1"
    write(path, {"a": {"dtype": "F4", "shape": [7], "data_offsets": [0, 4]}}, bytes(4))
    with pytest.raises(CheckpointError, match="takes 4 bytes, but"):
        read_safetensors(path)


@pytest.mark.parametrize("kind", ["tensors", "nested", "numbers", "metadata"])
def test_a_huge_header_takes_bounded_time_and_memory(tmp_path, kind):
    megabytes = 40_000_000
    if kind == "tensors":
        one = '"%07d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
        text = "{" + ",".join(one % i for i in range(megabytes // 60)) + "}"
    elif kind == "nested":
        text = '{"a":' * (megabytes // 5)
    elif kind == "numbers":
        text = '{"a":[' + "0," * (megabytes // 2) + "0]}"
    else:
        text = '{"__metadata__":{"a":' + "1" * megabytes + "}}"
    path = write(tmp_path / "model.safetensors", text.encode(), b"")
    del text
    start = time.process_time()
    tracemalloc.start()
    with pytest.raises(CheckpointError):
        read_safetensors(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * megabytes
    assert time.process_time() - start < 5


def test_too_many_tensors_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_header, "MAX_TENSORS_PER_FILE", 1000)
    one = {"dtype": "F32", "shape": [], "data_offsets": [0, 0]}
    header = {str(i): one for i in range(1001)}
    path = write(tmp_path / "model.safetensors", header, b"")
    with pytest.raises(CheckpointError, match="lists 1001 tensors"):
        read_safetensors(path)


VALID = save(
    {
        "model.a": np.arange(12, dtype=np.float32).reshape(3, 4),
        "model.b": np.arange(6, dtype=np.float16),
        "c": np.zeros((0, 2), np.float32),
    },
    metadata={"format": "pt"},
)
HEADER_END = 8 + int.from_bytes(VALID[:8], "little")


@st.composite
def mutated(draw) -> bytes:
    content = bytearray(VALID)
    for _ in range(draw(st.integers(1, 4))):
        where = st.integers(0, min(HEADER_END, len(content)) - 1)
        match draw(st.sampled_from(["byte", "digit", "delete", "insert", "cut", "extend"])):
            case "byte":
                content[draw(where)] = draw(st.integers(0, 255))
            case "digit":
                digits = [i for i, b in enumerate(content[:HEADER_END]) if 48 <= b <= 57 and i >= 8]
                if digits:
                    content[draw(st.sampled_from(digits))] = draw(st.integers(48, 57))
            case "delete":
                del content[draw(where)]
            case "insert":
                text = st.sampled_from([b"0", b"-", b",", b"{", b"]", b'"', b"1e9", b"null", b"\\"])
                at = draw(where)
                content[at:at] = draw(text)
            case "cut":
                del content[draw(st.integers(8, len(content))) :]
            case "extend":
                content += draw(st.binary(max_size=9))
        if len(content) < 9:
            break
    return bytes(content)


@settings(
    max_examples=400, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(content=mutated())
def test_a_mutated_file_is_refused_or_read_as_the_library_reads_it(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    try:
        entries = read_safetensors(path)
    except CheckpointError as error:
        assert "\n" not in str(error)
        return
    try:
        with safe_open(path, "np") as library:
            assert set(library.keys()) == entries.keys()
            for name, entry in entries.items():
                array = library.get_tensor(name)
                assert (str(array.dtype), array.shape) == (entry.dtype, entry.shape)
                assert values(path, entry) == array.tobytes()
    except SafetensorError as error:
        # Serde takes -0 for a float where Python's parser takes it for 0: harmless.
        assert b"-0" in content, error
