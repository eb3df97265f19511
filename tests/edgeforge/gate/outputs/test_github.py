"""Annotations: one line each, which nobody's name can break."""

from pathlib import Path

from edgeforge.gate.outputs.github import github_annotations


def test_each_violation_is_one_command(failed):
    lines = github_annotations(failed, None)
    assert [line.split(" ")[0] for line in lines] == [
        "::error",
        "::error",
        "::warning",
        "::notice",
        "::error",
    ]
    assert lines[0].startswith("::error title=out/onnx%3A total.kl_mean::total.kl_mean 0.0362 [")
    assert all("\n" not in line for line in lines)
    # A name cannot end the command's properties or begin another command.
    assert lines[4].count("::") == 2
    assert "%250A" in lines[4]


def test_an_annotation_shows_up_at_the_policy_of_the_repository(failed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "file=edgeforge-policy.yaml,line=1," in github_annotations(failed, Path())[0]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert "file=" not in github_annotations(failed, elsewhere)[0]


def test_nothing_is_printed_where_all_is_well(sound):
    assert github_annotations(sound, None) == []
