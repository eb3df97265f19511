"""The gate on whole artifacts: what is verified again, what fails, and what is left alone."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from edgeforge import api
from edgeforge.errors import UsageError
from edgeforge.gate import latency
from edgeforge.gate.baseline import Baseline, read_baseline
from edgeforge.gate.gate import GateOptions, check
from edgeforge.gate.result import GateFailed
from edgeforge.verification import verify as verification
from edgeforge.verification.bounds import Checked
from exporters.manifest import Manifest
from quant.sealed_json import seal, unseal


@pytest.fixture
def verified(monkeypatch):
    """The folders that are verified, in order."""
    folders: list[str] = []
    real = verification.verify_together

    def noted(given, *rest):
        folders.extend(each.name for each in given)
        return real(given, *rest)

    monkeypatch.setattr(verification, "verify_together", noted)
    return folders


def flip(path: Path, place: int = -1) -> None:
    """Changes one byte of a file."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def messages(result) -> list[str]:
    return [finding.message for _, finding in result.violations]


def test_a_fresh_report_is_taken_as_it_is(gate, verified):
    result = gate("int8", "int4-g32")
    assert result.passed and not verified
    assert [each.fresh for each in result.artifacts] == [True, True]
    assert {each.metric for each in result.artifacts[0].findings} >= {
        "total.kl_mean",
        "lowering.kl_mean",
    }


def test_a_stale_report_is_made_anew_and_holds_then(gate, room, verified):
    manifest = room / "int8" / "edgeforge.json"
    # A space more is the same JSON.
    manifest.write_bytes(manifest.read_bytes().replace(b" ", b"  ", 1))
    result = gate()
    assert result.passed and verified == ["int8"]
    assert result.artifacts[0].verified_because == ("edgeforge.json changed",)
    verified.clear()
    assert gate().artifacts[0].fresh and not verified


def test_one_changed_byte_of_any_file_of_the_artifact_is_a_violation(gate, room, verified):
    names = Manifest.read(room / "int8").files
    assert {"model.onnx", "tokenizer.json", "config.json"} <= names.keys()
    for name in names:
        flip(room / "int8" / name)
        result = gate()
        assert messages(result) == [f"{name} was changed after it was written: its SHA-256 differs"]
        assert [each.metric for each in result.artifacts[0].failed] == ["files"]
        flip(room / "int8" / name)
    assert gate().passed and not verified


def test_a_changed_artifact_does_not_keep_the_others_from_their_check(gate, room, verified):
    flip(room / "int8" / "model.onnx")
    (room / "int4-g32" / "report.json").unlink()
    result = gate("int8", "int4-g32")
    assert [bool(each.failed) for each in result.artifacts] == [True, False]
    assert verified == ["int4-g32"]


def test_other_integers_under_a_refreshed_manifest_are_a_violation(gate, room, verified):
    manifest = json.loads((room / "int8" / "edgeforge.json").read_text())
    name = next(iter(manifest["weights"]))
    manifest["weights"][name]["digest"] = "0" * 64
    (room / "int8" / "edgeforge.json").write_text(json.dumps(manifest))
    (room / "int4-g32" / "report.json").unlink()
    result = gate("int8", "int4-g32")
    assert [each.metric for each in result.artifacts[0].failed] == ["stored_weights"]
    assert name in messages(result)[0]
    assert not result.artifacts[1].failed and result.artifacts[1].measured_on


def test_another_checkpoint_is_refused(gate, build, room):
    copy = shutil.copytree(build / "model", room / "model")
    assert gate(checkpoint=str(copy)).artifacts[0].fresh
    flip(copy / "model.safetensors")
    with pytest.raises(UsageError, match="is not the checkpoint that the artifact was made of"):
        gate(checkpoint=str(copy))


def test_a_figure_beyond_its_bound_fails_and_says_which(gate, room, verified):
    (room / "edgeforge-policy.yaml").write_text(
        "version: 1\ntext: held.txt\ntokens: 1024\n"
        "bounds: {size.bytes: {at_most: 1kB}}\n"
        "rules:\n"
        "  - match: {recipe: int4*}\n    bounds: {total.kl_mean: {at_most: 0.000001}}\n"
    )
    result = gate("int8", "int4-g32")
    assert not verified
    one, other = result.artifacts
    assert [each.metric for each in one.failed] == ["size.bytes"]
    assert [each.metric for each in other.failed] == ["size.bytes", "total.kl_mean"]
    found = other.failed[1]
    assert found.low is not None and found.low <= found.value <= found.high
    assert (found.limit, found.source) == (1e-6, "rule 1 (recipe int4*)")


def test_a_bound_inside_the_interval_is_doubtful_and_no_violation(gate, room):
    middle = gate().artifacts[0]
    value = next(each.value for each in middle.findings if each.metric == "total.kl_mean")
    (room / "edgeforge-policy.yaml").write_text(
        "version: 1\ntext: held.txt\ntokens: 1024\n"
        f"bounds: {{total.kl_mean: {{at_most: {value * 0.9999}}}}}\n"
    )
    (found,) = (e for e in gate().artifacts[0].findings if e.metric == "total.kl_mean")
    assert found.outcome == "doubtful"
    assert "tokens would settle it" in found.message


def test_a_bound_of_a_figure_that_was_not_measured_does_not_pass(gate, room):
    (room / "edgeforge-policy.yaml").write_text(
        "version: 1\ntext: held.txt\ntokens: 1024\nbounds: {size.growth: {at_most: 1.1}}\n"
    )
    assert messages(gate()) == ["size.growth must be at most 1.1, and there is no baseline"]


def test_a_worse_model_is_a_regression_and_the_same_one_is_none(gate, room, verified):
    shutil.copytree(room / "int8", room / "model")
    assert gate("model", baseline=Path("b.json"), update_baseline=True).baseline_updated
    assert gate("model", baseline=Path("b.json")).passed
    shutil.rmtree(room / "model")
    shutil.copytree(room / "int4-g32", room / "model")
    result = gate("model", baseline=Path("b.json"))
    metrics = [each.metric for each in result.artifacts[0].failed]
    assert "total.kl_mean" in metrics
    assert "the recipe was int8 and is int4-g32" in messages(result)[0]
    # The other way round, nothing got worse.
    gate("model", baseline=Path("b4.json"), update_baseline=True)
    shutil.rmtree(room / "model")
    shutil.copytree(room / "int8", room / "model")
    assert gate("model", baseline=Path("b4.json")).passed
    assert not verified


def test_growth_is_held_against_the_baseline(gate, room):
    shutil.copytree(room / "int4-g32", room / "model")
    gate("model", baseline=Path("b.json"), update_baseline=True)
    shutil.rmtree(room / "model")
    shutil.copytree(room / "int8", room / "model")
    (room / "edgeforge-policy.yaml").write_text(
        "version: 1\ntext: held.txt\ntokens: 1024\nbounds: {size.growth: {at_most: 1.1}}\n"
    )
    found = {e.metric: e for e in gate("model", baseline=Path("b.json")).artifacts[0].findings}
    assert found["size.growth"].outcome == "failed" and found["size.growth"].value > 1.1


def test_a_baseline_is_written_whole_or_not_at_all(gate, room, monkeypatch):
    gate(baseline=Path("b.json"), update_baseline=True)
    before = (room / "b.json").read_bytes()
    (room / "edgeforge-policy.yaml").write_text(
        "version: 1\ntext: held.txt\ntokens: 1024\nbounds: {size.bytes: {at_most: 1kB}}\n"
    )
    result = gate(baseline=Path("b.json"), update_baseline=True)
    assert not result.passed and not result.baseline_updated
    (room / "edgeforge-policy.yaml").write_text("version: 1\ntext: held.txt\ntokens: 1024\n")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        gate("int4-g32", baseline=Path("b.json"), update_baseline=True)
    assert (room / "b.json").read_bytes() == before
    assert not list(room.glob(".b.json*"))


def test_an_update_keeps_what_was_not_checked(gate, room):
    gate("int8", baseline=Path("b.json"), update_baseline=True)
    gate("int4-g32", baseline=Path("b.json"), update_baseline=True)
    assert gate("int8", "int4-g32", baseline=Path("b.json")).notes == ()


def test_what_the_baseline_has_and_the_policy_lost_is_told(gate, room):
    gate("int8", "int4-g32", baseline=Path("b.json"), update_baseline=True)
    policy = room / "edgeforge-policy.yaml"
    policy.write_text(f"{policy.read_text()}artifacts: [int8]\n")
    asked = {"baseline": Path("b.json")}
    (note,) = check([], GateOptions(**asked)).notes
    assert "the baseline b.json has int4-g32, which was not checked" in note
    assert check([], GateOptions(**asked, update_baseline=True)).passed
    assert check([], GateOptions(**asked)).notes == ()
    assert list(read_baseline(Path("b.json")).entries) == ["int8"]


def test_an_artifact_that_is_not_in_the_baseline_is_told(gate):
    gate("int8", baseline=Path("b.json"), update_baseline=True)
    (note,) = gate("int4-g32", baseline=Path("b.json")).notes
    assert "int4-g32 is not in the baseline b.json" in note


def test_a_baseline_of_another_text_is_refused(gate, room):
    gate(baseline=Path("b.json"), update_baseline=True)
    entries = read_baseline(Path("b.json")).entries
    Baseline({"int8": replace(entries["int8"], text="0" * 64)}).write(Path("b.json"))
    with pytest.raises(UsageError, match=r"b\.json has int8 of another text"):
        gate(baseline=Path("b.json"))


def test_too_few_tokens_for_a_baseline_are_refused(gate, room):
    (room / "edgeforge-policy.yaml").write_text("version: 1\ntext: held.txt\ntokens: 100\n")
    with pytest.raises(UsageError, match="too few for a baseline"):
        gate(baseline=Path("b.json"), update_baseline=True)
    assert not (room / "b.json").exists()


def test_an_interrupted_check_goes_on_where_it_was(gate, room, verified, monkeypatch):
    from edgeforge.verification.evaluation import Evaluation

    for name in ("int8", "int4-g32"):
        (room / name / "report.json").unlink()
    write, written = Evaluation.write, []

    def interrupted(self, folder):
        if written:
            raise KeyboardInterrupt
        written.append(folder)
        return write(self, folder)

    monkeypatch.setattr(Evaluation, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gate("int8", "int4-g32")
    monkeypatch.setattr(Evaluation, "write", write)
    (kept,) = written
    verified.clear()
    result = gate("int8", "int4-g32")
    assert result.passed
    assert verified == [name for name in ("int8", "int4-g32") if name != kept.name]


def test_the_policy_lists_what_to_check(room):
    (room / "edgeforge-policy.yaml").write_text(
        "version: 1\nartifacts: [int*]\ntext: held.txt\ntokens: 1024\n"
    )
    assert [each.path for each in check([], GateOptions()).artifacts] == ["int4-g32", "int8"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("artifacts: [out/*]", r"artifacts: out/\* matches no artifact"),
        ("", "there is nothing to check"),
        (
            "artifacts: [int8]\nrules: [{match: {target: coreml}}]",
            r"rule 1 \(target coreml\) is for none of the 1 artifacts",
        ),
    ],
)
def test_a_policy_that_is_for_nothing_is_refused(room, text, sentence):
    (room / "edgeforge-policy.yaml").write_text(f"version: 1\n{text}\n")
    with pytest.raises(UsageError, match=sentence):
        check([], GateOptions())


def test_a_speed_is_held_against_a_run_of_the_same_job(gate, room, monkeypatch):
    monkeypatch.setattr(latency, "ROUNDS", 2)
    (room / "edgeforge-policy.yaml").write_text(
        "version: 1\ntext: held.txt\ntokens: 1024\n"
        "decode_ratio: {against: int4-g32, at_least: 100}\n"
        "prefill_ratio: {against: int4-g32, at_least: 0.001}\n"
    )
    found = {e.metric: e for e in gate().artifacts[0].findings if e.kind == "reference"}
    assert found["decode_ratio"].outcome == "failed"
    assert found["prefill_ratio"].outcome == "passed"
    assert found["decode_ratio"].low < found["decode_ratio"].value < found["decode_ratio"].high
    assert not [e for e in gate(timed=False).artifacts[0].findings if e.kind == "reference"]


def test_what_is_allowed_for_a_reason_is_told_and_passes(gate, room):
    path = room / "int8" / "report.json"
    content = unseal(path.read_bytes())
    message = "the window is 64, not 128"
    window = Checked("meaning.window", 64, 128, "equal", verdict="failed", message=message)
    others = [each for each in content["checks"] if each["name"] != "meaning.window"]
    path.write_text(seal({**content, "checks": [*others, asdict(window)]}))
    assert messages(gate()) == ["the window is 64, not 128"]
    policy = (room / "edgeforge-policy.yaml").read_text()
    allow = "allow: {meaning.window: prompts are short, meaning.windwo: prompts are short}\n"
    (room / "edgeforge-policy.yaml").write_text(policy + allow)
    result = gate()
    (found,) = (e for e in result.artifacts[0].findings if e.metric == "meaning.window")
    assert result.passed and found.outcome == "allowed"
    assert found.message.endswith("the policy allows it: prompts are short")
    (note,) = result.notes
    assert "meaning.windwo" in note and "did you mean 'meaning.window'" in note


def test_the_function_raises_what_it_found(room):
    result = api.check("int8", policy="edgeforge-policy.yaml")
    assert result.passed
    (room / "strict.yaml").write_text(
        "version: 1\ntext: held.txt\ntokens: 1024\nbounds: {size.bytes: {at_most: 1kB}}\n"
    )
    words = r"1 violation in 1 of 1 artifacts: int8 \(size\.bytes\)"
    with pytest.raises(GateFailed, match=words) as caught:
        api.check("int8", policy="strict.yaml")
    assert [found.metric for _, found in caught.value.result.violations] == ["size.bytes"]
