"""What is told of a large vocabulary, counted by hand, and the recipes that spend more there."""

from __future__ import annotations

from edgeforge.planning.vocabulary import vocabulary_note
from quant.plans.recipes import RECIPES, VOCABULARY_RECIPES

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LAYER = "model.layers.0.mlp.down_proj.weight"
ROLES = {EMBEDDING: "embedding", HEAD: "head", LAYER: "linear", "model.norm.weight": "norm"}


def planned(recipe: str, vocabulary: int, tied: bool = True):
    shapes = {EMBEDDING: (vocabulary, 64), LAYER: (64, 6400), "model.norm.weight": (64,)}
    if not tied:
        shapes[HEAD] = (vocabulary, 64)
    roles = {name: ROLES[name] for name in shapes}
    plan = RECIPES[recipe].plan(shapes, roles)
    return {name: a.format.name for name, a in plan.weights.items()}, shapes


def test_a_large_vocabulary_is_told_with_what_eight_bits_would_take():
    formats, shapes = planned("int4", 64_000)
    assert formats[EMBEDDING] == "int4-g32"
    # 4 bits and a 16-bit scale for each 32 numbers; 8 bits and a 16-bit scale a row.
    taken, eight = 64_000 * 64 * 4.5 / 8, 64_000 * (64 + 2)
    told = vocabulary_note("int4", formats, shapes)
    assert told.startswith(f"the embedding, also the head, has 91% of the weights and {mb(taken)} ")
    assert f"8 bits would take {mb(eight - taken)} more: --recipe int4-vocab8" in told
    formats, shapes = planned("int4", 64_000, tied=False)
    told = vocabulary_note("int4-gptq", formats, shapes)
    assert told.startswith(f"embedding and head have 95% of the weights and {mb(2 * taken)} in")
    assert told.endswith(f"{mb(2 * (eight - taken))} more: --recipe int4-vocab8-gptq")


def mb(nbytes: float) -> str:
    return f"{nbytes / 1e6:.1f} MB"


def test_nothing_is_told_where_there_is_no_choice():
    assert vocabulary_note("int4", *planned("int4", 600)) == ""
    assert vocabulary_note("int8", *planned("int8", 64_000)) == ""
    assert vocabulary_note("int4", *planned("int4-vocab8", 64_000)) == ""


def test_the_recipes_differ_in_embedding_and_head_alone():
    for tied in (True, False):
        for name, other in VOCABULARY_RECIPES.items():
            (plain, _), (finer, _) = planned(name, 6400, tied), planned(other, 6400, tied)
            changed = {each for each in plain if plain[each] != finer[each]}
            assert changed == {EMBEDDING} | (set() if tied else {HEAD})
            assert {finer[each] for each in changed} == {"int8-pc"}
