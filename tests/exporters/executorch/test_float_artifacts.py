"""Float artifacts of every family and every awkward dim give FLOAT's logits."""

from __future__ import annotations

import numpy as np
import pytest

from device_harness.errors import DeviceError

CLOSE = 2e-5


def assert_close(found: np.ndarray, wanted: np.ndarray) -> None:
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() < CLOSE * np.ptp(wanted)


def test_a_text_in_pieces_to_the_last_position(case, pte, run_pte, tokens):
    made = pte(case)
    wanted = made.float_logits(tokens[:48])
    with run_pte(made.folder) as session:
        assert_close(session.logits(tokens[:48]), wanted)
        at = 0
        for size in (21, 9, 1, 1, 15, 1):
            at += size
            assert_close(session.extend(tokens[at - size : at]), wanted[at - 1])
            # A text of its own in between leaves the caches as they were.
            if size == 9:
                session.logits(tokens[::-1][:11].copy())
        assert at == 48
        with pytest.raises(DeviceError, match="49 tokens do not fit the artifact's context of 48"):
            session.extend(tokens[48:])
        # Beginning anew needs no clearing: nothing of the old text is seen.
        session.reset()
        assert_close(session.extend(tokens[:5]), wanted[4])


@pytest.mark.parametrize("format", ["fp16", "bf16"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layers", [1, 2])  # of one, the embedding's last row is selected
def test_narrow_weights_are_computed_with_in_float32(
    pte, run_pte, llama_config, tokens, format, tied, layers
):
    made = pte(llama_config(tie_word_embeddings=tied, num_hidden_layers=layers), format)
    wanted = made.quantized_logits(tokens[:20])
    with run_pte(made.folder) as session:
        assert_close(session.logits(tokens[:20]), wanted)
        assert_close(session.extend(tokens[:20]), wanted[19])
    # They are not what the float32 weights give.
    assert np.abs(wanted - made.float_logits(tokens[:20])).max() > CLOSE * np.ptp(wanted)
