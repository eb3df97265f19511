"""Filling a store with palettes: chunks, parts that a matrix is stacked from, and two passes."""

import pytest
import torch

from quant.errors import QuantizationError
from quant.formats.formats import parse_format
from quant.plans.plan import Assignment, QuantPlan
from quant.quantizers.kmeans import KMeans
from quant.store import fill as quantize
from quant.store.cached import new_store
from quant.store.fill import fill_store
from quant.store.store import WeightStore

ROWS, COLS = 48, 64


class Stacked:
    """One matrix in memory, stacked from parts of these rows."""

    def __init__(self, *parts: int) -> None:
        self.parts, self.most = parts, 0
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(ROWS, COLS, generator=generator).bfloat16()

    def shapes(self):
        return {"w": (ROWS, COLS)}

    def pieces(self, name):
        return [(f"part{index}", rows) for index, rows in enumerate(self.parts)]

    def read_rows(self, name, start, stop):
        self.most = max(self.most, stop - start)
        return self.weight[start:stop]


def fill(folder, source: Stacked, format: str, threads: int = 1) -> WeightStore:
    plan = QuantPlan("mine", {"w": Assignment(parse_format(format), "kmeans")})
    with new_store(folder, "key", plan, source.shapes()) as writer:
        fill_store(source, plan, writer, threads=threads)
    return WeightStore(folder / "key")


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("parts", [(48,), (32, 16), (20, 9, 19)])
@pytest.mark.parametrize("format", ["lut4-gc8", "lut3-pt", "lut6-gc16", "lut8-gc1"])
def test_a_store_holds_the_matrix_palettized_whole(tmp_path, monkeypatch, format, parts, threads):
    monkeypatch.setattr(quantize, "CHUNK_WEIGHTS", 17 * COLS)
    source = Stacked(*parts)
    store = fill(tmp_path, source, format, threads)
    whole = KMeans().quantize_groups(source.weight, parse_format(format))
    assert torch.equal(store.part("w", "codes"), whole.codes)
    assert torch.equal(store.part("w", "lut"), whole.lut)
    expected = (whole.squared_error / whole.squared_norm) ** 0.5
    assert store.relative_error["w"] == pytest.approx(expected, rel=1e-9)
    assert source.most <= 17  # one table or many: never the matrix whole


@pytest.mark.parametrize(
    ("parts", "where"), [((32, 16), "part1 has NaN in row 5"), ((20, 28), "w has NaN in row 37")]
)
@pytest.mark.parametrize("format", ["lut4-gc16", "lut4-gc8"])
def test_what_is_not_finite_is_named_by_part_where_groups_end_with_it(
    tmp_path, monkeypatch, format, parts, where
):
    monkeypatch.setattr(quantize, "CHUNK_WEIGHTS", 16 * COLS)
    source = Stacked(*parts)
    source.weight[37, 3] = torch.nan
    with pytest.raises(QuantizationError, match=f"^{where};"):
        fill(tmp_path, source, format)
    assert list(tmp_path.iterdir()) == []


def test_one_table_for_all_names_what_is_not_finite(tmp_path):
    source = Stacked(32, 16)
    source.weight[37, 3] = torch.inf
    with pytest.raises(QuantizationError, match=r"^part1 has an infinite value in row 5;"):
        fill(tmp_path, source, "lut4-pt")
