"""What a program consists of: delegates, the few kernels between them, memory, and metadata."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from exporters.executorch.lowering import stages_of
from exporters.executorch.method import SCALAR_TYPES
from exporters.executorch.reader import read_pte
from exporters.last_token import keep_last_token
from quant.program import dialect

PLAIN = {
    *("aten::sym_size.int", "aten::_local_scalar_dense", "executorch_prim::add.Scalar"),
    *("aten::slice_copy.Tensor_out", "llama::update_cache.out", "llama::custom_sdpa.out"),
}
WINDOW = {
    *("executorch_prim::sub.Scalar", "executorch_prim::sym_max.Scalar", "aten::sub.out"),
    *("aten::ge.Scalar_out", "aten::lt.Scalar_out", "aten::logical_and.out"),
    "aten::where.self_out",
}


def plan_of(made, name):
    opened = read_pte(made.folder / "model.pte")
    plans = {plan["name"]: plan for plan in opened.program["execution_plan"]}
    return opened, plans[name]


def operators(plan):
    rows = (f"{row['name']}.{row['overload']}".rstrip(".") for row in plan["operators"])
    return set(rows)


@pytest.mark.parametrize("method", ["forward", "logits_all"])
@pytest.mark.parametrize(
    ("recipe", "look_up"),
    [
        ("int4-g32", "quantized_decomposed::embedding_4bit.dtype_out"),
        ("int8-pc", "quantized_decomposed::embedding_byte.dtype_out"),
        ("fp32", "aten::embedding.out"),
    ],
)
def test_nothing_but_these_runs_outside_the_delegates(pte, llama_config, recipe, look_up, method):
    _, plan = plan_of(pte(llama_config(), recipe), method)
    assert operators(plan) == PLAIN | {look_up}
    assert len(plan["delegates"]) == 3  # one more than layers
    assert {row["id"] for row in plan["delegates"]} == {"XnnpackBackend"}


def test_a_window_needs_a_mask_made_once(pte, llama_config):
    config = llama_config(model_type="mistral", sliding_window=7)
    _, plan = plan_of(pte(config), "forward")
    assert operators(plan) == PLAIN | WINDOW | {"aten::embedding.out"}
    names = [row["name"] for row in plan["operators"]]
    (chain,) = plan["chains"]
    calls = [row["instr_args"] for row in chain["instructions"]]
    made = [
        call
        for call in calls
        if call.table == "KernelCall" and names[call["op_index"]] == "aten::where"
    ]
    assert len(made) == 1


def test_the_last_token_alone_goes_through_the_end_of_the_last_layer(pte, llama_config):
    made = pte(llama_config())
    opened, plan = plan_of(made, "forward")
    graph = opened.delegates[plan["delegates"][-1]["processed"]["index"]]
    for row in graph["xvalues"]:
        value = row["xvalue_union"]
        if value["constant_buffer_idx"] == 0:
            assert math.prod(value["dims"][:2]) == 1
    _, whole = plan_of(made, "logits_all")
    (logits,), (every,) = (
        [p["values"][i]["val"]["sizes"] for i in p["outputs"]] for p in (plan, whole)
    )
    assert (logits, every) == ([1, 1, 320], [1, 16, 320])


def test_stages_follow_their_inputs(pte, openelm_config):
    made = pte(openelm_config([2, 4], [1, 2]))
    for program in (made.program, keep_last_token(made.program)):
        done = set()
        for stage in stages_of(program):
            for node in (*stage.nodes, *stage.kernels):
                for source in node.all_input_nodes:
                    known = source in done or source.op == "placeholder"
                    assert known or source.target is dialect.SIZE
                done.add(node)


@pytest.mark.parametrize("method", ["forward", "logits_all"])
def test_tensors_alive_together_do_not_overlap(pte, llama_config, openelm_config, method):
    window = llama_config(model_type="mistral", sliding_window=7)
    cases = (window, None), (window, "int8"), (openelm_config([2, 4], [1, 2]), None)
    for config, dtype in cases:
        _, plan = plan_of(pte(config, "int4-pc", kv_cache=dtype), method)
        (chain,) = plan["chains"]
        used: dict[int, list[int]] = {}
        for at, row in enumerate(chain["instructions"]):
            for value in row["instr_args"]["args"]:
                used.setdefault(value, []).append(at)
        sizes = {number: size for number, size in SCALAR_TYPES.values()}
        places, states = [], 0
        for index, row in enumerate(plan["values"]):
            tensor = row["val"]
            if tensor.table != "Tensor" or tensor["allocation_info"] is None:
                continue
            where = tensor["allocation_info"]
            begin = where["memory_offset_low"] + (where["memory_offset_high"] << 32)
            end = begin + math.prod(tensor["sizes"]) * sizes[tensor["scalar_type"]]
            assert end <= plan["non_const_buffer_sizes"][1]
            life = used[index][0], used[index][-1]
            if len(tensor["sizes"]) == 4 and tensor["sizes"][1] == 48:
                states += 1  # a cache lives from run to run
                life = -1, 10**9
            if index in plan["inputs"]:
                life = -1, life[1]
            if index in plan["outputs"]:
                life = life[0], 10**9
            places.append((begin, end, *life))
        assert states >= (12 if dtype == "int8" else 4)
        for one, other in itertools.combinations(places, 2):
            apart = one[1] <= other[0] or other[1] <= one[0]
            assert apart or one[3] < other[2] or other[3] < one[2]


def test_memory_is_used_again(pte, llama_config):
    few, many = (
        plan_of(pte(llama_config(num_hidden_layers=n)), "forward")[1]["non_const_buffer_sizes"][1]
        for n in (3, 5)
    )
    caches = 2 * 48 * 2 * 16 * 4  # of a layer
    assert many - few == 2 * caches


def test_weights_are_stored_once_for_both_methods(pte, llama_config):
    made = pte(llama_config(tie_word_embeddings=True), "int4-g32")
    opened = read_pte(made.folder / "model.pte")
    keys = [row["key"] for row in opened.program["named_data"]]
    assert len(set(keys)) == len(keys)
    stored = sum(size for _, size in opened.segments)
    # Codes, scales and norms; the tied embedding lies there a second time, in another layout.
    table = made.store.extents("model.embed_tokens.weight")
    again = table["codes"].nbytes + 2 * table["scale"].nbytes
    assert stored < 1.02 * (made.store.nbytes + again) + 40_000


def test_states_are_not_in_the_file(pte, llama_config):
    sizes = [
        (pte(llama_config(), "int4-g32", context).folder / "model.pte").stat().st_size
        for context in (32, 2048)
    ]
    tables = 2 * 8 * 4 * (2048 - 32)  # rotary, which grow with the context
    assert abs(sizes[1] - sizes[0] - tables) < 2048


def test_what_runners_ask_of_a_model(pte, llama_config):
    made = pte(llama_config(eos_token_id=[257, 300, 257]), "int4-g32")
    opened = read_pte(made.folder / "model.pte")
    found = {}
    for plan in opened.program["execution_plan"]:
        if not plan["inputs"]:
            values = [plan["values"][index]["val"] for index in plan["outputs"]]
            found[plan["name"]] = [next(iter(value.fields.values())) for value in values]
    assert found == {
        "get_max_seq_len": [16],
        "get_max_context_len": [48],
        "get_vocab_size": [320],
        "get_n_layers": [2],
        "enable_dynamic_shape": [True],
        "use_kv_cache": [True],
        "use_sdpa_with_kv_cache": [True],
        "get_bos_id": [256],
        "get_eos_ids": [257, 300],
    }


def test_the_same_export_gives_the_same_bytes(pte, llama_config, tmp_path, monkeypatch):
    from exporters.executorch import target
    from exporters.target import ExportRequest, ModelFacts

    made = pte(llama_config(), "int4-g32")
    monkeypatch.setattr(target, "CHUNK_TOKENS", 16)
    facts = ModelFacts("llama", 64, 16, (4, 4), (2, 2), 256, (257,), None, 32)
    request = ExportRequest(made.program, made.store, facts)
    lowered = target.ExecutorchTarget().write(request, tmp_path)
    data = (tmp_path / lowered.entry).read_bytes()
    assert data == (made.folder / "model.pte").read_bytes()
    assert np.frombuffer(data[:8], "S4")[1] == b"ET12"
    assert lowered.states["model.layers.0.self_attn.k_cache"] == "float32[1, 48, 2, 16]"
