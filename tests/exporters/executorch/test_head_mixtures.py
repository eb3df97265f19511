"""Mixtures of attention heads: who runs, and what the runtime gives for them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from exporters.executorch import target
from exporters.executorch.reader import read_pte
from tests.exporters.executorch.small_programs import Made, make
from tests.exporters.executorch.test_mixtures import changed, forward_of
from tests.exporters.executorch.test_read_head_mixtures import read_back
from tests.exporters.executorch.test_vocabulary import error
from tests.oracles.lowered_spec import SpecWeights
from tests.oracles.vocabulary import HEADS, MIXTURES, VOCAB, small_spec

CONTEXT = 48
CLOSE = 2e-5
EXPERTS, CHOSEN = 5, 3  # of `HEADS`
LAYERS = 2
SPEC = MIXTURES["heads-and-mixture"]
PARTS = ("q_proj", "o_proj")


@pytest.fixture(scope="module", autouse=True)
def short_runs():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, "CHUNK_TOKENS", 16)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory, short_runs) -> Made:
    return make(SPEC, tmp_path_factory.mktemp("heads"))


def text_of(tokens: int) -> np.ndarray:
    return np.random.default_rng(7).integers(0, VOCAB, tokens, dtype=np.int64)


def poisoned(*experts: int, parts: tuple[str, ...] = PARTS) -> dict[str, float]:
    """Not a number in every element of experts' matrices."""
    names = (f"self_attn.experts.{expert}.{part}.weight" for expert in experts for part in parts)
    return dict.fromkeys(names, np.nan)


def test_only_chosen_experts_run(made, run_pte, tmp_path):
    """Every token's logits of the experts are zeros, so that it chooses the first ones."""
    text, equal = text_of(21), {"self_attn.router.weight": 0.0}
    found = {}
    for name, values in {
        "sound": {},
        "not chosen": poisoned(*range(CHOSEN, EXPERTS)),
        "queries of a chosen one": poisoned(CHOSEN - 1, parts=PARTS[:1]),
        "outputs of a chosen one": poisoned(CHOSEN - 1, parts=PARTS[1:]),
    }.items():
        with run_pte(changed(made.folder, tmp_path / name, equal | values)) as session:
            found[name] = [
                session.logits(text),
                session.extend(text[:20]),
                session.extend(text[:1]),
            ]
    for sound, others in zip(found["sound"], found["not chosen"], strict=True):
        assert np.isfinite(sound).all() and np.array_equal(sound, others)
    for name in ("queries of a chosen one", "outputs of a chosen one"):
        assert not any(np.isfinite(logits).any() for logits in found[name])


def test_a_long_text_in_runs_of_several_lengths(run_pte, tmp_path, monkeypatch):
    monkeypatch.setattr(target, "CHUNK_TOKENS", 128)
    text = text_of(1000)
    made = make(SPEC, tmp_path, context=1024)
    wanted = made.logits(text)
    with run_pte(made.folder, 1024) as session:
        assert error(session.logits(text), wanted) < CLOSE
        at = 0
        for size in (700, 1, 130, 1, 128, 40):
            at += size
            assert error(session.extend(text[at - size : at]), wanted[at - 1]) < CLOSE


def test_runs_of_one_token(run_pte, tmp_path, monkeypatch):
    monkeypatch.setattr(target, "CHUNK_TOKENS", 1)
    made = make(SPEC, tmp_path)
    text = text_of(12)
    with run_pte(made.folder) as session:
        assert error(session.logits(text), made.logits(text)) < CLOSE
    assert read_back(made.folder / "model.pte") == LAYERS


class Routed(TorchDispatchMode):
    """Keeps what routers give."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[torch.Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if func is torch.ops.edgeforge.route.default:
            self.found.append(made)
        return made


def test_a_chosen_expert_whose_weight_is_too_small_for_float32(run_pte, tmp_path):
    source = SpecWeights(SPEC)
    for name, tensor in source.tensors.items():
        if name.endswith("self_attn.router.weight"):
            tensor *= 3e3
    made = make(SPEC, tmp_path, source=source)
    text = text_of(40)
    with Routed() as routed:
        wanted = made.logits(text)
    of_heads = [weights for weights in routed.found if weights.shape[-1] == EXPERTS]
    assert all(((weights != 0).sum(-1) < CHOSEN).any() for weights in of_heads) and of_heads
    with run_pte(made.folder) as session:
        assert error(session.logits(text), wanted) < CLOSE
        assert error(session.extend(text[:21]), wanted[20]) < CLOSE


@pytest.mark.parametrize("softcap", [0.0, 1.5])
def test_int8_caches(softcap, run_pte, tmp_path):
    spec = replace(SPEC, attention_softcap=softcap)
    made, text = make(spec, tmp_path, kv_cache="int8"), text_of(CONTEXT)
    wanted = made.logits(text)
    with run_pte(made.folder) as session:
        every = session.logits(text)
        assert 1e-4 < error(every, wanted) < 0.02
        assert error(session.extend(text[:20]), every[19]) < CLOSE
        assert error(session.extend(text[20:21]), every[20]) < CLOSE
    assert read_back(made.folder / "model.pte") == LAYERS


def test_a_layer_has_as_many_tensors_as_one_expert_needs(tmp_path):
    counts = []
    for experts in (4, 12):
        layer = replace(HEADS, attention_experts=experts)
        spec = small_spec((layer, layer), router="normalized_softmax")
        folder = tmp_path / str(experts)
        folder.mkdir()
        plan = forward_of(read_pte(make(spec, folder).folder / "model.pte").program)
        tensors = [row["val"] for row in plan["values"] if row["val"].table == "Tensor"]
        conditions = [each for each in tensors if list(each["sizes"]) == [1]]
        counts.append(len(tensors) - len(conditions))
        assert len(plan["delegates"]) > 2 * 2 * experts
    assert counts[0] == counts[1]
