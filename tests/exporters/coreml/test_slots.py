"""Mixtures of attention heads: logits, what runs, what is dropped, and what is float32."""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np
import pytest

from exporters.coreml import names
from exporters.coreml.package import open_package
from exporters.coreml.reader import stored_digests
from exporters.coreml.schema import DATA_TYPES
from tests.exporters.coreml import vocabulary_model
from tests.exporters.coreml.changed_packages import overwrite, products
from tests.exporters.coreml.slot_models import SPECS, TEXT, WAYS, WIDTH, exported

# Experts' results and their sums keep float32 there; elsewhere tables and routers are float16.
BOUNDS = {"gpu": 5e-6, "ane": 4e-4, "inputs": 5e-6}


def matrix(part: str, expert: int) -> str:
    return f"model.layers.0.self_attn.experts.{expert}.{part}.weight"


def largest_error(found, wanted):
    return np.abs(found - wanted).max() / np.ptp(wanted)


def check_logits(made: vocabulary_model.Made, way: str, run_package) -> None:
    """Compares logits with the program's, at one token and at many."""
    wanted = made.reference().logits(TEXT)
    for precision, most in (("fp32", BOUNDS[way]), ("fp16", 5e-3)):
        session = run_package(made.folder, precision)
        assert largest_error(session.logits(TEXT), wanted) < most
        for _ in range(2):  # the second text finds nothing of the first
            ends = (16, 17, 18, 22, 38)
            starts = (0, *ends[:-1])
            found = np.stack([session.extend(TEXT[a:b]) for a, b in zip(starts, ends, strict=True)])
            assert largest_error(found, wanted[[end - 1 for end in ends]]) < most
            session.reset()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("spec", SPECS)
def test_logits(spec, way, slots_package, run_package):
    made = slots_package(spec, way)
    check_logits(made, way, run_package)
    assert stored_digests(made.folder / names.PACKAGE) == made.store.digests


@pytest.mark.parametrize("way", ["gpu", "ane"])
def test_a_weight_too_small_for_float32_moves_no_slot(way, run_package, tmp_path):
    made = exported(tmp_path, "heads", way, larger={"self_attn.router.weight": 100.0})
    session = run_package(made.folder)
    text = TEXT[:16]
    (shown,) = session.values([text], ["op_route"])
    counts = (shown["op_route"][0][0] != 0).sum(-1)
    assert set(counts.tolist()) == {1, 2, 3}
    if way == "gpu":  # for the Neural Engine such a router sends tokens elsewhere: it is float16
        check_logits(made, way, run_package)
    # A token's slots that no expert fills are zero.
    width = SPECS["heads"].head_dim
    (shown,) = session.values([text], ["op_slots_default"])
    slots = shown["op_slots_default"][0][0].reshape(len(text), 2, 3, width)
    filled = (slots != 0).any((1, 3))
    np.testing.assert_array_equal(filled, np.arange(3) < counts[:, None])


@pytest.mark.parametrize("way", ["gpu", "ane"])
def test_experts_that_no_token_chose_run_only_where_there_are_no_branches(
    way, slots_package, run_package
):
    made = slots_package("heads", way)
    every = {
        part: products(made.folder, {matrix(part, expert): expert for expert in range(5)})
        for part in ("q_proj", "o_proj")
    }
    session = run_package(made.folder)
    asked = ["op_route", *every["q_proj"], *every["o_proj"]]
    (shown,) = session.values([TEXT[:1]], asked)
    chosen = set(np.flatnonzero(shown["op_route"][0][0, 0]).tolist())
    assert len(chosen) == 3
    for part in every.values():
        assert sorted(part.values()) == list(range(5))
        ran = {part[name] for name in shown if name in part}
        assert ran == (chosen if way == "gpu" else set(range(5)))


@pytest.mark.parametrize("way", ["gpu", "ane"])
def test_the_choice_the_sum_and_its_bias_are_float32_for_the_gpu(way, slots_package, operations):
    made = slots_package("heads", way)
    dtypes = {
        (each.type, output.name): output.type.tensorType.dataType
        for each in operations(made.folder, names.DECODE)
        for output in each.outputs
    }
    kinds = {dtype for (kind, _), dtype in dtypes.items() if kind in ("topk", "cumsum")}
    total = dtypes[
        "cond" if way == "gpu" else "add",
        f"op_combine_default_4_{'total' if way == 'gpu' else 'sum'}",
    ]
    wanted = DATA_TYPES["fp32" if way == "gpu" else "fp16"]
    assert kinds == {total} == {dtypes["add", "op_bias"]} == {wanted}


@pytest.mark.parametrize(
    ("part", "result"), [("q_proj", "op_slots_default"), ("o_proj", "op_combine_default_4_total")]
)
@pytest.mark.parametrize("way", ["gpu", "ane"])
def test_an_expert_that_is_no_number_is_dropped_where_it_is_not_chosen(
    way, part, result, slots_package, run_package, tmp_path
):
    made, text = slots_package("heads", way), TEXT[:16]
    result = result.replace("total", "sum") if way == "ane" else result
    (shown,) = run_package(made.folder, "fp16").values([text], ["op_route", result])
    chosen, sound = shown["op_route"][0][0] != 0, shown[result][0][0]
    expert = int(np.abs(chosen.mean(0) - 0.5).argmin())
    chose = chosen[:, expert]
    assert 0 < chose.sum() < len(text)
    broken = shutil.copytree(made.folder, tmp_path / "broken")
    nan = np.float16(np.nan) if way == "ane" else np.float32(np.nan)
    overwrite(broken, matrix(part, expert), nan)
    (shown,) = run_package(broken, "fp16").values([text], [result])
    found = shown[result][0][0]
    np.testing.assert_array_equal(found[~chose], sound[~chose])
    assert np.isnan(found[chose]).any(-1).all()
    # Of queries only the expert's own slots are no numbers.
    if part == "q_proj":
        slots = np.isnan(found.reshape(len(text), 2, 3, WIDTH)).all((1, 3))
        place = np.cumsum(chosen, -1)[:, expert] - 1
        wanted = (np.arange(3) == place[:, None]) & chose[:, None]
        np.testing.assert_array_equal(slots, wanted)


@pytest.mark.parametrize("way", WAYS)
def test_coremltools_infers_the_same_shapes(way, slots_package, reopen):
    made = slots_package("heads-and-mixture", way)
    opened = open_package(made.folder / names.PACKAGE)
    _, program = reopen(made.folder)
    compared = 0
    for function, inferred in program.functions.items():
        stated = {
            output.name: [each.constant.size for each in output.type.tensorType.dimensions]
            for operation in opened.operations(function)
            for output in operation.outputs
        }
        for value in results(inferred):
            if value.name in stated and "op_slots" in value.name and value.shape is not None:
                # A size that depends on the number of tokens is no number here and 0 there.
                sizes = [size if isinstance(size, int) else 0 for size in value.shape]
                assert sizes == stated[value.name], value.name
                compared += 1
    assert compared > 50


def results(block: Any) -> list[Any]:
    """The results of a block's operations and of those within them."""
    found = []
    for operation in block.operations:
        for inner in operation.blocks:
            found += results(inner)
        found += operation.outputs
    return found
