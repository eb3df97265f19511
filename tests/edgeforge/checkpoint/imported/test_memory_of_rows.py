"""Integers that are stored row by row are read so: a store never holds a whole matrix of them."""

import tracemalloc

import numpy as np
import pytest

from edgeforge.model.model import open_model
from edgeforge.planning.choose import PlanRequest, choose_plan
from quant.store import fill

ROWS, COLUMNS = 8192, 64


class _Sink:
    """Counts bytes, and keeps the order of none."""

    def __init__(self):
        self.bytes, self.most = 0, 0

    def write(self, weight, part, at, data):
        self.bytes += data.nbytes
        self.most = max(self.most, data.nbytes)

    def note(self, weight, relative_error):
        assert relative_error < 0.01


@pytest.mark.parametrize("kind", ["gguf", "mlx"])
def test_chunks_of_an_imported_matrix_are_as_small_as_any(
    kind, tmp_path, monkeypatch, hugging_face, gguf_files, packed_checkpoints, quantized_floats
):
    config = packed_checkpoints.family("llama", vocab_size=ROWS)
    if kind == "gguf":
        folder = hugging_face.save(tmp_path / "hf", config)
        gguf_files.write(folder, tmp_path / "model.gguf", "Q8_0")
        model = open_model(str(tmp_path / "model.gguf"))
    else:
        section = {"quantization": {"bits": 8, "group_size": 32}}
        quantized_floats.write(
            tmp_path / "m", config, lambda _, w: quantized_floats.mlx(w, 8, 32), section
        )
        model = open_model(str(tmp_path / "m"))
    monkeypatch.setattr(fill, "CHUNK_WEIGHTS", 1 << 14)
    plan, sink = choose_plan(model, PlanRequest()).plan, _Sink()
    assert model.weights.imported_by_rows("model.embed_tokens.weight")
    tracemalloc.start()
    fill.fill_store(model.weights, plan, sink, threads=1, progress=lambda count: None)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sink.bytes > 2 * ROWS * COLUMNS and sink.most <= 1 << 15
    # NumPy's memory is traced: a whole matrix of codes would be 512 KB more.
    assert most < np.prod((ROWS, COLUMNS)), most
