"""Recurrent layers traced: the operators that a program has, its states, and text in parts."""

from pathlib import Path

import pytest
import torch

from quant.program import dialect
from quant.program.states import states_of
from tests.oracles.vocabulary import CONTEXT, RECURRENT
from tests.oracles.vocabulary_models import TOKENS, logits_of, program_of, small_model


@pytest.mark.parametrize("name", RECURRENT)
def test_a_program_is_in_the_dialect_and_has_its_states(name: str) -> None:
    program = program_of(RECURRENT[name])
    dialect.check_float(program)
    kinds = [state.kind for state in states_of(program)]
    recurrent = [layer for layer in RECURRENT[name].layers if layer.recurrence is not None]
    assert kinds.count("memory") == len(recurrent)
    shifts = sum(layer.feed_forward == "channel_mix" for layer in recurrent)
    assert kinds.count("recent") == len(recurrent) + shifts
    shapes = {tuple(state.shape) for state in states_of(program) if state.kind == "memory"}
    made = recurrent[0].recurrence
    assert made is not None
    assert shapes == {(1, made.heads, made.key_width, made.value_width)}


@pytest.mark.parametrize("name", RECURRENT)
def test_a_text_in_parts_gives_the_logits_of_the_whole(name: str, tmp_path: Path) -> None:
    spec = RECURRENT[name]
    model, program = small_model(spec, tmp_path / "model"), program_of(spec)
    whole = logits_of(model)
    assert whole.isfinite().all()
    module = torch.fx.GraphModule(torch.nn.Module(), program.graph)
    states: dict[str, torch.Tensor] = {}
    found, at = [], 0
    for stop in (5, 6, 17, len(TOKENS)):
        given = []
        for node in program.graph.find_nodes(op="placeholder"):
            held = program.inputs[node.name]
            if held.kind == "weight":
                given.append(model.weights.float_weight(held.name))
            elif held.kind == "table":
                given.append(program.tables[held.name])
            elif held.kind == "tokens":
                given.append(TOKENS[None, at:stop])
            elif held.kind == "position":
                given.append(torch.tensor([at]))
            else:
                shape = [int(size) for size in node.meta["val"].shape]
                given.append(states.setdefault(held.name, torch.full(shape, torch.nan)))
                if held.kind == "cache" and at == 0:
                    states[held.name].zero_()
        with torch.no_grad():
            result = module(*given)
        found.append((result[0] if isinstance(result, tuple) else result)[0])
        at = stop
    assert len(TOKENS) <= CONTEXT
    torch.testing.assert_close(torch.cat(found), whole, rtol=1e-4, atol=1e-4)
