"""Mixtures of experts: who is chosen, who runs, and how a program's jumps are read back."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from exporters.errors import ExportError
from exporters.executorch.flatbuffer import Record
from exporters.executorch.lifted import read_program
from exporters.executorch.reader import read_pte
from exporters.executorch.target import ExecutorchTarget
from exporters.lifted import Sum, Value
from exporters.lifted_mixture import Combine, Route
from tests.exporters.executorch.small_programs import make
from tests.exporters.executorch.test_altered_programs import rewritten, tables_of
from tests.oracles.tiny_families import MIXTURES
from tests.oracles.vocabulary import FULL, small_spec

EXPERTS, CHOSEN = 8, 2
CONFIG = MIXTURES["mixtral"]


@pytest.fixture(scope="module")
def artifact(pte):
    return pte(CONFIG)


def changed(folder: Path, out: Path, values: dict[str, float]) -> Path:
    """A copy of an artifact in which weights hold one number everywhere, by the ends of names."""
    shutil.copytree(folder, out)
    with (out / "model.pte").open("r+b") as file:
        for key, (_, offset, nbytes) in read_pte(out / "model.pte").named().items():
            name = key.partition(" ")[0]
            for end, value in values.items():
                if name.endswith(end):
                    file.seek(offset)
                    file.write(np.full(nbytes // 4, value, np.float32).tobytes())
    return out


def poisoned(experts: range) -> dict[str, float]:
    return {f"experts.{expert}.down_proj.weight": np.nan for expert in experts}


def test_only_chosen_experts_run_and_of_equal_logits_the_first_are_chosen(
    artifact, run_pte, tokens, tmp_path
):
    equal = {"mlp.router.weight": 0.0}  # every token's logits of the experts are zeros
    found = {}
    for name, values in {
        "sound": equal,
        "poisoned": {**equal, **poisoned(range(CHOSEN, EXPERTS))},
        "one of the chosen": {**equal, **poisoned(range(1, 2))},
    }.items():
        with run_pte(changed(artifact.folder, tmp_path / name, values)) as session:
            found[name] = [session.logits(tokens[:20]), session.extend(tokens[:1])]
    for sound, others in zip(found["sound"], found["poisoned"], strict=True):
        assert np.isfinite(sound).all() and np.array_equal(sound, others)
    assert not any(np.isfinite(logits).any() for logits in found["one of the chosen"])


def forward_of(program: Record) -> Record:
    return next(plan for plan in program["execution_plan"] if plan["name"] == "forward")


def test_a_layer_has_as_many_tensors_as_one_expert_needs(tmp_path):
    counts = []
    for experts in (4, 12):
        layer = replace(FULL, ffn_width=16, experts=experts, chosen_experts=2)
        spec = small_spec((layer, layer), router="normalized_softmax")
        folder = tmp_path / str(experts)
        folder.mkdir()
        made = make(spec, folder)
        plan = forward_of(read_pte(made.folder / "model.pte").program)
        tensors = [row["val"] for row in plan["values"] if row["val"].table == "Tensor"]
        conditions = [each for each in tensors if list(each["sizes"]) == [1]]
        counts.append(len(tensors) - len(conditions))
        assert len(conditions) >= experts and len(plan["delegates"]) > 2 * experts
        assert any("jumps past" in note for note in made.lowered.notes)
    assert counts[0] == counts[1]


def mixtures_of(path: Path) -> int:
    """How many whole mixtures the first method's logits are made of, as far as they are read."""
    found, queue, seen = 0, [read_program(path, 48).entry_points[0].logits], set()
    while queue:
        value = queue.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Combine) and isinstance(value.weights, Route):
            choice = value.weights.chosen, value.weights.normalized
            experts = [expert for expert, _ in value.terms]
            found += (choice, experts) == ((CHOSEN, True), list(range(EXPERTS)))
        queue += [each for each in vars(value).values() if isinstance(each, Value)]
        queue += list(value.terms) if isinstance(value, Sum) else []
    return found


def calls_of(program: Record, kind: str, kernel: str = "") -> list[Record]:
    """The calls of the generating method of one kind, in their order."""
    plan = forward_of(program)
    calls = [row["instr_args"] for row in plan["chains"][0]["instructions"]]
    found = [call for call in calls if call.table == kind]
    if not kernel:
        return found
    names = [row["name"] for row in plan["operators"]]
    return [call for call in found if names[call["op_index"]] == kernel]


def number_of(program: Record, kind: str, field: str, wanted: object) -> int:
    """The number of a constant of the generating method."""
    values = [row["val"] for row in forward_of(program)["values"]]
    return next(i for i, v in enumerate(values) if v.table == kind and v[field] == wanted)


def of_another_expert(program: Record) -> None:
    jumps = calls_of(program, "JumpFalseCall")
    jumps[1].fields["cond_value_index"] = jumps[0]["cond_value_index"]


def too_early(program: Record) -> None:
    calls_of(program, "JumpFalseCall")[1].fields["destination_instruction"] -= 1


def too_late(program: Record) -> None:
    calls_of(program, "JumpFalseCall")[1].fields["destination_instruction"] += 2


def back(program: Record) -> None:
    calls_of(program, "JumpFalseCall")[1].fields["destination_instruction"] = 3


def accumulated(program: Record) -> None:
    put = calls_of(program, "KernelCall", "aten::index_put_")[2]
    put["args"][3] = number_of(program, "Bool", "bool_val", True)


def of_another_column(program: Record) -> None:
    """The weights of expert 3 for the tokens of expert 4."""
    select = calls_of(program, "KernelCall", "aten::select_copy")
    select[8]["args"][2] = select[6]["args"][2]


def kept_once(program: Record) -> None:
    """What the second ``argmax`` reads still has the first expert."""
    first, second = calls_of(program, "KernelCall", "aten::argmax")[:2]
    second["args"][0] = first["args"][0]


def over_tokens(program: Record) -> None:
    """A softmax over the tokens instead of the experts."""
    softmax = calls_of(program, "KernelCall", "aten::_softmax")[0]
    softmax["args"][1] = number_of(program, "Int", "int_val", 1)


def sums_not_begun(program: Record) -> None:
    """The gathered rows of the sum are those of the hidden states."""
    gathers = calls_of(program, "KernelCall", "aten::index_select")
    gathers[2]["args"][0] = gathers[0]["args"][0]


def zeros_in_another_shape(program: Record) -> None:
    """The sum begins with as many columns as there are experts."""
    zeros = calls_of(program, "KernelCall", "aten::full_like")[0]
    largest = calls_of(program, "KernelCall", "aten::amax")[0]
    zeros["args"][0] = largest["args"][0]


ALTERED: dict[Callable[[Record], None], str] = {
    of_another_expert: "",
    too_early: "",
    too_late: "JumpFalseCall",
    back: "a loop that is none over tokens",
    accumulated: "",
    of_another_column: "",
    kept_once: "",
    over_tokens: "leaves out something else",
    sums_not_begun: "",
    zeros_in_another_shape: "",
}


@pytest.mark.parametrize("change", ALTERED, ids=lambda change: change.__name__)
def test_a_mixture_that_was_altered_is_not_read_as_one(artifact, tmp_path, change):
    whole = (artifact.folder / "model.pte").read_bytes()
    program = tables_of(whole)
    path = tmp_path / "model.pte"
    path.write_bytes(rewritten(whole, program))
    assert mixtures_of(path) == CONFIG["num_hidden_layers"]
    change(program)
    path.write_bytes(rewritten(whole, program))
    if ALTERED[change]:
        with pytest.raises(ExportError, match=ALTERED[change]):
            read_program(path, 48)
    else:
        assert mixtures_of(path) < CONFIG["num_hidden_layers"]  # the first layer's was altered


def test_the_table_of_delegates_counts_experts_together(artifact):
    delegates = ExecutorchTarget().structure(artifact.folder)[0]
    layers = CONFIG["num_hidden_layers"]
    experts = [row for row in delegates.rows if row[0] == "forward" and row[4] == "2 fp32"]
    assert sum(row[2] for row in experts) >= layers * EXPERTS and len(delegates.rows) < 20
