"""Programs whose tables say what cannot be: every reader refuses them in one sentence."""

from __future__ import annotations

import struct

import pytest

from exporters.errors import ExportError
from exporters.executorch import pte_file
from exporters.executorch.flatbuffer import Record
from exporters.executorch.reader import read_pte, stored_digests
from exporters.executorch.schemas import PROGRAM
from exporters.executorch.structure import structure_of

DIMS = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def artifact(pte, llama_config):
    return pte(llama_config(tie_word_embeddings=False, **DIMS), "int8-pc")


def tables_of(whole: bytes) -> Record:
    """The tables of a .pte."""
    length = pte_file.HEADER.unpack_from(whole, 8)[2]
    return PROGRAM.decode(whole[:length], "Program")


def rewritten(whole: bytes, program: Record) -> bytes:
    """The file with other tables; the segments are as they were."""
    _, _, _, base, total = pte_file.HEADER.unpack_from(whole, 8)
    tables = PROGRAM.encode(program)
    size = len(tables) + pte_file.HEADER.size
    at = -(-size // 128) * 128
    header = pte_file.HEADER.pack(pte_file.HEADER_MAGIC, pte_file.HEADER.size, size, at, total)
    root = struct.unpack_from("<I", tables)[0] + pte_file.HEADER.size
    head = struct.pack("<I", root) + tables[4:8] + header + tables[8:]
    return head.ljust(at, b"\0") + whole[base:]


def first_tensor(program: Record) -> dict:
    """The fields of the first constant that has a weight's name."""
    for plan in program["execution_plan"]:
        for row in plan["values"]:
            tensor = row["val"]
            extra = tensor["extra_tensor_info"] if tensor.table == "Tensor" else None
            name = (extra["fully_qualified_name"] or "") if extra else ""
            if ".weight" in name and tensor["data_buffer_idx"]:
                return tensor.fields
    raise AssertionError("there is none")


def overlap(program: Record) -> None:
    program["segments"][1].fields["offset"] = 0
    program["segments"][1].fields["size"] = sum(row["size"] for row in program["segments"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: None, None),
        (overlap, "segments overlap"),
        (lambda p: p["segments"][0].fields.update(size=2**63), "a segment lies past the end"),
        (lambda p: p["segments"][0].fields.update(offset=2**64 - 1), "a segment lies past the end"),
        (lambda p: p.fields.update(constant_segment=None), "it has no segment of constants"),
        (lambda p: p["constant_segment"].fields.update(segment_index=2**31), "out of range"),
        (lambda p: p["constant_segment"].fields.update(offsets=[2**63] * 99), "lies past its seg"),
        (lambda p: first_tensor(p).update(sizes=[-1, 2]), "a negative dimension"),
        (lambda p: first_tensor(p).update(scalar_type=77), "an unknown element type"),
        (lambda p: first_tensor(p).update(data_buffer_idx=2**31), "out of range"),
        (lambda p: p["named_data"][0].fields.update(segment_index=2**31), "out of range"),
    ],
)
def test_tables_that_were_altered_are_refused_in_one_sentence(artifact, tmp_path, change, words):
    whole = (artifact.folder / "model.pte").read_bytes()
    program = tables_of(whole)
    change(program)
    path = tmp_path / "model.pte"
    path.write_bytes(rewritten(whole, program))
    if words is None:
        assert stored_digests(path) == artifact.store.digests
        return
    with pytest.raises(ExportError) as caught:
        stored_digests(path)
        structure_of(read_pte(path))
    assert words in str(caught.value) and str(path) in str(caught.value)
