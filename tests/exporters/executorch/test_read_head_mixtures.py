"""How the rows and heads of a mixture of attention heads are read back from a program."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from exporters.errors import ExportError
from exporters.executorch import mixtures, slots
from exporters.executorch.flatbuffer import Record
from exporters.executorch.lifted import read_program
from exporters.executorch.xnnpack_graph import XnnpackGraph
from exporters.lifted import Attention, Last, Linear, Value
from exporters.lifted_mixture import ChosenSlots, ChosenTokens, Combine, Route, Slots
from tests.exporters.executorch.small_programs import Made, make
from tests.exporters.executorch.test_altered_programs import rewritten, tables_of
from tests.exporters.executorch.test_mixtures import calls_of, forward_of, number_of
from tests.exporters.executorch.test_vocabulary import found_in
from tests.oracles.vocabulary import MIXTURES

CONTEXT = 48
EXPERTS, CHOSEN, OWN_HEADS = 5, 3, 2  # of `tests.oracles.vocabulary.HEADS`
LAYERS = 2
SPEC = MIXTURES["heads-and-mixture"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    return make(SPEC, tmp_path_factory.mktemp("heads"))


def read_back(path: Path, method: str = "forward") -> int:
    """How many layers are read as whole mixtures of heads."""
    entry = next(e for e in read_program(path, CONTEXT).entry_points if e.name == method)
    combined = {id(each): each for each in found_in(entry.logits, Combine)}
    return sum(is_whole(each) for each in combined.values())


def is_whole(combine: Combine) -> bool:
    """Whether a sum is that of all experts' outputs, whose queries are of the same router."""
    route = all_tokens(combine.weights)
    outputs = [chosen_by(result, "o_proj", i) for i, (_, result) in enumerate(combine.terms)]
    if not isinstance(route, Route) or (route.chosen, route.normalized) != (CHOSEN, True):
        return False
    if [expert for expert, _ in combine.terms] != list(range(EXPERTS)):
        return False
    for expert, own in enumerate(outputs):
        if not isinstance(own, ChosenSlots) or own.weights is not combine.weights:
            return False
        if (own.expert, own.chosen, own.heads) != (expert, CHOSEN, OWN_HEADS):
            return False
    attention = all_tokens(outputs[0].source)
    if not isinstance(attention, Attention) or len({id(own.source) for own in outputs}) != 1:
        return False
    slots_of = attention.query
    while not isinstance(slots_of, Slots):
        slots_of = vars(slots_of).get("source")
        if slots_of is None:
            return False
    if (slots_of.chosen, slots_of.heads) != (CHOSEN, OWN_HEADS) or slots_of.weights is not route:
        return False
    queries = [chosen_by(result, "q_proj", i) for i, (_, result) in enumerate(slots_of.terms)]
    return [expert for expert, _ in slots_of.terms] == list(range(EXPERTS)) and all(
        isinstance(own, ChosenTokens) and (own.weights, own.expert) == (route, expert)
        for expert, own in enumerate(queries)
    )


def all_tokens(value: Value) -> Value:
    return value.source if isinstance(value, Last) else value


def chosen_by(result: Value, part: str, expert: int) -> Value | None:
    """What an expert's own product reads."""
    if not isinstance(result, Linear):
        return None
    mine = result.weight.name.endswith(f"self_attn.experts.{expert}.{part}.weight")
    return result.source if mine else None


def integer(program: Record, number: int) -> int:
    return number_of(program, "Int", "int_val", number)


def kernels(program: Record, kernel: str) -> list[Record]:
    return calls_of(program, "KernelCall", kernel)


def selects_of_rows(program: Record) -> list[Record]:
    """The selections of experts' rows of slots, in the first layer's queries and outputs."""
    rows = kernels(program, "aten::add")[0]["args"][-1]
    return [each for each in kernels(program, "aten::select_copy") if each["args"][0] == rows]


def reads_of_slots(program: Record) -> list[Record]:
    """The calls that gather the slots of the first layer's outputs."""
    own = {each["args"][-1] for each in kernels(program, "aten::index_select")[: EXPERTS * 6]}
    found = [e for e in kernels(program, "aten::index_select") if e["args"][2] in own]
    return found[:EXPERTS]


def counted_over_tokens(program: Record) -> None:
    kernels(program, "aten::cumsum")[0]["args"][1] = integer(program, 0)


def counted_as_booleans(program: Record) -> None:
    kernels(program, "aten::cumsum")[0]["args"][2] = integer(program, 1)


def all_experts_counted(program: Record) -> None:
    kernels(program, "aten::ne")[0]["args"][1] = number_of(
        program, "Double", "double_val", -math.inf
    )


def rows_of_the_next_token(program: Record) -> None:
    firsts = kernels(program, "aten::add")[0]["args"][1]
    copies = [e for e in kernels(program, "aten::slice_copy") if e["args"][-1] == firsts]
    copies[0]["args"][2] = integer(program, 1)


def firsts_taken_away(program: Record) -> None:
    kernels(program, "aten::add")[0]["args"][2] = integer(program, 0)


def too_few_rows(program: Record) -> None:
    kernels(program, "executorch_prim::mul")[0]["args"][1] = integer(program, 2)


def slots_not_zero(program: Record) -> None:
    full = kernels(program, "aten::full")[0]
    full["args"][1] = number_of(program, "Double", "double_val", -math.inf)


def queries_in_another_experts_rows(program: Record) -> None:
    first, second = selects_of_rows(program)[:2]
    second["args"][2] = first["args"][2]


def outputs_from_another_experts_rows(program: Record) -> None:
    first, second = selects_of_rows(program)[EXPERTS : EXPERTS + 2]
    first["args"][2] = second["args"][2]


def queries_in_the_tokens_rows(program: Record) -> None:
    """Instead of in those of their slots."""
    put = kernels(program, "aten::index_put_")[0]
    places = forward_of(program)["values"][put["args"][1]]["val"]
    own = next(
        e for e in kernels(program, "aten::index_select") if e["args"][-1] == places["items"][1]
    )
    places["items"][1] = own["args"][2]


def outputs_from_the_tokens_rows(program: Record) -> None:
    read = reads_of_slots(program)[0]
    own = next(
        e for e in kernels(program, "aten::index_select") if e["args"][-1] == read["args"][2]
    )
    read["args"][2] = own["args"][2]


def rows_by_another_router(program: Record) -> None:
    """The second layer's rows are those of the first layer's router."""
    first, *_, last = (
        next(s for s in kernels(program, "aten::select_copy") if s["args"][-1] == e["args"][0])
        for e in kernels(program, "aten::ne")
    )
    assert first["args"][0] != last["args"][0]
    last["args"][0] = first["args"][0]


def rows_of_all_tokens_for_the_last(program: Record) -> None:
    """The last layer's outputs are one token's; its router's weights for all stand for them."""
    *_, queries, outputs = (
        next(s for s in kernels(program, "aten::select_copy") if s["args"][-1] == e["args"][0])
        for e in kernels(program, "aten::ne")
    )
    outputs["args"][0] = queries["args"][0]


def attention_of_all_tokens_for_the_last(program: Record) -> None:
    """The last layer's outputs read the first tokens' slots in place of the last token's."""
    calls = forward_of(program)["chains"][0]["instructions"]
    delegates = [row["instr_args"] for row in calls if row["instr_args"].table == "DelegateCall"]
    attention = kernels(program, "llama::custom_sdpa")[-1]["args"][-1]
    last = next(e for e in kernels(program, "aten::slice_copy") if e["args"][0] == attention)
    (permuting,) = (e for e in delegates if e["args"][0] == last["args"][-1])
    permuting["args"][0] = attention


def of_another_condition(program: Record) -> None:
    first, second = calls_of(program, "JumpFalseCall")[:2]
    second.fields["cond_value_index"] = first["cond_value_index"]


def too_early(program: Record) -> None:
    calls_of(program, "JumpFalseCall")[1].fields["destination_instruction"] -= 1


def by_another_bound(program: Record) -> None:
    """Which experts the outputs of the first layer need is not found out anew."""
    second = kernels(program, "aten::gt")[1]
    second["args"][1] = number_of(program, "Double", "double_val", -math.inf)


def along_an_axis_that_a_call_computes(program: Record) -> None:
    """The axis is 0 at the first position, and no other number is."""
    axis = kernels(program, "aten::_local_scalar_dense")[0]["args"][-1]
    own = next(e for e in kernels(program, "aten::index_select") if is_along(program, e, 0))
    own["args"][1] = axis


def is_along(program: Record, select: Record, axis: int) -> bool:
    return forward_of(program)["values"][select["args"][1]]["val"]["int_val"] == axis


def past_the_next_expert(program: Record) -> None:
    calls_of(program, "JumpFalseCall")[1].fields["destination_instruction"] += 2


ALTERED: dict[Callable[[Record], None], str] = {
    counted_over_tokens: "",
    counted_as_booleans: "",
    all_experts_counted: "",
    rows_of_the_next_token: "",
    firsts_taken_away: "",
    too_few_rows: "",
    slots_not_zero: "",
    queries_in_another_experts_rows: "",
    outputs_from_another_experts_rows: "",
    queries_in_the_tokens_rows: "",
    outputs_from_the_tokens_rows: "",
    rows_by_another_router: "",
    rows_of_all_tokens_for_the_last: "",
    attention_of_all_tokens_for_the_last: "",
    of_another_condition: "",
    too_early: "",
    by_another_bound: "leaves out something else",
    along_an_axis_that_a_call_computes: "",
    past_the_next_expert: "JumpFalseCall",
}


@pytest.mark.parametrize("softcap", [0.0, 1.5])
def test_every_method_is_read_back(softcap, tmp_path):
    spec = replace(SPEC, attention_softcap=softcap)
    made = make(spec, tmp_path, draft_positions=3)
    for method in ("forward", "draft", "logits_all"):
        assert read_back(made.folder / "model.pte", method) == LAYERS


@pytest.mark.parametrize("change", ALTERED, ids=lambda change: change.__name__)
def test_slots_that_were_altered_are_not_read_as_right(made, tmp_path, change):
    whole = (made.folder / "model.pte").read_bytes()
    program = tables_of(whole)
    path = tmp_path / "model.pte"
    path.write_bytes(rewritten(whole, program))
    assert read_back(path) == LAYERS
    change(program)
    path.write_bytes(rewritten(whole, program))
    if ALTERED[change]:
        with pytest.raises(ExportError, match=ALTERED[change]):
            read_program(path, CONTEXT)
    else:
        assert read_back(path) < LAYERS


# What a graph's transposition and reshape are instead, given the sound ones.
WRONG: dict[str, tuple[str, Callable]] = {
    "not permuted": ("transpose", lambda sound, graph, value, _: value),
    "tokens and slots": ("transpose", lambda sound, *given: sound(*given[:2], (1, 0, 2, 3))),
    "slots and columns": ("transpose", lambda sound, *given: sound(*given[:2], (0, 3, 2, 1))),
    "heads and columns": ("transpose", lambda sound, *given: sound(*given[:2], (0, 1, 3, 2))),
    "as many slots as heads": (
        "reshape",
        lambda sound, graph, value, shape: sound(
            graph, value, [shape[i] for i in (0, 2, 1, 3)] if len(shape) == 4 else shape
        ),
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize(
    ("module", "place"),
    [(slots, "_heads_first"), (mixtures, "slots_first")],
    ids=["queries", "outputs"],
)
def test_heads_in_another_order_are_not_read_as_right(module, place, wrong, tmp_path, monkeypatch):
    name, change = WRONG[wrong]
    written, sound = getattr(slots, place), getattr(XnnpackGraph, name)

    def altered(*given: object) -> object:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(XnnpackGraph, name, lambda *own: change(sound, *own))
            return written(*given)

    monkeypatch.setattr(module, place, altered)
    assert read_back(make(SPEC, tmp_path).folder / "model.pte") == 0
