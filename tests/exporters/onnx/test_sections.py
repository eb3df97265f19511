"""What `inspect` says of an ONNX artifact is read from its graphs."""

from __future__ import annotations

import onnx
import pytest

from exporters.errors import ExportError
from exporters.registry import find_target
from exporters.structure import to_json


@pytest.fixture(scope="module")
def artifact(build, llama_config):
    return build(llama_config(), "int4-g32")


def test_operators_and_formats_of_each_graph(artifact):
    sections = to_json(find_target("onnx").structure(artifact.folder))
    assert artifact.manifest.structure == sections
    for name in ("model.onnx", "verify.onnx"):
        graph = onnx.load(artifact.folder / name, load_external_data=False).graph
        rows = [row for row in sections["Operators"] if row["graph"] == name]
        assert sum(row["nodes"] for row in rows) == len(graph.node)
        found = {row["operator"]: row["nodes"] for row in rows}
        assert found["com.microsoft::GroupQueryAttention"] == 2
        products = {
            row["format"]: row["nodes"]
            for row in sections["Quantized products and lookups"]
            if row["graph"] == name
        }
        assert products["MatMulNBits, 4 bits, blocks of 32"] == found["com.microsoft::MatMulNBits"]
        tensors = [row for row in sections["Initializers"] if row["graph"] == name]
        assert sum(row["tensors"] for row in tensors) == len(graph.initializer)


def test_a_damaged_graph_is_one_sentence(artifact, tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"\xff" * 40)
    with pytest.raises(ExportError, match=r"model\.onnx cannot be read as an ONNX model"):
        find_target("onnx").structure(tmp_path)
