"""`--draft-positions`: the last few tokens' logits, from a graph of its own, on every target."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from device_harness.errors import DeviceError
from device_harness.registry import open_session
from edgeforge.generation.drafters import PromptLookup
from edgeforge.generation.sampling import Generation
from edgeforge.generation.speculation import SpeculativeGeneration
from edgeforge.verification.meaning.check import check_meaning
from exporters.errors import ExportError
from exporters.manifest import Manifest
from exporters.options import TargetOptions
from exporters.registry import find_target
from tests.exporters.conftest import CASES, CONTEXT

POSITIONS = 4
DRAFTS = TargetOptions(draft_positions=POSITIONS)
TARGETS = ("onnx", "executorch", "coreml")
# Core ML's arithmetic is float16, in the interpreter as on a phone.
NEAR = {"onnx": 1e-5, "executorch": 1e-5, "coreml": 5e-3}


@pytest.fixture(scope="module", params=TARGETS)
def drafted(request, build, llama_config):
    """A model with a graph for drafts."""
    return build(llama_config(), "fp32", target=request.param, asked=DRAFTS)


@pytest.fixture
def session(drafted):
    with open_session(drafted.folder, drafted.manifest, 1) as opened:
        opened.use_drafts(True)
        yield opened


def near(drafted, found, wanted) -> bool:
    limit = NEAR[drafted.manifest.target] * np.ptp(wanted)
    return found.shape == wanted.shape and float(np.abs(found - wanted).max()) < limit


def test_each_token_of_a_draft_gets_its_logits(drafted, session, tokens):
    wanted = drafted.quantized_logits(tokens[:CONTEXT])
    assert near(drafted, session.extend(tokens[:9]), wanted[8])
    done = 9
    for count in (4, 1, 3, 2, 4):
        part = tokens[done : done + count]
        assert near(drafted, session.extend_draft(part), wanted[done : done + count])
        done += count


def test_a_refused_draft_leaves_nothing_behind(drafted, session, tokens):
    wanted = drafted.quantized_logits(tokens[:CONTEXT])
    session.extend(tokens[:9])
    session.extend_draft(tokens[[9, 40, 41, 42]])
    session.rewind(10)
    assert near(drafted, session.extend_draft(tokens[10:12]), wanted[10:12])
    session.extend_draft(tokens[[40, 41]])
    session.rewind(12)
    assert near(drafted, session.extend(tokens[12:13]), wanted[12])
    # All of the text can be taken back, and begun anew.
    session.rewind(0)
    assert near(drafted, session.extend(tokens[:30]), wanted[29])
    with pytest.raises(DeviceError, match="a text of 30 tokens cannot go back to 31"):
        session.rewind(31)


@pytest.mark.parametrize("before", range(CONTEXT - POSITIONS - 1, CONTEXT))
def test_drafts_reach_the_contexts_last_position_and_no_further(drafted, session, tokens, before):
    wanted = drafted.quantized_logits(tokens[:CONTEXT])
    session.extend(tokens[:before])
    count = min(POSITIONS, CONTEXT - before)
    found = session.extend_draft(tokens[before : before + count])
    assert near(drafted, found, wanted[before : before + count])
    more = CONTEXT - before - count + 1
    with pytest.raises(DeviceError, match="do not fit the artifact's context of 48"):
        session.extend_draft(np.zeros(more, np.int64))


def test_what_is_said_of_it(drafted, session, tokens):
    manifest = drafted.manifest
    assert manifest.draft_positions == POSITIONS and manifest.can_rewind
    assert manifest.options == {"draft_positions": POSITIONS}
    named = [name for name in manifest.outputs if "draft" in name]
    assert len(named) == 1
    assert sum("draft" in note for note in manifest.notes) == 1
    (fact,) = [
        check
        for check in check_meaning(drafted.folder, manifest, drafted.model)
        if check.name == "meaning.draft"
    ]
    assert fact.verdict == "passed"
    too_many = 1 + POSITIONS
    with pytest.raises(DeviceError, match=f"{POSITIONS} positions a call.* has {too_many}"):
        session.extend_draft(tokens[:too_many])


def test_greedy_text_is_that_of_plain_decoding(drafted, tokens):
    folder, manifest = drafted.folder, drafted.manifest
    prompts = ([5, 6, 7, 5, 6], tokens[:20].tolist(), [9] * 12)
    with open_session(folder, manifest, 1) as plain, open_session(folder, manifest, 1) as other:
        for prompt in prompts:
            wanted = list(Generation(plain, prompt, 40, frozenset()))
            # One who guesses, too: random text repeats itself less than text does.
            for drafter in (PromptLookup(), Oracle([*prompt, *wanted])):
                run = SpeculativeGeneration(
                    other, prompt, 40, frozenset(), drafter=drafter, draft=POSITIONS - 1
                )
                assert list(run) == wanted
                told = run.result()
            assert told.accepted > 0.4 * len(wanted)
            assert told.apart is not None and told.apart < NEAR[manifest.target] * 50


class Oracle:
    """Knows the text, but for every ninth token."""

    def __init__(self, text: list[int]) -> None:
        self._text = text

    def propose(self, text, most):
        start = len(text)
        return [
            token if at % 9 else (token + 1) % 300
            for at, token in enumerate(self._text[start : start + most], start)
        ]


@pytest.mark.parametrize("stated", [3, 5, 8])
def test_another_number_than_the_manifest_states_is_found(drafted, stated):
    other = replace(drafted.manifest, options={"draft_positions": stated})
    failed = [
        check.message
        for check in check_meaning(drafted.folder, other, drafted.model)
        if check.verdict == "failed"
    ]
    assert len(failed) == 1 and f"gives the logits of 4 positions, not of {stated}" in failed[0]


@pytest.mark.parametrize("target", TARGETS)
def test_an_artifact_without_a_graph_for_drafts(target, build, llama_config, tokens):
    made = build(llama_config(), "fp32", target=target)
    assert made.manifest.draft_positions == 1
    with open_session(made.folder, made.manifest, 1) as plain:
        wanted = plain.extend(tokens[:5])
        with pytest.raises(DeviceError, match="no graph for drafts: export it with --draft-posit"):
            plain.use_drafts(True)
        plain.use_drafts(False)
        assert (plain.extend(tokens[:5]) == wanted).all()
    # A manifest that promises one which the files lack is found.
    promised = replace(made.manifest, options={"draft_positions": POSITIONS})
    failed = [c for c in check_meaning(made.folder, promised, made.model) if c.verdict == "failed"]
    assert [check.name for check in failed] == ["meaning.draft"]
    assert "there is no graph for drafts" in failed[0].message


@pytest.mark.parametrize("target", TARGETS)
def test_the_graphs_that_others_run_are_the_same_bytes(target, build, llama_config, tokens):
    plain = build(llama_config(), "fp32", target=target)
    drafted = build(llama_config(), "fp32", target=target, asked=DRAFTS)
    if target == "onnx":
        for name in ("model.onnx", "verify.onnx", "model.onnx.data", "genai_config.json"):
            given = [(made.folder / name).read_bytes() for made in (plain, drafted)]
            assert given[0] == given[1], name
        assert (drafted.folder / "draft.onnx").is_file()
    else:
        grown = weight_bytes(drafted.folder) - weight_bytes(plain.folder)
        assert 0 < grown < 0.2 * weight_bytes(plain.folder)  # no weight is there twice
    with (
        open_session(plain.folder, plain.manifest, 1) as one,
        open_session(drafted.folder, drafted.manifest, 1) as other,
    ):
        assert (one.extend(tokens[:9]) == other.extend(tokens[:9])).all()


def weight_bytes(folder: Path) -> int:
    return sum(record.size for record in Manifest.read(folder).files.values())


def test_drafts_within_a_window_and_behind_a_last_layer_of_its_own(build, tokens):
    for case in ("mistral-window-7", "openelm-uneven", "phi3-half-rotary-head-40"):
        for target in TARGETS:
            made = build(CASES[case], "fp32", target=target, asked=DRAFTS)
            wanted = made.quantized_logits(tokens[:20])
            with open_session(made.folder, made.manifest, 1) as session:
                session.use_drafts(True)
                session.extend(tokens[:16])
                assert near(made, session.extend_draft(tokens[16:20]), wanted[16:20])


def test_a_padded_batch_gets_each_rows_own_last_tokens(build, llama_config, tokens):
    import onnxruntime

    made = build(llama_config(), "fp32", target="onnx", asked=DRAFTS)
    graph = onnxruntime.InferenceSession(str(made.folder / "draft.onnx"))
    lengths, width = (9, 6, 2), 9
    ids, mask = np.zeros((3, width), np.int64), np.zeros((3, width), np.int64)
    for row, length in enumerate(lengths):
        ids[row, :length], mask[row, :length] = tokens[:length], 1
    feeds = {"input_ids": ids, "attention_mask": mask}
    for value in graph.get_inputs():
        if value.name.startswith("past_"):
            feeds[value.name] = np.zeros((3, value.shape[1], 0, value.shape[3]), np.float32)
    (logits,) = graph.run(["logits"], feeds)
    wanted = made.quantized_logits(tokens[:width])
    assert near(made, logits[0], wanted[5:9])
    assert near(made, logits[1], wanted[2:6])
    # A row of fewer tokens repeats its first one in front.
    assert near(made, logits[2], wanted[[0, 0, 0, 1]])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("positions", [0, 1, 49, 65, 100000])
def test_numbers_that_no_graph_is_for(target, positions, build, llama_config):
    words = rf"--draft-positions {positions} is not possible: .* of 2 to 48 positions"
    with pytest.raises(ExportError, match=words):
        build(llama_config(), "fp32", target=target, asked=TargetOptions(draft_positions=positions))


def test_what_excludes_drafts_says_so(build, llama_config):
    with pytest.raises(ExportError, match=r"--draft-positions needs a function of its own.*ios18"):
        asked = TargetOptions(draft_positions=4, opset="ios17")
        build(llama_config(), "fp16", target="coreml", asked=asked)
    with pytest.raises(ExportError, match=r"--draft-positions needs EdgeForge's own lowering"):
        asked = TargetOptions(draft_positions=4, lowering="stock")
        build(llama_config(), "fp32", target="executorch", asked=asked)


def test_every_target_takes_the_option():
    for target in TARGETS:
        assert "draft_positions" in find_target(target).options
