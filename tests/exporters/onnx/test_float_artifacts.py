"""The float32 artifact of every family and every awkward dim gives FLOAT's logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from device_harness.errors import DeviceError
from device_harness.onnx_session import OnnxSession

CLOSE = 1e-4


def assert_close(found: np.ndarray, wanted: np.ndarray) -> None:
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() < CLOSE * np.ptp(wanted)


def test_every_position_and_prefill_then_decode_to_the_last(exported, tokens):
    session = OnnxSession(exported.folder, exported.manifest.context, 1)
    for length in (1, 40, 48):
        wanted = exported.float_logits(tokens[:length])
        assert_close(session.logits(tokens[:length]), wanted)
    assert_close(session.extend(tokens[:40]), wanted[39])
    for at in range(40, 48):
        assert_close(session.extend(tokens[at : at + 1]), wanted[at])
    with pytest.raises(DeviceError, match="49 tokens do not fit the artifact's context of 48"):
        session.extend(tokens[48:])
    # What was refused has changed nothing: the text can be begun anew.
    session.reset()
    assert_close(session.extend(tokens[:5]), wanted[4])


def test_a_prompt_in_chunks(exported_distinct, tokens):
    exported = exported_distinct
    session = OnnxSession(exported.folder, exported.manifest.context, 1)
    wanted = exported.float_logits(tokens[:48])
    at = 0
    for size in (10, 6, 1, 1, 9, 21):
        at += size
        assert_close(session.extend(tokens[at - size : at]), wanted[at - 1])
        # A text of its own in between leaves the caches as they were.
        if size == 6:
            session.logits(tokens[::-1][:11].copy())
    assert at == 48


def plain_run(
    graph: Path, rows: np.ndarray, mask: np.ndarray, past: list[np.ndarray] | None = None
) -> list[np.ndarray]:
    """What plain onnxruntime makes of a batch: logits, then the caches."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    caches = [v for v in session.get_inputs() if v.name.startswith("past_key_values.")]
    if past is None:
        past = [np.zeros((len(rows), v.shape[1], 0, v.shape[3]), np.float32) for v in caches]
    feeds = {v.name: cache for v, cache in zip(caches, past, strict=True)}
    return session.run(None, {"input_ids": rows, "attention_mask": mask, **feeds})


@pytest.mark.parametrize("graph", ["model.onnx", "verify.onnx"])
def test_a_batch_gives_what_its_rows_give_alone(exported_distinct, tokens, graph):
    path = exported_distinct.folder / graph
    both = np.stack([tokens[:20], tokens[20:40]])
    mask = np.ones((2, 20), np.int64)
    together = plain_run(path, both, mask)
    alone = [plain_run(path, both[i : i + 1], mask[:1]) for i in range(2)]
    for index, value in enumerate(together):
        assert_close(value, np.concatenate([rows[index] for rows in alone]))
    step, mask = np.array([[3], [5]]), np.ones((2, 21), np.int64)
    decoded = plain_run(path, step, mask, together[1:])[0]
    for i in range(2):
        wanted = plain_run(path, step[i : i + 1], mask[:1], alone[i][1:])[0]
        assert_close(decoded[i : i + 1], wanted)


def test_a_batch_of_unequal_prompts_padded_on_the_right(exported_distinct, tokens):
    exported = exported_distinct
    path = exported.folder / "verify.onnx"
    rows = np.stack([tokens[:20], np.r_[tokens[20:32], np.zeros(8, np.int64)]])
    mask = np.ones((2, 20), np.int64)
    mask[1, 12:] = 0
    logits, *caches = plain_run(path, rows, mask)
    short = np.r_[tokens[20:32], 5]
    assert_close(logits[1, :12], exported.float_logits(short)[:12])
    # The next token goes where the row's own text ended.
    mask = np.ones((2, 21), np.int64)
    mask[1, 13:] = 0
    logits = plain_run(path, np.array([[3], [5]]), mask, caches)[0]
    assert_close(logits[0, 0], exported.float_logits(np.r_[tokens[:20], 3])[20])
    assert_close(logits[1, 0], exported.float_logits(short)[12])


def padded_on_the_right(rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """A batch of unequal rows and its mask; the padding is a token like any other."""
    longest = max(map(len, rows))
    ids = np.stack([np.r_[row, np.full(longest - len(row), 7)] for row in rows])
    mask = np.stack([np.arange(longest) < len(row) for row in rows]).astype(np.int64)
    return ids, mask


def test_each_row_of_a_padded_batch_gives_its_own_last_token(exported_distinct, tokens):
    exported = exported_distinct
    path = exported.folder / "model.onnx"
    rows = [tokens[:20], tokens[20:32], tokens[32:33], tokens[5:25]]
    ids, mask = padded_on_the_right(rows)
    logits, *caches = plain_run(path, ids, mask)
    assert logits.shape == (4, 1, exported.model.spec.vocab_size)
    for row, found in zip(rows, logits, strict=True):
        assert_close(found[0], exported.float_logits(row)[-1])
    # Each row goes on where its own text ended.
    for step in ([3, 5, 2, 9], [11, 6, 4, 8]):
        rows = [np.r_[row, token] for row, token in zip(rows, step, strict=True)]
        mask = padded_on_the_right(rows)[1]
        logits, *caches = plain_run(path, np.array(step)[:, None], mask, caches)
        for row, found in zip(rows, logits, strict=True):
            assert_close(found[0], exported.float_logits(row)[-1])


@pytest.mark.parametrize("graph", ["model.onnx", "verify.onnx"])
def test_a_row_padded_on_the_left_is_refused(exported_distinct, tokens, graph):
    """The attention kernel counts tokens from the left: it would attend to the padding."""
    path = exported_distinct.folder / graph
    ids, mask = np.stack([tokens[:9], tokens[9:18]]), np.ones((2, 9), np.int64)
    caches = plain_run(path, ids, mask)[1:]
    mask[1, 0] = 0
    with pytest.raises(Exception, match=r"seqlens_k\[1\] = -1 is out of range"):
        plain_run(path, ids, mask)
    mask = np.ones((2, 10), np.int64)
    mask[1, 0] = 0
    with pytest.raises(Exception, match=r"seqlens_k\[1\] = -1 is out of range"):
        plain_run(path, ids[:, :1], mask, caches)
