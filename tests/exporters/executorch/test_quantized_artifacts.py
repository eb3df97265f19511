"""Integer artifacts: the program computes with the stored numbers, to the activations' 8 bits.

`test_stock_route` shows the same kinds of weight bit for bit against ExecuTorch's exporter.
"""

from __future__ import annotations

import numpy as np
import pytest

DIMS = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "num_hidden_layers": 1}
# Each token's activations are rounded to 8 bits over the whole row.
ROUNDED_ACTIVATIONS = 0.04


@pytest.mark.parametrize(
    ("format", "tied"),
    [
        ("int4-g32", True),
        ("int4-g64", False),
        ("int4-g128", True),
        ("int4-pc", False),
        ("int4-pc", True),
        ("int8-pc", True),
    ],
)
def test_the_program_computes_with_the_stored_numbers(
    pte, run_pte, llama_config, tokens, format, tied
):
    made = pte(llama_config(tie_word_embeddings=tied, **DIMS), format)
    wanted = made.quantized_logits(tokens[:40])
    unit = np.ptp(wanted)
    with run_pte(made.folder) as session:
        every = session.logits(tokens[:40])
        assert 1e-4 < np.abs(every - wanted).max() / unit < ROUNDED_ACTIVATIONS
        # In one piece, in runs, or token by token: the same numbers.
        assert np.abs(session.extend(tokens[:39]) - every[38]).max() < 1e-4 * unit
        assert np.abs(session.extend(tokens[39:40]) - every[39]).max() < 1e-4 * unit
    # They are far nearer to QUANTIZED than to FLOAT.
    from_float = np.sqrt(np.mean((every - made.float_logits(tokens[:40])) ** 2))
    from_quantized = np.sqrt(np.mean((every - wanted) ** 2))
    assert from_quantized < 0.5 * from_float or format == "int8-pc"


@pytest.mark.parametrize("format", ["int4-g32", "int8-pc", "int4-pc"])
def test_the_embedding_alone_is_exact(pte, run_pte, llama_config, tmp_path, tokens, format):
    recipe = tmp_path / "embedding.yaml"
    rules = f"- {{match: embedding, format: {format}}}\n- {{match: '*', format: fp32}}\n"
    recipe.write_text(rules)
    made = pte(llama_config(**DIMS), str(recipe))
    wanted = made.quantized_logits(tokens[:20])
    with run_pte(made.folder) as session:
        assert np.abs(session.logits(tokens[:20]) - wanted).max() < 2e-5 * np.ptp(wanted)


@pytest.mark.parametrize("format", ["int4-g32", "int4-g64", "int4-pc", "int8-pc"])
def test_small_heads_and_gated_products_keep_float32_activations(
    pte, run_pte, llama_config, tmp_path, tokens, format
):
    recipe = tmp_path / "small.yaml"
    recipe.write_text(
        f"- {{match: head, format: {format}}}\n"
        f"- {{match: '*down_proj*', format: {format}}}\n- {{match: '*', format: fp32}}\n"
    )
    made = pte(llama_config(**DIMS), str(recipe))
    wanted = made.quantized_logits(tokens[:20])
    with run_pte(made.folder) as session:
        assert np.abs(session.logits(tokens[:20]) - wanted).max() < 2e-5 * np.ptp(wanted)
        assert np.abs(session.extend(tokens[:20]) - wanted[19]).max() < 2e-5 * np.ptp(wanted)
