"""Rows of tables that list weights."""

from __future__ import annotations

from edgeforge.cli.weight_rows import weight_rows
from exporters.manifest_records import WeightRecord


def record(error: float, format: str = "int4-g32") -> WeightRecord:
    return WeightRecord((64, 32), format, "rtn", error, "digest")


def test_experts_of_attention_have_rows_of_their_own():
    weights = {}
    for part, places in (("mlp", ("down_proj",)), ("self_attn", ("q_proj", "o_proj"))):
        for place in places:
            for expert in range(4):
                name = f"model.layers.0.{part}.experts.{expert}.{place}.weight"
                weights[name] = record(0.1)
    assert [row[0] for row in weight_rows(weights)] == [
        "model.layers.0.mlp.experts.{0-3}.down_proj.weight",
        "model.layers.0.self_attn.experts.{0-3}.q_proj.weight",
        "model.layers.0.self_attn.experts.{0-3}.o_proj.weight",
    ]


def test_experts_that_are_stored_alike_share_a_row():
    at = "model.layers.0.mlp.experts."
    weights = {"lm_head.weight": record(0.0, "float16")}
    for expert in range(5):
        weights[f"{at}{expert}.gate_up_proj.weight"] = record(0.1 + expert / 100)
        weights[f"{at}{expert}.down_proj.weight"] = record(0.1, "int8-pc" if expert == 2 else "x")
    weights["model.layers.1.mlp.experts.0.down_proj.weight"] = record(0.5)
    rows = weight_rows(weights)
    assert rows == [
        ("lm_head.weight", "64 x 32", "float16", "rtn", "exact"),
        (f"{at}{{0-4}}.gate_up_proj.weight", "64 x 32", "int4-g32", "rtn", "1.00e-01 to 1.40e-01"),
        (f"{at}{{0-1, 3-4}}.down_proj.weight", "64 x 32", "x", "rtn", "1.00e-01"),
        (f"{at}2.down_proj.weight", "64 x 32", "int8-pc", "rtn", "1.00e-01"),
        ("model.layers.1.mlp.experts.0.down_proj.weight", "64 x 32", "int4-g32", "rtn", "5.00e-01"),
    ]
