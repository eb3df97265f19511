"""Options that cannot be met, and output folders that must be spared."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from edgeforge.synth.synthesise import synthesise

USAGE, CHECKPOINT, QUANTIZATION, EXPORT = 2, 3, 4, 5


def change_tensors(folder: Path, change) -> None:
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def test_groups_that_do_not_divide_are_refused_as_the_style_guide_says(tmp_path, export):
    folder = synthesise("tiny-phi-3", tmp_path / "phi")
    options = ("--recipe", "int4-g64")
    shown = export(folder, QUANTIZATION, options=options)
    assert shown == (
        "edgeforge: model.embed_tokens.weight has 96 input columns; int4-g64 needs a multiple of "
        "group_size 64: use int4-g32 or keep it int8-pc, and the same for lm_head.weight and 8 "
        "more\n"
    )


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--recipe", "int-4"), QUANTIZATION, "no recipe 'int-4' (did you mean 'int4'?)"),
        (("--target", "onxn"), EXPORT, "no target 'onxn' (did you mean 'onnx'?)"),
        (("--target", ""), EXPORT, "no target ''"),
        (("--target", "onnx,"), EXPORT, "no target ''"),
        (("--context", "1"), USAGE, "--context 1 is not possible: this model takes 2 to 512"),
        (("--context", "513"), USAGE, "--context 513 is not possible"),
        (("--context", "-5"), USAGE, "--context -5"),
        (("--context", "many"), USAGE, "'--context'"),
        (
            ("--revision", "main"),
            USAGE,
            "is a folder, which has no revision: leave out --revision main",
        ),
        (("--tokenizer", "/nowhere"), CHECKPOINT, "the tokenizer '/nowhere' is neither"),
        (("--lowering", "stock"), EXPORT, "onnx has no option --lowering: leave it out"),
        (("--backend", "vulkan"), EXPORT, "onnx has no option --backend: leave it out"),
        (
            ("--target", "executorch", "--backend", "vulkan"),
            EXPORT,
            "is to be int8-pc; ExecuTorch's Vulkan delegate computes with symmetric 4-bit",
        ),
        (("--recipe", "/nowhere.yaml"), QUANTIZATION, "/nowhere.yaml cannot be read"),
    ],
)
def test_options_that_cannot_be_met_are_refused(sound, export, options, code, words):
    export(sound, code, words, options=options)


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ("- {match: *, format: int4-g32}", "is not YAML at line 1, column 12"),
        ("- {match: '*', format: int5}", "rule 1: 'int5' is not a weight format"),
        ("- {match: '*mlp*', format: int4-g32}", "end it with a rule for '*'"),
        (
            "- {match: 'model.layers.7.*', format: fp16}\n- {match: '*', format: int8-pc}",
            "the rule 'model.layers.7.*' matches no weight that earlier rules leave",
        ),
        ("- {match: '*', format: int4-g32, algorithm: hqq}", "no algorithm 'hqq'"),
        ("- {match: '*', format: int4-g48}", "group_size 48"),
    ],
)
def test_recipe_files_that_do_not_fit_are_refused(sound, export, tmp_path, rules, words):
    file = tmp_path / "my recipe.yaml"
    file.write_text(rules)
    export(sound, QUANTIZATION, words, options=("--recipe", file))


def test_groups_that_the_kernels_lack_are_refused_before_any_work(sound, export, tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("- {match: '*', format: int4-g8}")
    export(sound, EXPORT, "groups of 8", "16, 32, 64, 128", options=("--recipe", file))


def test_a_file_in_the_outputs_place_is_refused(sound, edgeforge, tmp_path):
    (tmp_path / "out").write_text("mine")
    shown = edgeforge("export", sound, "-o", tmp_path / "out", "-q", "--force")
    assert shown.code == USAGE and "is a file: name a folder" in shown.err
    assert (tmp_path / "out").read_text() == "mine"


def test_force_spares_a_folder_that_is_no_artifact(sound, edgeforge, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    shown = edgeforge("export", sound, "-o", tmp_path / "out", "-q", "--force")
    assert shown.code == USAGE and shown.err.count("\n") == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


@pytest.mark.usefixtures("warm")
def test_an_old_artifact_outlives_a_failed_replacement(checkpoint, artifact, edgeforge):
    before = sorted((p.name, p.stat().st_mtime_ns) for p in artifact.iterdir())
    change_tensors(checkpoint, lambda t: t["model.norm.weight"].__setitem__(0, torch.nan))
    shown = edgeforge("export", checkpoint, "-o", artifact, "-q", "--force")
    assert shown.code == QUANTIZATION
    assert sorted((p.name, p.stat().st_mtime_ns) for p in artifact.iterdir()) == before
    assert sorted(p.name for p in artifact.parent.iterdir()) == ["artifact", "checkpoint"]
