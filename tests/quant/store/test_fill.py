"""Filling a store: which weights are refused, what progress says, how threads end."""

import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.errors import QuantizationError
from quant.formats.formats import FloatFormat, parse_format
from quant.plans.plan import Assignment, QuantPlan
from quant.store import fill as quantize
from quant.store.cached import new_store
from quant.store.fill import cast_rows, fill_store
from quant.store.store import WeightStore

SHAPES = {"matrix": (50, 64), "norm": (64,), "half": (50, 64)}
FORMATS = {"matrix": ("int4-g32", "rtn"), "norm": ("fp32", "cast"), "half": ("fp16", "cast")}
PLAN = QuantPlan("mine", {n: Assignment(parse_format(f), a) for n, (f, a) in FORMATS.items()})


class Source:
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weights = {n: torch.randn(s, generator=generator).to(dtype) for n, s in SHAPES.items()}

    def shapes(self):
        return SHAPES

    def pieces(self, name):
        return [(name, 1 if len(SHAPES[name]) == 1 else SHAPES[name][0])]

    def read_rows(self, name, start, stop):
        return self.weights[name].reshape(-1, 64)[start:stop]


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(quantize, "CHUNK_WEIGHTS", 8 * 64)


def fill(tmp_path, source, **options) -> WeightStore:
    with new_store(tmp_path, "key", PLAN, SHAPES) as writer:
        fill_store(source, PLAN, writer, **options)
    return WeightStore(tmp_path / "key")


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("bad", "words"), [(float("nan"), "NaN"), (float("inf"), "an infinite value")]
)
@pytest.mark.parametrize(("weight", "row"), [("matrix", 37), ("half", 49), ("norm", 0)])
@pytest.mark.usefixtures("small_chunks")
def test_what_is_not_finite_is_named_with_its_row(tmp_path, weight, row, bad, words, threads):
    source = Source()
    source.weights[weight].reshape(-1, 64)[row, 3] = bad
    with pytest.raises(QuantizationError, match=rf"^{weight} has {words} in row {row};"):
        fill(tmp_path, source, threads=threads)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("small_chunks")
def test_what_float16_cannot_hold_is_named(tmp_path):
    source = Source(torch.bfloat16)
    source.weights["half"][20, 0] = -70000.0
    with pytest.raises(QuantizationError, match=r"half has values up to 70144 in row 20.*float16"):
        fill(tmp_path, source)


def test_float16_rounds_what_rounds_into_its_range():
    rows = torch.tensor([[65504.0, 65519.0, -6e-8, 1e-9]])
    cast, error, norm = cast_rows(rows, FloatFormat("float16"), "w")
    assert cast.tolist() == [[65504.0, 65504.0, -(2.0**-24), 0.0]]
    assert error == pytest.approx(15.0**2) and norm == pytest.approx(65504.0**2 + 65519.0**2)
    with pytest.raises(QuantizationError, match="row 7, beyond the range of float16"):
        cast_rows(torch.tensor([[65520.0]]), FloatFormat("float16"), "w", first_row=7)


def test_bfloat16_has_a_range_too():
    with pytest.raises(QuantizationError, match="beyond the range of bfloat16"):
        cast_rows(torch.tensor([[3.4e38]]), FloatFormat("bfloat16"), "w")


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=8))
@settings(max_examples=50, deadline=None)
def test_float32_is_exact(values):
    rows = torch.tensor([values])
    cast, error, _ = cast_rows(rows, FloatFormat("float32"), "w")
    assert torch.equal(cast, rows) and error == 0


@pytest.mark.usefixtures("small_chunks")
def test_progress_counts_every_weight_from_one_thread_at_a_time(tmp_path):
    counts: list[int] = []
    busy = threading.Lock()

    def progress(count):
        assert busy.acquire(blocking=False)
        counts.append(count)
        time.sleep(0.002)  # long enough for another thread to come
        busy.release()

    fill(tmp_path, Source(), threads=3, progress=progress)
    assert sum(counts) == 2 * 50 * 64 + 64
    assert len(counts) == 7 + 1 + 7


@pytest.mark.usefixtures("small_chunks")
def test_an_error_stops_the_other_chunks(tmp_path):
    class Broken(Source):
        reads = 0

        def read_rows(self, name, start, stop):
            self.reads += 1
            if self.reads > 1:  # time for the first error to be seen
                time.sleep(0.3)
            raise QuantizationError("cannot be read")

    source = Broken()
    with pytest.raises(QuantizationError, match="cannot be read"):
        fill(tmp_path, source, threads=1)
    assert source.reads < 15


def test_torchs_threads_are_as_before(tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        fill(tmp_path, Source())
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
