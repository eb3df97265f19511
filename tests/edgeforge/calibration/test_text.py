"""The calibration text: which sequences are drawn, and which texts are refused."""

from __future__ import annotations

import json
from copy import copy
from dataclasses import replace
from pathlib import Path

import pytest

from edgeforge.calibration import text
from edgeforge.calibration.text import (
    OVERLAP_TOKENS,
    Calibration,
    CalibrationOptions,
    CalibrationRun,
    calibration_for,
    draw_calibration,
)
from edgeforge.errors import CheckpointError, UsageError
from edgeforge.model.model import CALIBRATION_TEXT, CONVERSATIONS, HELDOUT, Model, open_model
from edgeforge.model.trace import trace
from edgeforge.synth.synthesise import synthesise
from edgeforge.tokenizer import Tokenizer
from quant.plans.recipes import find_recipe


@pytest.fixture(scope="module")
def demo() -> Model:
    return open_model("demo")


@pytest.fixture(scope="module")
def tokenizer(demo) -> Tokenizer:
    return Tokenizer(demo.checkpoint.tokenizer_files["tokenizer.json"], "demo")


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf-8")
    return str(path)


def plan(model: Model, recipe: str):
    return find_recipe(recipe).plan(model.weights.shapes(), model.weights.roles())


def test_sequences_are_pieces_of_the_text_and_the_seed_decides_which(demo, tokenizer):
    options = CalibrationOptions(tokens=20 * 128, length=128, seed=3)
    drawn = draw_calibration(demo, options, 1024)
    assert drawn.source == "demo" and drawn.tokens == 2560 and drawn.notes == ()
    assert len(drawn.blocks) == 20 and {len(block) for block in drawn.blocks} == {128}
    text = tokenizer.encode(CALIBRATION_TEXT.read_text(encoding="utf-8"), special=False)
    pieces = {tuple(text[at : at + 127]) for at in range(len(text) - 126)}
    assert all(block[0] == demo.spec.bos and block[1:] in pieces for block in drawn.blocks)
    assert len(set(drawn.blocks)) == 20
    assert draw_calibration(demo, options, 1024) == drawn
    other = draw_calibration(demo, CalibrationOptions(tokens=2560, length=128, seed=4), 1024)
    assert other.digest != drawn.digest


def test_small_models_take_less_text_by_default(demo, monkeypatch):
    drawn = draw_calibration(demo, CalibrationOptions(), 1024)
    assert (drawn.tokens, drawn.length, len(drawn.blocks)) == (8192, 256, 32)
    monkeypatch.setattr(text, "QUICK_PARAMETERS", demo.spec.num_parameters)
    drawn = draw_calibration(demo, CalibrationOptions(), 1024)
    assert (drawn.tokens, drawn.length) == (32768, 256)


def test_no_sequence_is_longer_than_the_context(demo):
    drawn = draw_calibration(demo, CalibrationOptions(tokens=640, length=512), 64)
    assert drawn.length == 64 and {len(block) for block in drawn.blocks} == {64}


def test_what_a_manifest_keeps_draws_the_same_again(demo):
    drawn = draw_calibration(demo, CalibrationOptions(tokens=512, length=64, seed=9), 64)
    recorded = Calibration.recorded(drawn.record())
    assert recorded.blocks is None and recorded.digest == drawn.digest
    assert recorded.drawn(demo, 64) == drawn
    changed = Calibration.recorded(replace(drawn.record(), digest="0" * 64))
    with pytest.raises(UsageError, match="the calibration text demo is not the one"):
        changed.drawn(demo, 64)


def test_text_that_evaluation_is_made_on_is_refused(demo, tokenizer, tmp_path):
    own = CALIBRATION_TEXT.read_text(encoding="utf-8")[:40_000]
    heldout = tokenizer.encode(HELDOUT.read_text(encoding="utf-8"), special=False)
    options = {"tokens": 1024, "length": 64}
    # What lies between two words is tokenized alike in both texts.
    passage = tokenizer.decode(heldout[5000 : 5000 + 2 * OVERLAP_TOKENS])
    path = written(tmp_path, own + "\n\n" + passage)
    with pytest.raises(UsageError, match="shares a passage with the held-out text"):
        draw_calibration(demo, CalibrationOptions(path, **options), 64)
    few = tokenizer.decode(heldout[5000 : 5000 + OVERLAP_TOKENS - 4])
    path = written(tmp_path, own + "\n\n" + few)
    assert draw_calibration(demo, CalibrationOptions(path, **options), 64).blocks


def test_the_text_that_ships_serves_a_tokenizer_of_bytes(tmp_path):
    tiny = open_model(str(synthesise("tiny-llama", tmp_path / "tiny")))
    assert draw_calibration(tiny, CalibrationOptions(tokens=512, length=64), 64).blocks


def test_a_short_text_is_refused_and_says_what_it_has(demo, tmp_path):
    path = written(tmp_path, "Some words that make a text.")
    with pytest.raises(
        UsageError, match=r"has \d+ tokens, but 8160 are wanted.*--calibration-tokens"
    ):
        draw_calibration(demo, CalibrationOptions(path), 1024)


def test_one_repeated_token_is_said(demo, tmp_path):
    path = written(tmp_path, "\n" + " the" * 400)
    drawn = draw_calibration(demo, CalibrationOptions(path, tokens=128, length=32), 1024)
    (note,) = drawn.notes
    assert "1 distinct token:" in note and "singular" in note


def test_options_that_make_no_sequence_are_refused(demo):
    with pytest.raises(UsageError, match="make no sequence"):
        draw_calibration(demo, CalibrationOptions(tokens=100, length=512), 1024)
    with pytest.raises(UsageError, match="make no sequence"):
        draw_calibration(demo, CalibrationOptions(tokens=100, length=1), 1024)


def test_tokens_outside_the_vocabulary_are_refused(tmp_path):
    folder = synthesise("tiny-llama", tmp_path / "tiny")
    small = open_model(str(folder), tokenizer="edgeforge/demo")
    if small.spec.vocab_size >= 3072:
        pytest.fail("the tiny model must have fewer tokens than the demo's tokenizer")
    with pytest.raises(UsageError, match=r"gives token \d+, but the model has"):
        draw_calibration(small, CalibrationOptions(), 64)


def test_a_checkpoint_without_tokenizer_is_refused(tmp_path):
    folder = synthesise("tiny-llama", tmp_path / "tiny")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    bare = open_model(str(folder))
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        draw_calibration(bare, CalibrationOptions(), 64)


def test_only_recipes_that_calibrate_take_a_text(demo):
    assert calibration_for(plan(demo, "int4"), demo, CalibrationOptions(), 64) is None
    with pytest.raises(UsageError, match="recipe int4 uses no activations"):
        calibration_for(plan(demo, "int4"), demo, CalibrationOptions("demo"), 64)
    drawn = calibration_for(
        plan(demo, "int4-gptq"), demo, CalibrationOptions(tokens=64, length=64), 64
    )
    assert drawn is not None and drawn.source == "demo"


def test_sequences_of_the_model_itself_are_written_when_they_are_needed(demo, tmp_path):
    options = CalibrationOptions("self", tokens=100, length=16, seed=2)
    planned = draw_calibration(demo, options, 64)
    assert (planned.source, planned.tokens, planned.length) == ("self", 96, 16)
    assert planned.blocks is None and planned.chats == 0
    seeds = draw_calibration(demo, replace(options, seed=3), 64)
    assert seeds.digest != planned.digest
    program = trace(demo.spec, 64)
    told = []
    run = CalibrationRun(demo, planned, lambda: program)
    made = run.sequences(lambda *report: told.append(report))
    assert len(made.blocks) == 6 and {len(block) for block in made.blocks} == {16}
    assert {block[0] for block in made.blocks} == {demo.spec.bos}
    assert told[-1] == ("write sequences", 16, 16)
    again = CalibrationRun(demo, Calibration.recorded(made.record()), lambda: program)
    assert again.sequences() == made
    other = Calibration.recorded(replace(made.record(), digest="0" * 64))
    with pytest.raises(UsageError, match="in the way of another version of EdgeForge"):
        CalibrationRun(demo, other, lambda: program).sequences()


def test_sequences_of_the_model_itself_need_no_tokenizer_and_no_more_memory_than_there_is(
    demo, monkeypatch, tmp_path
):
    folder = synthesise("tiny-llama", tmp_path / "tiny")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    bare = open_model(str(folder))
    planned = draw_calibration(bare, CalibrationOptions("self", tokens=64, length=8), 64)
    program = trace(bare.spec, 64)
    blocks = CalibrationRun(bare, planned, lambda: program).sequences().blocks
    assert len(blocks) == 8 and len({block[0] for block in blocks}) > 1
    monkeypatch.setattr(text, "_LARGEST_WRITER", 4 * demo.spec.num_parameters - 1)
    with pytest.raises(UsageError, match="in memory in float32 while it writes"):
        draw_calibration(demo, CalibrationOptions("self"), 64)


def test_a_file_named_self_is_a_text(demo, tmp_path, monkeypatch):
    (tmp_path / "self").write_text(CALIBRATION_TEXT.read_text("utf-8"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    drawn = draw_calibration(demo, CalibrationOptions("self", tokens=512, length=64), 64)
    assert drawn.source == str(tmp_path / "self") and drawn.blocks


def with_template(demo: Model, folder: Path, template: str) -> Model:
    """The demo model with a chat template of its own."""
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": template}), encoding="utf-8")
    checkpoint = copy(demo.checkpoint)
    checkpoint.tokenizer_files = {**checkpoint.tokenizer_files, config.name: config}
    return replace(demo, checkpoint=checkpoint)


def test_a_quarter_of_the_sequences_are_conversations_where_the_model_has_a_template(
    demo, tokenizer, tmp_path
):
    model = with_template(
        demo, tmp_path, "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    )
    options = CalibrationOptions(tokens=20 * 128, length=128)
    plain, drawn = (draw_calibration(each, options, 1024) for each in (demo, model))
    assert (plain.chats, drawn.chats, drawn.tokens) == (0, 5, 2560)
    assert drawn.blocks[:15] == plain.blocks[:15] and drawn.digest != plain.digest
    first = json.loads(CONVERSATIONS.read_text(encoding="utf-8"))[0]
    assert tokenizer.decode(drawn.blocks[15]).lstrip().startswith(f"[user] {first[0]}")
    assert Calibration.recorded(drawn.record()).drawn(model, 1024) == drawn
    without = draw_calibration(model, replace(options, chats=False), 1024)
    assert without == plain
    assert Calibration.recorded(without.record()).drawn(model, 1024) == without
    own = replace(options, source=written(tmp_path, CALIBRATION_TEXT.read_text("utf-8")))
    assert draw_calibration(model, own, 1024).chats == 0


def test_a_template_that_cannot_be_used_leaves_the_text_and_a_note(demo, tmp_path):
    model = with_template(demo, tmp_path, "{{ raise_exception('no') }}")
    drawn = draw_calibration(model, CalibrationOptions(tokens=1024, length=128), 1024)
    assert (
        drawn.chats == 0
        and drawn.blocks
        == draw_calibration(demo, CalibrationOptions(tokens=1024, length=128), 1024).blocks
    )
    assert len(drawn.notes) == 1 and "no conversation" in drawn.notes[0]


def test_the_conversations_are_not_those_of_the_benchmarks():
    benchmark = Path(__file__).parents[3] / "benchmarks" / "conversations.json"
    ours, theirs = (
        {turn for turns in json.loads(file.read_text(encoding="utf-8")) for turn in turns}
        for file in (CONVERSATIONS, benchmark)
    )
    assert len(ours) > 60 and not ours & theirs
