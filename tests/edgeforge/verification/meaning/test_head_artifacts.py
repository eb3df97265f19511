"""Artifacts with mixtures of attention heads are read back and held; their faults are named."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from edgeforge.export_options import ExportOptions
from edgeforge.verification.meaning.check import check_meaning
from exporters.registry import TARGETS
from quant.program import dialect
from quant.program.program import Program
from tests.oracles.vocabulary import CONTEXT, MIXTURES
from tests.oracles.vocabulary_models import small_model
from tests.planted_faults import mixtures, programs
from tests.planted_faults.captured import Captured, capture
from tests.planted_faults.written import Fault, write_faulty

AT = "model.layers.%d.self_attn"
FACTS = {
    f"meaning.{name}"
    for name in ("experts", "chosen_experts", "router", "expert_weights", "slots", "combination")
}


@pytest.fixture(scope="module")
def captures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Captured]]:
    """A sound export by its spec's name, its target and its recipe, made once."""
    root = tmp_path_factory.mktemp("heads")
    made: dict[tuple[str, ...], Captured] = {}

    def captures(name: str, target: str, recipe: str = "int8") -> Captured:
        key = name, target, recipe
        if key not in made:
            at = root / "-".join(key)
            options = ExportOptions(recipe=recipe, context=CONTEXT, threads=1)
            model = small_model(MIXTURES[name], at / "checkpoint")
            made[key] = capture(model, [TARGETS[target]], options, at / "out")[target]
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEFORGE_CACHE", str(root / "cache"))
        yield captures


def checked(captured: Captured, fault: Fault | None, root):
    manifest = write_faulty(captured, fault, root / "artifact", root / "apart")
    return check_meaning(root / "artifact", manifest, captured.run.model)


@pytest.mark.parametrize("recipe", ["int8", "fp16"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["heads", "heads-and-mixture"])
def test_a_sound_artifact_has_no_fault(captures, tmp_path, target, name, recipe):
    checks = checked(captures(name, target, recipe), None, tmp_path)
    assert [check.message for check in checks if check.verdict != "passed"] == []
    assert {check.name for check in checks} >= FACTS


FAULTS: dict[str, tuple[str, Callable[[Program], Program], str, str]] = {
    "queries of experts swapped": (
        "heads",
        lambda p: mixtures.with_matrices_swapped(p, "q_proj"),
        "expert_weights",
        "layer 0, attention, expert 1 reads "
        "model.layers.0.self_attn.experts.2.q_proj.weight where it must read",
    ),
    "outputs of experts swapped": (
        "heads-and-mixture",
        lambda p: mixtures.with_matrices_swapped(p, "o_proj"),
        "expert_weights",
        "self_attn.experts.2.o_proj.weight where it must read "
        "model.layers.0.self_attn.experts.1.o_proj.weight",
    ),
    "keys from the values' matrix": (
        "heads",
        lambda p: mixtures.with_matrix_of(p, f"{AT % 0}.k_proj.weight", f"{AT % 0}.v_proj.weight"),
        "weights",
        "layer 0 reads model.layers.0.self_attn.v_proj.weight where it must read",
    ),
    "another layer's router": (
        "heads-and-mixture",
        lambda p: mixtures.with_matrix_of(p, f"{AT % 1}.router.weight", f"{AT % 0}.router.weight"),
        "weights",
        "layer 1, attention reads model.layers.0.self_attn.router.weight where it must read",
    ),
    "another k": (
        "heads",
        lambda p: mixtures.with_route(p, 2, True),
        "chosen_experts",
        "layer 0, attention: a token chooses 2 experts, not 3",
    ),
    "no normalisation": (
        "heads",
        lambda p: mixtures.with_route(p, 3, False),
        "router",
        "layer 0, attention: the chosen experts' shares are not normalised",
    ),
    "no bias of attention": (
        "heads-and-mixture",
        lambda p: programs.without(p, dialect.BIAS, f"{AT % 1}.output.bias"),
        "biases",
        "layer 1: model.layers.1.self_attn.output.bias is not added to the first part's result",
    ),
    "no bias of the feed-forward part": (
        "heads-and-mixture",
        lambda p: programs.without(p, dialect.BIAS, "model.layers.0.mlp.output.bias"),
        "biases",
        "layer 0: model.layers.0.mlp.output.bias is not added to the feed-forward part's result",
    ),
    "no rotation of queries": (
        "heads",
        lambda p: programs.without_rotation(p, layer=0),
        "rope_type",
        "layer 0, queries are not rotated",
    ),
    "another router's weights for outputs": (
        "heads-and-mixture",
        lambda p: mixtures.with_weights_of_first_router(p, dialect.COMBINE),
        "combination",
        "layer 1, attention adds outputs up by other weights",
    ),
}
# In ONNX, slots are the places of TopK, so that another number of them is no known form.
UNREAD = {("another k", "onnx"): ("structure", "where the result of attention, which a product")}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_the_files_is_named(captures, tmp_path, name, target):
    spec, change, *told = FAULTS[name]
    fact, words = UNREAD.get((name, target), told)
    fault = Fault(name, name, f"meaning.{fact}", everywhere=lambda captured: change)
    checks = checked(captures(spec, target), fault, tmp_path)
    failed = {check.name: check.message for check in checks if check.verdict == "failed"}
    assert words in failed.get(fault.fact, ""), failed
