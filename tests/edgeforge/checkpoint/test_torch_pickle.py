"""The reader of torch's files against torch itself, and against pickles that try to run code."""

import collections
import os
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeforge.checkpoint import pickle_machine
from edgeforge.checkpoint.checkpoint import Checkpoint
from edgeforge.errors import CheckpointError


def folder_with(path: Path, state: object, **options) -> Path:
    (path / "config.json").write_text("{}")
    torch.save(state, path / "pytorch_model.bin", **options)
    return path


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("protocol", [2, 4])
def test_every_kind_of_state_dict_reads_as_torch_loads_it(tmp_path, protocol):
    base = torch.randn(6, 4)
    state = collections.OrderedDict(
        whole=base,
        rows=base[2:5],  # A view into the same storage, at an offset.
        half=torch.randn(3, 5).half(),
        brain=torch.randn(7).bfloat16(),
        parameter=torch.nn.Parameter(torch.randn(2, 2)),
        scalar=torch.tensor(1.5),
        empty=torch.zeros(0, 3),
        column=torch.randn(5, 1).t(),  # Strides of axes of length 1 do not matter.
        steps=3,  # Not a tensor: passed over.
    )
    state._metadata = collections.OrderedDict({"": {"version": 1}})
    path = folder_with(tmp_path, state, pickle_protocol=protocol)
    loaded = torch.load(path / "pytorch_model.bin", weights_only=False)
    with Checkpoint.open(path) as checkpoint:
        assert list(checkpoint.tensors) == [n for n in state if n != "steps"]
        for name in checkpoint.tensors:
            assert checkpoint.tensors[name].shape == tuple(loaded[name].shape)
            assert checkpoint.read(name).tobytes() == bits(loaded[name])
        assert checkpoint.read_rows("rows", 1, 3).tobytes() == bits(base[3:5])
        assert checkpoint.tensors["rows"].offset == checkpoint.tensors["whole"].offset + 32


def test_a_module_state_dict_and_shards_read_back(tmp_path):
    first, second = torch.nn.Linear(4, 3).state_dict(), {"x": torch.randn(2)}
    torch.save(first, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save(second, tmp_path / "pytorch_model-00002-of-00002.bin")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin.index.json").write_text(
        '{"weight_map": {"weight": "pytorch_model-00001-of-00002.bin",'
        '"bias": "pytorch_model-00001-of-00002.bin", "x": "pytorch_model-00002-of-00002.bin"}}'
    )
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.read("weight").tobytes() == bits(first["weight"])
        assert checkpoint.read("x").tobytes() == bits(second["x"])
        assert len(checkpoint.files) == 2


class Evil:
    def __reduce__(self):
        return os.system, ("touch " + os.environ["EVIL_FILE"],)


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
def test_a_pickle_that_tries_to_run_code_is_refused_and_does_not_run(
    tmp_path, monkeypatch, options
):
    monkeypatch.setenv("EVIL_FILE", str(tmp_path / "ran"))
    path = folder_with(tmp_path, {"a": torch.zeros(2), "b": Evil()}, **options)
    with pytest.raises(CheckpointError, match=r"run code.*safetensors") as caught:
        Checkpoint.open(path)
    assert str(path / "pytorch_model.bin") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()
    # The same file does run its code when it is loaded without care.
    torch.load(path / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"a": torch.zeros(3, 4).t()}, "'a' is not contiguous"),
        ({"a": torch.zeros(3, 1).expand(3, 4)}, "'a' is not contiguous"),
        ([torch.zeros(3)], "holds a list, not a dict"),
        ({"model": {"a": torch.zeros(3)}}, "no tensors by name"),
        ({3: torch.zeros(3)}, "no tensors by name"),
        ({}, "no tensors by name"),
        ({"a": torch.zeros(3).to_sparse()}, "asks to call .*only plain tensors"),
    ],
)
def test_what_is_no_table_of_plain_tensors_is_refused(tmp_path, state, words):
    with pytest.raises(CheckpointError, match=words):
        Checkpoint.open(folder_with(tmp_path, state))


def repack(source: Path, target: Path, pickled: bytes | None, compression: int) -> None:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for info in old.infolist():
            content = old.read(info)
            is_pickle = info.filename.endswith("data.pkl")
            new.writestr(info.filename, pickled if is_pickle and pickled is not None else content)


@pytest.mark.parametrize(
    ("pickled", "words"),
    [
        (b"", "damaged"),
        (b"\x80\x02}", "damaged"),
        (b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00ls\x85R.", "os.system"),
        (b"\x80\x02(ios\nsystem\n.", "opcode INST"),
        (b"\x80\x02cos\nsystem\n)\x81.", "opcode NEWOBJ"),
        (b"\x80\x02" + b"\x85" * 5, "damaged"),
        (b"\x80\x02N" + b"\x85" * 100_000 + b"}q\x00h\x00s.", "damaged|sets items"),
        (b"\x80\x02}N" + b"\x85" * 100_000 + b"Ns.", "dict key of type tuple"),
        (b"\x80\x02r\xff\xff\xff\x7f.", "damaged"),
        (b"\x80\x02\x8e" + struct.pack("<Q", 2**62) + b".", "damaged"),
        (pickle.dumps({"a": 1}, 2), "no tensors by name"),
    ],
)
def test_a_hostile_pickle_is_refused(tmp_path, pickled, words):
    torch.save({"a": torch.zeros(3)}, tmp_path / "whole.bin")
    repack(tmp_path / "whole.bin", tmp_path / "pytorch_model.bin", pickled, zipfile.ZIP_STORED)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=words):
        Checkpoint.open(tmp_path)


def test_the_opcodes_of_a_pickle_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(pickle_machine, "MAX_PICKLE_OPCODES", 1000)
    torch.save({"a": torch.zeros(3)}, tmp_path / "whole.bin")
    pickled = b"\x80\x02" + b"]" * 1001 + b"."
    repack(tmp_path / "whole.bin", tmp_path / "pytorch_model.bin", pickled, zipfile.ZIP_STORED)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="more than 1000 opcodes"):
        Checkpoint.open(tmp_path)


def test_compressed_members_are_refused_before_they_are_inflated(tmp_path):
    torch.save({"a": torch.zeros(1000)}, tmp_path / "whole.bin")
    repack(tmp_path / "whole.bin", tmp_path / "pytorch_model.bin", None, zipfile.ZIP_DEFLATED)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="compressed or encrypted member"):
        Checkpoint.open(tmp_path)


def lying_pickle(elements: int, offset: int, shape: tuple[int, ...], key: str = "0") -> bytes:
    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    def number(value: int) -> bytes:
        raw = value.to_bytes(9, "little", signed=True)
        return b"\x8a\x09" + raw

    sizes = b"(" + b"".join(map(number, shape)) + b"t"
    storage = (
        b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu")
        + number(elements) + b"tQ"
    )  # fmt: skip
    ones = b"(" + number(1) * len(shape) + b"t"
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(offset) + sizes + ones
    return b"\x80\x02}" + text("a") + call + b"\x89}tRs."


@pytest.mark.parametrize(
    ("elements", "offset", "shape", "key", "words"),
    [
        (3, 0, (4,), "0", "past the end of its storage"),
        (3, 1, (3,), "0", "past the end of its storage"),
        (1000, 0, (1000,), "0", "storage of 4000 bytes in a member of 12"),
        (3, -1, (3,), "0", "size, stride or offset -1"),
        (3, 0, (-3,), "0", "size, stride or offset -3"),
        (2**62, 0, (2**62,), "0", "in a member of 12"),
        (3, 0, (3,), "../0", "is not in the file"),
    ],
)
def test_a_tensor_outside_its_storage_is_refused(tmp_path, elements, offset, shape, key, words):
    torch.save({"a": torch.arange(3.0)}, tmp_path / "whole.bin")
    (tmp_path / "config.json").write_text("{}")
    target = tmp_path / "pytorch_model.bin"
    repack(tmp_path / "whole.bin", target, lying_pickle(3, 0, (3,)), zipfile.ZIP_STORED)
    assert Checkpoint.open(tmp_path).read("a").tolist() == [0, 1, 2]
    pickled = lying_pickle(elements, offset, shape, key)
    repack(tmp_path / "whole.bin", target, pickled, zipfile.ZIP_STORED)
    with pytest.raises(CheckpointError, match=words):
        Checkpoint.open(tmp_path)


@settings(
    max_examples=300, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_damaged_torch_file_is_refused_or_stays_inside_the_file(tmp_path, data):
    path = tmp_path / "pytorch_model.bin"
    if not (tmp_path / "config.json").exists():
        folder_with(tmp_path, {"a": torch.arange(4.0), "b": torch.ones(2, 2).half()})
        (tmp_path / "whole").write_bytes(path.read_bytes())
    content = bytearray((tmp_path / "whole").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    path.write_bytes(content)
    try:
        entries = Checkpoint.open(tmp_path).tensors.values()
    except CheckpointError as error:
        assert "\n" not in str(error)
        return
    assert all(e.offset > 0 and e.offset + e.nbytes <= len(content) for e in entries)
