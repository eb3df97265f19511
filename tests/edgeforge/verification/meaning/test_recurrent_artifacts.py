"""Artifacts with recurrent layers are read back and held; faults in their files are named."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from edgeforge.export_options import ExportOptions
from edgeforge.verification.meaning.check import check_meaning
from exporters.registry import TARGETS
from quant.program import dialect
from tests.oracles.vocabulary import CONTEXT, RECURRENT
from tests.oracles.vocabulary_models import small_model
from tests.planted_faults import recurrent, stores
from tests.planted_faults.captured import Captured, capture
from tests.planted_faults.edits import edit_onnx
from tests.planted_faults.written import Fault, write_faulty

SOUND = [("onnx", name) for name in RECURRENT]


@pytest.fixture(scope="module")
def captures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable]:
    """A sound export by its spec's name, its target and its recipe, made once."""
    root = tmp_path_factory.mktemp("recurrent")
    made: dict[tuple[str, ...], Captured] = {}

    def captures(name: str, target: str, recipe: str = "fp16") -> Captured:
        key = name, target, recipe
        if key not in made:
            at = root / "-".join(key)
            options = ExportOptions(recipe=recipe, context=CONTEXT, threads=1)
            model = small_model(RECURRENT[name], at / "checkpoint")
            made[key] = capture(model, [TARGETS[target]], options, at / "out")[target]
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEFORGE_CACHE", str(root / "cache"))
        yield captures


def checked(captured: Captured, fault: Fault | None, root: Path):
    manifest = write_faulty(captured, fault, root / "artifact", root / "apart")
    return check_meaning(root / "artifact", manifest, captured.run.model)


@pytest.mark.parametrize(("target", "name"), SOUND)
def test_a_sound_artifact_has_no_fault(captures, tmp_path, target, name):
    checks = checked(captures(name, target), None, tmp_path)
    assert [check.message for check in checks if check.verdict != "passed"] == []
    names = {check.name for check in checks}
    assert {"meaning.recurrence", "meaning.states", "meaning.recurrence_weights"} <= names


def test_quantized_products_of_a_recurrence_are_read_and_held(captures, tmp_path):
    captured = captures("rwkv6", "onnx", "int8")
    checks = checked(captured, None, tmp_path)
    assert [check.message for check in checks if check.verdict != "passed"] == []
    kept = {
        name: record.format.name
        for name, record in captured.made.store.plan.weights.items()
        if ".decay" in name or ".mix_" in name or ".bonus" in name
    }
    assert set(kept.values()) == {"fp32"}


def exchanged(one: str, other: str) -> Callable[[Path, Captured], None]:
    """Two states leave the graphs under each other's names."""
    names = {one: other, other: one}

    def change(node) -> None:
        for index, name in enumerate(node.output):
            node.output[index] = names.get(name, name)

    return lambda folder, captured: edit_onnx(folder, change)


def _begun(folder: Path, captured: Captured) -> None:
    """A text's first call takes what states hold, in place of zeros."""

    def change(node) -> None:
        if node.output[0] == "row_begins":
            node.input[1] = "zero"

    edit_onnx(folder, change)


def _remembered(folder: Path, captured: Captured) -> None:
    """A text's first call takes what a memory holds, in place of zeros."""

    def change(node) -> None:
        if node.op_type == "If":
            then, other = sorted(node.attribute, key=lambda each: each.name, reverse=True)
            then.g.node[-1].input[3] = other.g.node[-1].input[3]

    edit_onnx(folder, change)


FAULTS = {
    "decay": (
        "rwkv6",
        Fault(
            "decay",
            "decays not negated",
            "meaning.decay",
            everywhere=lambda captured: (
                lambda p: recurrent.without_call(p, dialect.SCALE, dialect.EXP)
            ),
        ),
        "layer 0: exp (function) stands where the factor -1 on the exp",
    ),
    "shipped": (
        "mamba",
        Fault(
            "shipped",
            "B and C exchanged in the shipped graph alone",
            "meaning.recurrence",
            shipped=lambda captured: (
                lambda p: recurrent.with_arguments_swapped(p, dialect.RECURRENCE, 0, 1)
            ),
        ),
        "model.onnx, layer 0: C, the queries has the start 48, not 64",
    ),
    "memories": (
        "mamba",
        Fault(
            "memories",
            "memories of two layers exchanged",
            "meaning.states",
            edit={
                "onnx": exchanged("present.0.recurrent_state", "present.2.recurrent_state"),
            },
        ),
        "layer 0 writes its last tokens to 2.memory and reads 0.memory",
    ),
    "shifts": (
        "rwkv5",
        Fault(
            "shifts",
            "tokens before of two layers exchanged",
            "meaning.states",
            edit={"onnx": exchanged("present.0.conv_state", "present.1.conv_state")},
        ),
        "layer 0 writes its last tokens to 1.recent and reads 0.recent",
    ),
    "begun": (
        "rwkv6",
        Fault("begun", "states not reset", "meaning.states", edit={"onnx": _begun}),
        "does not ignore 0.recent where 0 tokens come before",
    ),
    "remembered": (
        "delta-net",
        Fault("remembered", "memories not reset", "meaning.states", edit={"onnx": _remembered}),
        "does not ignore 0.memory where 0 tokens come before",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_the_files_is_named(captures, tmp_path, name):
    spec, fault, words = FAULTS[name]
    checks = checked(captures(spec, "onnx"), fault, tmp_path)
    failed = {check.name: check.message for check in checks if check.verdict == "failed"}
    assert words in failed.get(fault.fact, ""), failed


def test_another_decay_in_the_file_is_named(captures, tmp_path):
    """The numbers of a decay are those that the checkpoint's make, not the checkpoint's own."""

    def other(request, apart):
        weight = "model.layers.0.time_mix.decay.weight"
        store = stores.altered(request.store, apart, [weight], "value", lambda rows: 0 * rows)
        return replace(request, store=store)

    fault = Fault("other", "another decay", "meaning.recurrence_weights", request=other)
    checks = checked(captures("rwkv5", "onnx"), fault, tmp_path)
    (found,) = [check for check in checks if check.name == fault.fact]
    assert found.verdict == "failed"
    assert "time_mix.decay.weight holds other numbers than the checkpoint" in found.message
