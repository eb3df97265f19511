"""Schemas as text: what is written is what ExecuTorch's own schema compiler reads, and back."""

from __future__ import annotations

import json
import shutil
import subprocess
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import flatbuffers
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporters.executorch.flatbuffer import Record, Schema
from exporters.executorch.reader import read_pte
from exporters.executorch.schemas import PROGRAM, XNNPACK
from tests.exporters.executorch.small_programs import make
from tests.oracles.vocabulary import SPECS

ROOT = Path(next(iter(find_spec("executorch").submodule_search_locations)))
ALL = Schema(
    """
union Either: Number Name=Named
table Root: flag:bool low:byte high:ubyte small:short number:int wide:long real:double \
numbers:[long] reals:[float] names:[string] one:Either many:[Named]
table Number: value:uint
table Named: name:string child:Root
""",
    b"ROOT",
)


def flatc(schema: Path, data: bytes, folder: Path) -> dict:
    """What ExecuTorch's copy of flatc makes of a buffer."""
    program = next(path for path in (ROOT / "data" / "bin").iterdir() if path.stem == "flatc")
    (folder / "data.bin").write_bytes(data)
    for file in schema.parent.glob("*.fbs"):
        shutil.copy(file, folder)
    command = [str(program), "--json", "--defaults-json", "--strict-json", "-o", str(folder)]
    command += [str(folder / schema.name), "--", str(folder / "data.bin")]
    subprocess.run(command, check=True, capture_output=True)
    return json.loads((folder / "data.json").read_text())


def plain(value: object) -> object:
    """A record as flatc's JSON has it: unions with their member's name beside them."""
    if isinstance(value, list):
        return [plain(item) for item in value]
    if not isinstance(value, Record):
        return value
    fields = {}
    for name, item in value.fields.items():
        if item is None or name.startswith("_"):
            continue
        if isinstance(item, Record) and item.table in MEMBERS and name != "tensor_value":
            fields[f"{name}_type"] = item.table
        fields[name] = plain(item)
    return fields


MEMBERS = {
    *("Null", "Int", "Bool", "Double", "Tensor", "IntList", "KernelCall", "DelegateCall"),
    *("PerChannelQuant", "PerTokenDynamicQuant", "PerChannelGroupQuant"),
    *("XNNTensorValue", "XNNQuantizedTensorValue", "XNNAdd", "XNNMultiply", "XNNSubtract"),
    *("XNNFullyConnected", "XNNConvert", "XNNSigmoid", "XNNReciprocalSquareRoot"),
    *("XNNStaticReshape", "XNNStaticSlice", "XNNConcatenate2", "XNNConcatenate3"),
    *("XNNTanh", "XNNGelu", "XNNClamp", "XNNSoftmax", "XNNStaticTranspose"),
    *("XNNBatchMatrixMultiply", "XNNDepthwiseConv2d", "TensorList"),
}
ENUMS = {
    "xnn_datatype_fp32": 1,
    "xnn_datatype_fp16": 2,
    "xnn_datatype_qcint8": 6,
    "xnn_datatype_qcint4": 8,
    "xnn_datatype_qdint8": 9,
    "xnn_datatype_qbint4": 10,
    "LONG": 4,
    "FLOAT": 6,
    "BYTE": 0,
    "CHAR": 1,
    "BOOL": 11,
    "HALF": 5,
    "BFLOAT16": 15,
    "STATIC": 0,
    "DYNAMIC_BOUND": 1,
    "SEGMENT": None,  # 0 of a tensor's data, 1 of a delegate's
}


def same(found: object, wanted: object, at: str) -> None:
    """Compares what this project reads with flatc's JSON, which leaves absent fields out."""
    if isinstance(found, dict):
        for name, value in found.items():
            if name not in wanted:
                assert value in ([], 0, False, ""), f"{at}.{name}"
            else:
                same(value, wanted[name], f"{at}.{name}")
        for name in wanted.keys() - found.keys():  # tables of the CPU leave these as they are
            assert wanted[name] in (0, "CPU"), f"{at}.{name}"
    elif isinstance(found, list):
        assert len(found) == len(wanted), at
        for index, pair in enumerate(zip(found, wanted, strict=True)):
            same(*pair, f"{at}[{index}]")
    elif isinstance(wanted, str) and not isinstance(found, str):
        assert ENUMS[wanted] in (found, None), at
    else:
        assert found == wanted, at


@pytest.mark.parametrize("recipe", ["int4-g32", "int4-pc", "int8-pc", "fp16"])
def test_both_formats_as_the_schema_compiler_reads_them(pte, llama_config, tmp_path, recipe):
    made = pte(llama_config(num_hidden_layers=1), recipe)
    data = (made.folder / "model.pte").read_bytes()
    opened = read_pte(made.folder / "model.pte")
    # The header between identifier and tables is ExecuTorch's, not FlatBuffers'.
    json_of = flatc(ROOT / "exir/_serialize/program.fbs", data, tmp_path)
    same(plain(opened.program), json_of, "program")
    assert len(opened.delegates) == 3  # up to attention the two methods share one
    for segment, graph in opened.delegates.items():
        offset, size = opened.segments[segment]
        start = int.from_bytes(data[offset + 10 : offset + 14], "little")
        bare = data[offset + start : offset + size]
        json_of = flatc(ROOT / "backends/xnnpack/serialization/schema.fbs", bare, tmp_path)
        same(plain(graph), json_of, f"delegate {segment}")


@pytest.mark.parametrize("name", ["everything", "parallel"])
def test_every_operator_as_the_schema_compiler_reads_it(name, tmp_path):
    file = make(SPECS[name], tmp_path, strip=True).folder / "model.pte"
    data, opened, kinds = file.read_bytes(), read_pte(file), set()
    for segment, graph in opened.delegates.items():
        offset, size = opened.segments[segment]
        start = int.from_bytes(data[offset + 10 : offset + 14], "little")
        bare = data[offset + start : offset + size]
        json_of = flatc(ROOT / "backends/xnnpack/serialization/schema.fbs", bare, tmp_path)
        same(plain(graph), json_of, f"delegate {segment}")
        kinds |= {row["xnode_union"].table for row in graph["xnodes"]}
    wanted = {"XNNTanh", "XNNClamp", "XNNSoftmax", "XNNDepthwiseConv2d", "XNNBatchMatrixMultiply"}
    assert kinds > (wanted if name == "everything" else {"XNNGelu"})


numbers = st.integers(-(2**63), 2**63 - 1)
children = st.builds(lambda name: Record("Named", {"name": name}), st.text(max_size=5))
records = st.builds(
    Record,
    st.just("Root"),
    st.fixed_dictionaries(
        {},
        optional={
            "flag": st.booleans(),
            "low": st.integers(-128, 127),
            "high": st.integers(0, 255),
            "small": st.integers(-(2**15), 2**15 - 1),
            "number": st.integers(-(2**31), 2**31 - 1),
            "wide": numbers,
            "real": st.floats(allow_nan=False),
            "numbers": st.lists(numbers, max_size=4),
            "reals": st.lists(st.floats(width=32, allow_nan=False), max_size=4),
            "names": st.lists(st.text(max_size=5), max_size=3),
            "one": st.one_of(
                st.builds(lambda v: Record("Number", {"value": v}), st.integers(0, 2**32 - 1)),
                st.builds(lambda n: Record("Name", {"name": n}), st.text(max_size=5)),
            ),
            "many": st.lists(children, max_size=3),
        },
    ),
)


@given(records)
def test_what_is_written_is_read_back(record):
    found = ALL.decode(ALL.encode(record), "Root")
    for name, value in record.fields.items():
        if isinstance(value, Record):
            assert found[name].table == value.table
            assert {**found[name].fields, **value.fields} == dict(found[name].fields)
        elif name == "many":
            assert [child["name"] for child in found[name]] == [c["name"] for c in value]
        else:
            assert found[name] == value
    for name in found.fields.keys() - record.fields.keys():
        assert found[name] in (0, [], None)


@given(records, st.data())
def test_damage_is_a_value_error_or_another_record(record, data):
    whole = bytearray(ALL.encode(record))
    for _ in range(3):
        whole[data.draw(st.integers(8, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(whole[: data.draw(st.integers(0, len(whole)))])
    for damaged in (bytes(whole), cut):
        with suppress(ValueError):
            assert ALL.decode(damaged, "Root").table == "Root"


def test_another_format_is_told_by_its_identifier():
    data = XNNPACK.encode(Record("XNNGraph", {"version": "0"}))
    with pytest.raises(ValueError, match=r"it begins with b'XN01', not b'ET12'"):
        PROGRAM.decode(data, "Program")


def test_tables_that_refer_to_each_other_again_and_again_are_refused():
    """A kilobyte stands for 40 to the 7th tables, each of which would be decoded."""
    width, levels = 40, 7
    schema = Schema("table Root: many:[Root]", b"ROOT")
    builder = flatbuffers.Builder(1024)
    builder.StartObject(1)
    table = builder.EndObject()
    for _ in range(levels):
        builder.StartVector(4, width, 4)
        for _ in range(width):
            builder.PrependUOffsetTRelative(table)
        vector = builder.EndVector()
        builder.StartObject(1)
        builder.PrependUOffsetTRelativeSlot(0, vector, 0)
        table = builder.EndObject()
    builder.Finish(table, file_identifier=b"ROOT")
    data = bytes(builder.Output())
    assert len(data) < 2000
    with pytest.raises(ValueError, match="refer to each other too often"):
        schema.decode(data, "Root")
