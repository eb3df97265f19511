"""Mixtures of experts: what runs, what is dropped, who is chosen, and what is read back."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from exporters.coreml import names
from exporters.coreml.package import open_package
from exporters.coreml.reader import stored_digests
from exporters.lifted import Unknown
from exporters.lifted_mixture import Combine, Route
from tests.exporters.coreml import vocabulary_model
from tests.exporters.coreml.changed_packages import changed_number, lifted, overwrite, products
from tests.oracles import vocabulary
from tests.oracles.tiny_families import MIXTURES

ROUTE = "op_route"
EXPERTS = MIXTURES["mixtral"]["num_local_experts"]
NAN = np.float16(np.nan)


def down(expert: int, layer: int = 0) -> str:
    return f"model.layers.{layer}.mlp.experts.{expert}.down_proj.weight"


@dataclass(frozen=True)
class Made:
    """An artifact of the tiny Mixtral, and what its first layer chooses for a text."""

    folder: Path
    profile: str
    chosen: np.ndarray

    @property
    def total(self) -> str:
        """The sum of all experts' results in the first layer."""
        return f"op_combine_default_{EXPERTS - 1}_{'total' if self.profile == 'gpu' else 'sum'}"

    def copy(self, to: Path) -> Path:
        return shutil.copytree(self.folder, to)


@pytest.fixture(scope="module", params=["gpu", "ane"])
def made(request, package, run_package, tokens):
    folder = package(MIXTURES["mixtral"], "int8-pc", profile=request.param).folder
    session, text = run_package(folder, "fp16"), tokens[:16]
    (shown,) = session.values([text], [ROUTE])
    return Made(folder, request.param, shown[ROUTE][0][0] != 0)


def test_experts_that_no_token_chose_run_only_where_there_are_no_branches(
    made, run_package, tokens
):
    every = products(made.folder, {down(expert): expert for expert in range(EXPERTS)})
    assert sorted(every.values()) == list(range(EXPERTS))
    session = run_package(made.folder, "fp16")
    (shown,) = session.values([tokens[:1]], list(every))
    ran = {every[name] for name in shown}
    chosen = set(np.flatnonzero(made.chosen[0]).tolist())
    assert len(chosen) == 2
    assert ran == (chosen if made.profile == "gpu" else set(every.values()))


def test_an_expert_that_is_no_number_is_dropped_where_it_is_not_chosen(
    made, run_package, tokens, tmp_path
):
    # One that the first tokens did not choose and a later one did.
    first = np.where(made.chosen.any(0), made.chosen.argmax(0), 0)
    expert = int(first.argmax())
    assert first[expert] > 0
    broken = made.copy(tmp_path / "broken")
    overwrite(broken, down(expert), NAN)
    session, text = run_package(broken, "fp16"), tokens[:16]
    rows = {}
    for folder in (made.folder, broken):
        (shown,) = run_package(folder, "fp16").values([text], [made.total])
        rows[folder] = shown[made.total][0][0]
    # In one call: tokens that chose it, and tokens that did not.
    chose = made.chosen[:, expert]
    assert np.isnan(rows[broken][chose]).all()
    np.testing.assert_array_equal(rows[broken][~chose], rows[made.folder][~chose])
    assert session.first_not_finite(text[:1]) is None
    assert down(expert) in session.first_not_finite(text)


def test_a_router_that_is_no_number_is_seen(made, run_package, tokens, tmp_path):
    broken = made.copy(tmp_path / "broken")
    router = "model.layers.0.mlp.router.weight"
    overwrite(broken, router, np.float32(np.nan))
    session = run_package(broken, "fp16")
    assert np.isnan(session.logits(tokens[:1])).all()
    assert router in session.first_not_finite(tokens[:1])


def test_of_equal_logits_the_lower_index_goes_first(made, run_package, tokens, tmp_path):
    equal = made.copy(tmp_path / "equal")
    overwrite(equal, "model.layers.0.mlp.router.weight", np.float32(0))
    (shown,) = run_package(equal, "fp16").values([tokens[:3]], [ROUTE])
    wanted = torch.ops.edgeforge.route(torch.zeros(1, 1, EXPERTS), 2, True).numpy()
    for found in shown[ROUTE]:
        np.testing.assert_array_equal(found, wanted)


def test_the_choice_is_float32_for_the_gpu(made, operations):
    kinds = {
        (operation.type, output.type.tensorType.dataType)
        for operation in operations(made.folder, names.DECODE)
        for output in operation.outputs
        if operation.type in ("topk", "cumsum")
    }
    assert (
        kinds == {("topk", 11), ("cumsum", 11)}
        if made.profile == "gpu"
        else {
            ("topk", 10),
            ("cumsum", 10),
        }
    )


def test_weights_within_branches_are_read_back(made, package):
    store = package(MIXTURES["mixtral"], "int8-pc", profile=made.profile).store
    assert stored_digests(made.folder / names.PACKAGE) == store.digests
    opened = open_package(made.folder / names.PACKAGE)
    top = {str(operation.type) for operation in opened.block(names.DECODE).operations}
    assert ("cond" in top) == (made.profile == "gpu")


def test_the_manifest_says_what_is_computed(made):
    notes = (made.folder / "edgeforge.json").read_text(encoding="utf-8")
    words = "only the experts that" if made.profile == "gpu" else "every call computes all experts"
    assert words in notes


def test_what_is_read_back(made):
    values = lifted(open_package(made.folder / names.PACKAGE))
    assert [value for value in values if isinstance(value, Unknown)] == []
    routes = [value for value in values if isinstance(value, Route)]
    sums = [value for value in values if isinstance(value, Combine)]
    assert [(each.chosen, each.normalized) for each in routes] == [(2, True)] * 2
    assert {tuple(column for column, _ in each.terms) for each in sums} == {tuple(range(EXPERTS))}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("op_combine_default_3_used", {"begin": {0: 2}, "end": {0: 3}}),
        ("op_combine_default_3_chosen", {"begin": {2: 2}, "end": {2: 3}}),
        ("op_combine_default_3_weights", {"begin": {2: 2}, "end": {2: 3}}),
    ],
)
def test_a_branch_of_another_expert_is_not_taken_for_its_own(made, name, changes):
    opened = open_package(made.folder / names.PACKAGE)
    if made.profile == "ane" and name.endswith("used"):  # that form has no conditions
        assert all(name not in str(opened.block(each)) for each in opened.functions)
        return
    for parameter, numbers in changes.items():
        changed_number(opened, name, parameter, numbers)
    assert any(isinstance(value, Unknown) for value in lifted(opened))


def test_what_chooses_by_another_rule_is_no_route(made):
    opened = open_package(made.folder / names.PACKAGE)
    changed_number(opened, "op_route_largest", "k", {0: 1})
    assert any(isinstance(value, Unknown) for value in lifted(opened))


@pytest.mark.parametrize("name", ["one-expert", "sandwich", "sparse-mixer"])
def test_what_no_family_has(name, run_package, tmp_path):
    made = vocabulary_model.made(tmp_path, vocabulary.MIXTURES[name], opset="ios17")
    text = np.random.default_rng(5).integers(0, vocabulary.VOCAB, 32)
    wanted = made.reference().logits(text)
    found = run_package(made.folder).logits(text)
    assert np.abs(found - wanted).max() < 5e-6 * np.ptp(wanted)
    opened = open_package(made.folder / names.PACKAGE)
    assert [value for value in lifted(opened) if isinstance(value, Unknown)] == []
    assert stored_digests(made.folder / names.PACKAGE) == made.store.digests
