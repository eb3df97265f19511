"""Logits equal, bit for bit, those of a program that ExecuTorch's own exporter made."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from device_harness.executorch_worker import load_runtime
from exporters.executorch import lowering
from tests.oracles.executorch_stock import stock_pte

# Every kind of weight that the delegate knows, in one model.
MIXED = """
- {match: embedding, format: %s}
- {match: '*layers.0*qkv*', format: int4-g32}
- {match: '*layers.0*o_proj*', format: int4-pc}
- {match: '*layers.0*gate_up*', format: int8-pc}
- {match: '*layers.0*down*', format: fp32}
- {match: '*', format: int4-g64}
"""


def logits(file, tokens, name):
    method = load_runtime()._load_program(str(file)).load_method(name)
    rows, at = [], 0
    for size in (16, 1, 9, 14):
        piece = torch.from_numpy(tokens[at : at + size]).reshape(1, -1)
        rows.append(method([piece, torch.tensor([at])])[0].numpy()[0].copy())
        at += size
    return np.concatenate(rows)


@pytest.mark.parametrize(
    ("family", "embedding", "changes"),
    [
        ("llama", "int4-g32", {"tie_word_embeddings": False}),
        ("phi3", "int8-pc", {"head_dim": 32, "partial_rotary_factor": 0.5}),
    ],
    ids=["llama", "phi3"],
)
def test_equal_to_the_stock_route(
    pte, llama_config, phi3_config, tmp_path, monkeypatch, tokens, family, embedding, changes
):
    # The stock route has no product of 4-bit weights with float32 activations.
    monkeypatch.setattr(lowering, "SMALL", 0)
    recipe = tmp_path / "mixed.yaml"
    recipe.write_text(MIXED % embedding)
    make = {"llama": llama_config, "phi3": phi3_config}[family]
    made = pte(make(hidden_size=128, intermediate_size=192, **changes), str(recipe))
    stock = tmp_path / "stock.pte"
    stock.write_bytes(stock_pte(made.program, made.store, 16))
    wanted = logits(stock, tokens, "forward")
    found = logits(made.folder / "model.pte", tokens, "logits_all")
    assert wanted.shape == (40, 320) and np.ptp(wanted) > 1
    assert found.tobytes() == wanted.tobytes()
