"""The reference runner and session: however a text is cut, its logits are those of one pass."""

import threading

import numpy as np
import pytest
import torch

from edgeforge.model.trace import trace
from edgeforge.reference.walk import ReferenceRunner, store_reader

pytestmark = pytest.mark.usefixtures("one_thread")

OPENELM = {
    "model_type": "openelm",
    "model_dim": 40,
    "head_dim": 8,
    "num_transformer_layers": 2,
    "num_query_heads": [3, 6],
    "num_kv_heads": [1, 2],
    "ffn_dim_divisor": 4,
    "ffn_multipliers": [0.7, 1.3],
    "normalize_qk_projections": True,
    "share_input_output_layers": True,
    "vocab_size": 53,
}
MISTRAL = {
    "model_type": "mistral",
    "vocab_size": 53,
    "hidden_size": 36,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 10,
    "sliding_window": 6,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONTEXT = 32


@pytest.fixture(scope="module", params=["openelm", "mistral"])
def opened(request, tmp_path_factory, openelm_numpy, hugging_face, traced):
    """A tiny model of each way to lay out layers, with and without a window; and its oracle."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "openelm":
        stored = openelm_numpy.save(folder, OPENELM, openelm_numpy.random_tensors(OPENELM))
        return traced.model(folder), lambda tokens: openelm_numpy.logits(OPENELM, stored, tokens)
    hugging_face.save(folder, MISTRAL)
    return traced.model(folder), lambda tokens: hugging_face.logits(folder, tokens).numpy()


@pytest.fixture(scope="module")
def session(opened, traced):
    return traced.session(opened[0], CONTEXT)


@pytest.mark.parametrize(
    "cuts", [[1] * CONTEXT, [31, 1], [1, 31], [5, 1, 1, 1, 7, 1, 16], [6, 6, 6, 6, 6, 2]]
)
def test_a_text_in_chunks_is_the_text_in_one_pass(cuts, opened, session, traced):
    assert sum(cuts) == CONTEXT
    tokens = traced.tokens(CONTEXT, 53)
    expected = opened[1](tokens)
    session.reset()
    ends = np.cumsum(cuts)
    chunks = [session.extend(tokens[end - n : end]) for end, n in zip(ends, cuts, strict=True)]
    assert traced.difference(np.concatenate(chunks), expected) < 1e-5


def test_blocks_of_several_lengths_at_once(opened, traced, monkeypatch):
    model, oracle = opened
    runner = traced.runner(model, CONTEXT)
    blocks = [traced.tokens(n, 53, seed=n) for n in (9, 1, CONTEXT, 2, 17)]
    expected = [oracle(block) for block in blocks]
    whole = list(runner.logits([torch.from_numpy(block) for block in blocks]))
    assert [tuple(x.shape) for x in whole] == [(len(block), 53) for block in blocks]
    for ours, theirs in zip(whole, expected, strict=True):
        assert traced.difference(ours, theirs) < 1e-5

    # Cut into groups, the weights are read again but the numbers stay.
    monkeypatch.setattr("edgeforge.reference.walk.GROUP_TOKENS", 10)
    grouped = runner.logits([torch.from_numpy(block) for block in blocks])
    assert all(torch.equal(a, b) for a, b in zip(whole, grouped, strict=True))
    assert list(runner.logits([])) == []


@pytest.mark.usefixtures("four_threads")
def test_four_blocks_at_once_give_what_each_gives_alone(opened, traced):
    model, _ = opened
    program = trace(model.spec, CONTEXT)
    tables_read = threading.Barrier(4)

    def rows(name, tokens):
        # The first call looks tokens up: no block goes on before four threads have one each.
        tables_read.wait(30)
        return model.weights.float_rows(name, tokens)

    def reader(given):
        return model.weights.float_weight(given.name)

    blocks = [torch.from_numpy(traced.tokens(n, 53, seed=n)) for n in (9, 1, CONTEXT, 2)] * 3
    together = list(ReferenceRunner(program, reader, rows=rows).logits(blocks))
    torch.set_num_threads(1)
    alone = ReferenceRunner(program, reader, rows=model.weights.float_rows)
    wanted = [next(alone.logits([block])) for block in blocks]
    assert all(torch.equal(a, b) for a, b in zip(together, wanted, strict=True))


def test_each_weight_is_read_once_for_all_blocks(opened, traced):
    model, _ = opened
    read = []

    def reader(given):
        read.append(given.name)
        return model.weights.float_weight(given.name)

    runner = ReferenceRunner(trace(model.spec, CONTEXT), reader, rows=model.weights.float_rows)
    blocks = [torch.from_numpy(traced.tokens(n, 53)) for n in (3, 8, 5)]
    assert len(list(runner.logits(blocks))) == 3
    # The embedding's rows come by token; a tied embedding is read whole for the head alone.
    expected = [n for n in model.spec.weights if n != "model.embed_tokens.weight"]
    if model.spec.tied:
        expected.append("model.embed_tokens.weight")
    assert sorted(read) == sorted(expected)


def test_palettes_are_exact_in_the_runner_and_the_session(tmp_path, hugging_face, traced):
    """The quantized program gives what the float one gives on the tables' entries."""
    from quant.plans.rules import Recipe, Rule
    from quant.program.rewrite import quantize_program
    from quant.store.cached import new_store
    from quant.store.fill import fill_store
    from quant.store.store import WeightStore

    config = {**MISTRAL, "hidden_size": 40, "intermediate_size": 24, "vocab_size": 56}
    hugging_face.save(tmp_path, config)
    model = traced.model(tmp_path)
    rules = (
        Rule("embedding", "lut6-gc8"),
        Rule("head", "lut8-pt"),
        Rule("*down_proj*", "lut3-gc4"),
        Rule("*", "lut4-pt"),
    )
    shapes = model.weights.shapes()
    plan = Recipe("mine", "", rules).plan(shapes, model.weights.roles())
    plan.check(shapes)
    with new_store(tmp_path, "key", plan, shapes) as writer:
        fill_store(model.weights, plan, writer)
    store = WeightStore(tmp_path / "key")
    program = trace(model.spec, CONTEXT)

    def entries(given):
        """Plain NumPy from the layout's words: a stream of bits, the lowest first."""
        if "lut" not in store.extents(given.name):
            return store_reader(store)(given)
        lut = store.part(given.name, "lut").float().numpy()
        packed = store.part(given.name, "codes").numpy()
        bits = int(np.log2(lut.shape[1]))
        stream = np.unpackbits(packed, axis=1, bitorder="little").reshape(len(packed), -1, bits)
        codes = (stream * 2 ** np.arange(bits)).sum(-1)
        table = np.arange(len(packed)) * len(lut) // len(packed)
        return torch.from_numpy(lut[table[:, None], codes])

    tokens = traced.tokens(20, 56)
    blocks = [torch.from_numpy(tokens)]
    expected = next(ReferenceRunner(program, entries).logits(blocks))
    quantized = quantize_program(program, plan)
    found = next(ReferenceRunner(quantized, store_reader(store)).logits(blocks))
    assert torch.equal(found, expected)
    session = traced.ReferenceSession(quantized, store_reader(store))
    assert traced.difference(session.logits(tokens), expected.numpy()) < 1e-5
    plain = ReferenceRunner(program, lambda given: model.weights.float_weight(given.name))
    assert traced.difference(next(plain.logits(blocks)).numpy(), expected.numpy()) > 1e-4


def test_a_large_head_is_read_some_rows_at_a_time(opened, monkeypatch):
    model, _ = opened
    program = trace(model.spec, CONTEXT)
    asked = []

    def rows(name, tokens):
        asked.append(tokens.numel())
        return model.weights.float_rows(name, tokens)

    def reader(given):
        return model.weights.float_weight(given.name)

    block = torch.arange(20) % 53
    (whole,) = ReferenceRunner(program, reader, rows=rows).logits([block])
    assert asked == [20]  # the embedding's alone
    asked.clear()
    monkeypatch.setattr("edgeforge.reference.walk.LARGE_HEAD", 4 * 40 * 7)
    (found,) = ReferenceRunner(program, reader, rows=rows).logits([block])
    assert sum(asked) == 20 + 53 and max(asked[1:]) <= 7 * 40 // 36
    torch.testing.assert_close(found, whole, rtol=1e-6, atol=1e-6)
