"""Recurrent layers in ExecuTorch: their numbers, their states, and what is read back of them."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch

from edgeforge.families.spec import LayerSpec, ModelSpec, RecurrenceSpec
from edgeforge.synth.synthesise import write_byte_tokenizer
from exporters.errors import ExportError
from exporters.executorch import state, target
from exporters.executorch.lifted import read_program
from exporters.executorch.method import SCALAR_TYPES
from exporters.executorch.reader import read_pte, stored_digests
from exporters.executorch.state import MethodLowering
from exporters.executorch.xnnpack_graph import XnnpackGraph
from exporters.lifted import (
    Value,
)
from exporters.lifted_recurrent import (
    Function,
    Gain,
    Previous,
    Recurrence,
    UnitNorm,
)
from tests.exporters.executorch.small_programs import Made, make
from tests.exporters.executorch.test_llm_runner import RUNNER
from tests.oracles import vocabulary
from tests.oracles.lowered_spec import SpecWeights
from tests.oracles.recurrent_layers import CONV, DELTA, FINCH, MAMBA
from tests.oracles.vocabulary import RECURRENT, VOCAB, small_spec

CONTEXT, CHUNK = 48, 16
CLOSE = 5e-6


@pytest.fixture(scope="module", autouse=True)
def short_runs():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, "CHUNK_TOKENS", CHUNK)
        yield


@pytest.fixture(scope="module")
def text():
    return np.random.default_rng(7).integers(0, VOCAB, CONTEXT, dtype=np.int64)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The artifact of one of `RECURRENT`, by its name."""
    known: dict[str, Made] = {}

    def made(name: str) -> Made:
        if name not in known:
            known[name] = make(RECURRENT[name], tmp_path_factory.mktemp(name))
        return known[name]

    return made


def error(found, wanted) -> float:
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max() / np.ptp(wanted))


@pytest.mark.parametrize("name", RECURRENT)
def test_the_runtime_gives_what_torch_gives(name, made, run_pte, text):
    wanted = made(name).logits(text)
    with run_pte(made(name).folder) as session:
        assert error(session.logits(text), wanted) < CLOSE
        at = 0
        for size in (21, 9, 1, 1, 15, 1):
            at += size
            assert error(session.extend(text[at - size : at]), wanted[at - 1]) < CLOSE
            if size == 9:  # another text in between leaves the states as they were
                session.logits(text[::-1][:11].copy())
        for other in (text[::-1][:19].copy(), text[5:6], text[:5]):  # texts one after the other
            session.reset()
            assert error(session.extend(other), made(name).logits(other)[-1]) < CLOSE
    assert stored_digests(made(name).folder / "model.pte") == dict(made(name).store.digests)


@pytest.mark.parametrize("layer", [FINCH, MAMBA, DELTA], ids=lambda layer: layer.mixer)
def test_a_text_begins_with_zeros_whatever_the_states_hold(layer, run_pte, text, tmp_path):
    spec = small_spec((layer, layer), embedding_multiplier=2.0, tied=False, conv_width=CONV)
    source = SpecWeights(spec)
    source.tensors["model.embed_tokens.weight"][0] = 3e38  # twice that is infinite
    made = make(spec, tmp_path, source=source)
    text = np.where(text == 0, 1, text)
    with run_pte(made.folder) as session:
        assert not np.isfinite(session.extend(np.zeros(1, np.int64))).any()
        assert not np.isfinite(session.extend(text[:3])).any()  # the states hold NaN
        session.reset()
        assert error(session.extend(text[:20]), made.logits(text)[19]) < CLOSE


@pytest.mark.parametrize("format", ["int4-pc", "int8-pc"])
@pytest.mark.parametrize("name", ["rwkv6", "mamba", "delta-net"])
def test_recurrences_between_integers(name, format, run_pte, text, tmp_path, monkeypatch):
    monkeypatch.setattr(state, "SMALL", 0)
    made = make(RECURRENT[name], tmp_path, format)
    wanted = made.logits(text, {})
    with run_pte(made.folder) as session:
        found = session.logits(text)
    # Both round alike but where a number lies between two integers.
    assert np.median(np.abs(found - wanted)) < 1e-5 * np.ptp(wanted)
    assert error(found, wanted) < 0.02
    assert error(found, made.logits(text)) < 0.08
    assert stored_digests(made.folder / "model.pte") == dict(made.store.digests)


def far(name: str) -> SpecWeights:
    """Weights whose decays keep almost all, or nothing, and whose steps are small and large."""
    source = SpecWeights(RECURRENT[name])
    for weight, values in source.tensors.items():
        if weight.endswith(("decay.weight", "decay_up.bias", "dt_proj.bias")):
            spread = torch.linspace(-9, 9, values.numel()).reshape(values.shape)
            values.copy_(-spread.exp() if weight.endswith("decay.weight") else spread)
    return source


@pytest.mark.parametrize("name", ["rwkv5", "rwkv6", "mamba", "delta-net"])
def test_decays_and_steps_far_from_one(name, run_pte, text, tmp_path):
    made = make(RECURRENT[name], tmp_path, source=far(name))
    wanted = made.logits(text)
    assert np.isfinite(wanted).all()
    with run_pte(made.folder) as session:
        assert error(session.logits(text), wanted) < 2e-5


def found_in(value: Value, kind: type) -> list[Value]:
    """All values of a kind that a value is made of, each once."""
    found, left, seen = [], [value], set[int]()
    while left:
        here = left.pop()
        if id(here) in seen:
            continue
        seen.add(id(here))
        found += [here] if isinstance(here, kind) else []
        for given in vars(here).values():
            parts = given if isinstance(given, tuple) else (given,)
            left += [part for part in parts if isinstance(part, Value)]
    return found


def stored(made: Made, name: str) -> np.ndarray:
    return made.store.part(name, "value").float().numpy()


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrences_are_read_back(name, made, text):
    artifact = made(name)
    reading = read_program(artifact.folder / "model.pte", CONTEXT)
    layers = [layer for layer in artifact.spec.layers if layer.recurrence is not None]
    for entry in reading.entry_points:
        assert entry.outside == ()
        begins = tuple(probe.start == 0 for probe in entry.probes)
        found = found_in(entry.logits, Recurrence)
        states = {each.memory.read for each in found}
        assert len(found) == len(states) == len(layers)
        for each in found:
            assert each.memory.written == each.memory.read and each.memory.ignored == begins
            shape = layers[0].recurrence
            assert each.dimensions == (
                shape.heads, shape.key_heads, shape.key_width, shape.value_width
            )  # fmt: skip
            assert (each.beta is not None) == (name == "delta-net")
            assert (each.bonus is not None) == name.startswith("rwkv")
            if each.bonus is not None:
                np.testing.assert_array_equal(each.bonuses, stored(artifact, each.bonus.name))
            if name == "rwkv5":
                np.testing.assert_array_equal(each.decays, stored(artifact, each.decay.name))
            else:
                assert each.decays is None and isinstance(each.decay, Value)
        for each in found_in(entry.logits, Gain):
            held = stored(artifact, each.weight.name)
            shape = artifact.spec.weights[each.weight.name].shape
            assert each.values.shape == shape
            np.testing.assert_array_equal(each.values, held.reshape(shape))
        gains = {each.weight.name for each in found_in(entry.logits, Gain)}
        wanted = {
            name
            for name, weight in artifact.spec.weights.items()
            if weight.role == "gain" and "bonus" not in name
        }
        if name.startswith("mamba"):  # a norm of groups, whose scale is as wide as all of them
            wanted |= {n for n in artifact.spec.weights if n.endswith("mamba.norm.weight")}
        if name.startswith("rwkv"):
            wanted -= {n for n in wanted if n.endswith("time_mix.decay.weight")}
            wanted -= {n for n in wanted if name == "rwkv6" and is_added(n)}
        assert gains == wanted
        shifts = found_in(entry.logits, Previous)
        assert len({each.recent.read for each in shifts}) == len(shifts)
        assert len(shifts) == (2 * len(layers) if name.startswith("rwkv") else 0)
        assert all(each.recent.ignored == begins for each in shifts)
        units = {"delta-net": 2, "mamba": 1, "mamba-mixture": 1}.get(name, 0)
        assert len(found_in(entry.logits, UnitNorm)) == units * len(layers)


def is_added(name: str) -> bool:
    """Whether RWKV 6 adds a mix to what it makes of a token, as a bias."""
    return "time_mix.mix_" in name and "mix_all" not in name


@pytest.mark.parametrize(
    ("name", "functions"),
    [
        ("rwkv5", {"relu"}),
        ("rwkv6", {"relu", "tanh", "exp"}),
        ("mamba", {"softplus"}),
        ("delta-net", {"softplus"}),
    ],
)
def test_functions_are_read_back(name, functions, made):
    reading = read_program(made(name).folder / "model.pte", CONTEXT)
    for entry in reading.entry_points:
        found = {each.function for each in found_in(entry.logits, Function)}
        assert found == functions


def test_the_manifest_names_the_memories(made):
    lowered = made("mamba").lowered
    states = {name: dims for name, dims in lowered.states.items() if name.endswith("memory")}
    assert set(states.values()) == {"float32[4, 8, 12]"} and len(states) == 2
    assert any("loop over a run's tokens" in note for note in lowered.notes)


def test_other_exporters_are_refused(tmp_path):
    with pytest.raises(ExportError, match="recurrent layers, which EdgeForge does not write for"):
        make(RECURRENT["delta-net"], tmp_path, lowering="stock")
    with pytest.raises(ExportError, match="no attention, and so no keys and values"):
        make(RECURRENT["rwkv6"], tmp_path / "again", kv_cache="int8")


def test_executorchs_runner_feeds_a_prompt_in_pieces(run_pte, tmp_path, monkeypatch):
    spec = bytes_spec(monkeypatch, MAMBA)
    source = SpecWeights(spec)
    for rows in (slice(0, ord(" ")), slice(ord("~") + 1, None)):  # it writes printable bytes
        source.tensors["lm_head.weight"][rows] = 0
    made = make(spec, tmp_path, source=source)
    write_byte_tokenizer(made.folder, 320)
    prompts = ["The function returns a list of", "Install"]
    command = [sys.executable, "-c", RUNNER, str(made.folder), "6", *prompts]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (line,) = [row for row in done.stdout.splitlines() if row.startswith("RESULT")]
    for prompt, found in zip(prompts, json.loads(line.removeprefix("RESULT")), strict=True):
        with run_pte(made.folder) as session:
            given = np.array([256, *prompt.encode()], np.int64)
            wanted = []
            for _ in range(6):
                wanted.append(int(session.extend(given).argmax()))
                given = np.array(wanted[-1:], np.int64)
        assert found == bytes(wanted).decode()


def bytes_spec(monkeypatch, layer: LayerSpec) -> ModelSpec:
    """A spec whose tokens are bytes."""
    monkeypatch.setattr(vocabulary, "VOCAB", 320)
    return replace(small_spec((layer, layer), conv_width=CONV, tied=False), bos=256, eos=(257,))


def test_a_head_for_each_key_and_one_for_all(run_pte, text, tmp_path):
    shapes = RecurrenceSpec(4, 1, 8, 12), RecurrenceSpec(3, 3, 8, 12)
    layers = tuple(replace(DELTA, recurrence=shape) for shape in shapes)
    made = make(small_spec(layers, conv_width=CONV), tmp_path)
    with run_pte(made.folder) as session:
        assert error(session.logits(text), made.logits(text)) < CLOSE


@pytest.mark.parametrize("name", ["rwkv6", "delta-net"])
def test_what_a_loop_reads_is_kept_until_its_last_turn(name, made):
    opened = read_pte(made(name).folder / "model.pte")
    for plan in opened.program["execution_plan"]:
        if plan["inputs"]:
            check_places(plan)


def check_places(plan) -> None:
    """Checks that no two tensors that are needed at the same call share memory."""
    values = [row["val"] for row in plan["values"]]
    names = [row["name"] for row in plan["operators"]]
    calls = [row["instr_args"] for row in plan["chains"][0]["instructions"]]
    loops = [
        (call["destination_instruction"], place)
        for place, call in enumerate(calls)
        if call.table == "JumpFalseCall" and call["destination_instruction"] <= place
    ]
    assert loops
    held_by: dict[int, int] = {}  # of views
    used: dict[int, list[int]] = {}
    for place, call in enumerate(calls):
        if call.table == "JumpFalseCall":
            continue
        given = list(call["args"])
        if call.table == "KernelCall" and names[call["op_index"]] == "executorch_prim::et_view":
            held_by[given[-1]] = held_by.get(given[0], given[0])
        for value in given:
            used.setdefault(held_by.get(value, value), []).append(place)
    sizes = {number: size for number, size in SCALAR_TYPES.values()}
    states, places = set[int](), []
    for call in calls:
        if call.table == "DelegateCall":
            states |= {value for value in call["args"] if list(call["args"]).count(value) == 2}
    assert len(states) == len(loops)
    for index, tensor in enumerate(values):
        if tensor.table != "Tensor" or tensor["allocation_info"] is None or index not in used:
            continue
        begin = tensor["allocation_info"]["memory_offset_low"]
        end = begin + math.prod(tensor["sizes"]) * sizes[tensor["scalar_type"]]
        first, last = used[index][0], used[index][-1]
        for start, stop in loops:
            if first < start <= last:
                last = max(last, stop)
        if index in plan["inputs"] or index in states:
            first = -1
        if index in plan["outputs"] or index in states:
            last = len(calls)
        places.append((begin, end, first, last))
    for one, other in itertools.combinations(places, 2):
        apart = one[1] <= other[0] or other[1] <= one[0]
        assert apart or one[3] < other[2] or other[3] < one[2]


def test_a_memory_that_begins_late_is_read_back_as_such(tmp_path):
    def late(self: MethodLowering) -> int:
        at, one = self.method.computed_boolean(), self.method.integer(1)
        self.method.call("executorch_prim::eq", "Scalar", self.start, one, at)
        return at

    with patch.object(MethodLowering, "at_start", late):
        made = make(RECURRENT["mamba"], tmp_path)
    for entry in read_program(made.folder / "model.pte", CONTEXT).entry_points:
        for each in found_in(entry.logits, Recurrence):
            assert not any(each.memory.ignored)


def test_another_step_than_a_recurrences_is_refused(tmp_path):
    binary = XnnpackGraph.binary

    def turned(self, kind, first, second):
        """``found - value`` in place of ``value - found``."""
        return binary(self, kind, *((second, first) if kind == "XNNSubtract" else (first, second)))

    with patch.object(XnnpackGraph, "binary", turned):
        made = make(small_spec((DELTA,), conv_width=CONV), tmp_path)
    with pytest.raises(ExportError, match="a loop over tokens that computes no recurrence"):
        read_program(made.folder / "model.pte", CONTEXT)
