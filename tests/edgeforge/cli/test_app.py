"""The commands as a user meets them: streams, JSON, help."""

import json
import os
import re
import resource
import subprocess
import sys

import pytest

from edgeforge import api
from edgeforge.cli import app as cli

COMMANDS = ("export", "verify", "inspect", "run", "chat", "list", "doctor", "synth")
VERIFY = ("--no-timed", "--tokens", "300", "-q")

pytestmark = pytest.mark.usefixtures("cache")


def test_help_loads_nothing_heavy():
    code = (
        "import sys; sys.argv = ['edgeforge', '--help']\n"
        "from edgeforge.cli import entry\n"
        "try: entry.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'numpy', 'safetensors', 'tokenizers', 'rich',"
        " 'huggingface_hub', 'yaml', 'transformers'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stderr == "[]\n"
    assert all(name in shown.stdout for name in COMMANDS)


def test_help_answers_in_half_a_second(in_a_process):
    # Processor time: what the wall clock shows when nothing else runs.
    best = 9.0
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert in_a_process("--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
        best = min(best, spent)
        if best < 0.5:
            break
    assert best < 0.5


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_in_the_help_with_its_meaning(edgeforge, command):
    shown = edgeforge(command, "--help")
    assert shown.code == 0 and shown.err == ""
    import typer

    for parameter in typer.main.get_command(cli.app).commands[command].params:
        if parameter.param_type_name == "option":
            assert parameter.opts[0] in shown.out
        assert getattr(parameter, "help", None), parameter.name


def test_the_version_is_the_one_that_manifests_name(edgeforge, artifact):
    shown = edgeforge("--version")
    assert shown.code == 0 and shown.err == ""
    manifest = json.loads((artifact / "edgeforge.json").read_text())
    assert shown.out == manifest["tools"]["edgeforge"] + "\n"
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", shown.out)


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("edgeforge ex", {"export", "export-adapter", "export-module"}),
        ("edgeforge export --kv", {"--kv-cache"}),
        ("edgeforge --ver", {"--version"}),
    ],
)
def test_a_shell_completes_commands_and_options(in_a_process, words, wanted):
    asked = {
        "_EDGEFORGE_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    shown = in_a_process(env={**os.environ, **asked})
    assert shown.returncode == 0, shown.stderr
    assert set(shown.stdout.decode().split()) == wanted


def test_the_completion_script_is_for_this_command(in_a_process):
    asked = {**os.environ, "_EDGEFORGE_COMPLETE": "source_bash"}
    script = in_a_process(env=asked).stdout.decode()
    assert "_EDGEFORGE_COMPLETE=complete_bash" in script
    assert re.search(r"complete .*-F \S+ edgeforge$", script, re.MULTILINE)


def test_no_arguments_show_the_help(edgeforge):
    shown = edgeforge()
    assert shown.code == 0 and shown.err == ""
    assert shown.out == edgeforge("--help").out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["exprot"], "No such command 'exprot'. Did you mean 'export'? (see 'edgeforge --help')"),
        (["export"], "Missing argument 'model' (see 'edgeforge export --help')"),
        (["export", "x"], "Missing option '--out' / '-o' (see 'edgeforge export --help')"),
        (["zebra"], "No such command 'zebra' (see 'edgeforge --help')"),
        (
            ["export", "x", "-o", "y", "--recpie", "int4"],
            "No such option: --recpie. Did you mean '--recipe'? (see",
        ),
        (["verify", "x", "--recipe", "int4"], "No such option: --recipe (see 'edgeforge verify"),
        (["run", "x", "-p", "y", "-n", "0"], "Invalid value for '--max-tokens' / '-n': "),
        (["run", "x", "-p", "y", "--seed", "-1"], "Invalid value for '--seed': "),
        (["run", "x", "-p", "y", "--temperature", "hot"], "Invalid value for '--temperature': "),
        (["verify", "x", "--threads", "0"], "Invalid value for '--threads': "),
        (["verify", "x", "--tokens", "1"], "Invalid value for '--tokens': "),
        (["verify", "x", "--tokens", "few"], "'few' is neither a number of tokens, 2 or more, nor"),
        (["list", "families", "recipes"], "Got unexpected extra argument"),
        (["list", "zzz"], "there is no list of 'zzz'; known: families, recipes"),
        (["synth", "opnelm-270m", "-o", "y"], "did you mean openelm-270m?"),
    ],
)
def test_what_is_asked_wrongly_is_one_line_and_exit_2(edgeforge, arguments, words):
    shown = edgeforge(*arguments)
    assert (shown.code, shown.out) == (2, "")
    assert shown.err.startswith("edgeforge: ") and words in shown.err
    assert shown.err.count("\n") == 1


@pytest.mark.parametrize("what", ["families", "recipes", "rotations", "targets", "presets"])
def test_lists_are_lines_or_json(edgeforge, what):
    from edgeforge.cli.catalogue import catalogue

    lines = edgeforge("list", what)
    data = edgeforge("list", what, "--json")
    assert (lines.code, lines.err, data.code, data.err) == (0, "", 0, "")
    assert json.loads(data.out) == catalogue(what)
    assert [re.split(r" {2,}", line, maxsplit=1) for line in lines.out.splitlines()] == [
        [name, about] for name, about in catalogue(what).items()
    ]


def test_an_export_prints_one_line_a_target_and_its_progress_aside(edgeforge, checkpoint, tmp_path):
    shown = edgeforge("export", checkpoint, "--out", tmp_path / "out", "--context", "64")
    assert shown.code == 0
    line = rf"{tmp_path}/out: onnx, int4-gptq, context 64, \d\.\d+ bits a weight, \d+\.\d kB\n"
    vocabulary = (
        r"the embedding, also the head, has 18% of the weights and \d+\.\d kB in int4-g32, .*; "
        r"8 bits would take \d+\.\d kB more: --recipe int4-vocab8-gptq\n"
    )
    assert re.fullmatch(line + vocabulary, shown.out), shown.out
    for stage in ("hash", "trace", "quantize", "write onnx"):
        assert stage in shown.err
    manifest = json.loads((tmp_path / "out" / "edgeforge.json").read_text())
    assert (manifest["context"], manifest["recipe"]) == (64, "int4-gptq")
    assert shown.out.splitlines()[1] in manifest["notes"]


def test_a_target_named_twice_is_written_once(edgeforge, checkpoint, tmp_path):
    shown = edgeforge("export", checkpoint, "-o", tmp_path / "out", "-q", "--target", "onnx, onnx")
    assert shown.code == 0 and shown.err == ""
    assert (tmp_path / "out" / "edgeforge.json").is_file()


def test_the_same_export_again_quantizes_nothing(edgeforge, checkpoint, artifact, tmp_path):
    shown = edgeforge("export", checkpoint, "-o", tmp_path / "out")
    assert shown.code == 0 and "quantize (cached)" in shown.err
    for name in ("model.onnx", "model.onnx.data", "verify.onnx"):
        assert (tmp_path / "out" / name).read_bytes() == (artifact / name).read_bytes()


def test_an_existing_folder_is_replaced_by_force_only(edgeforge, checkpoint, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "edgeforge.json").write_text('{"target": "onnx", "files": {}, "schema_version": 1}')
    shown = edgeforge("export", checkpoint, "-o", out, "-q")
    assert shown.code == 2 and shown.err.count("\n") == 1
    assert "exists and is not empty: choose another folder, or pass --force" in shown.err
    assert [path.name for path in out.iterdir()] == ["edgeforge.json"]
    assert edgeforge("export", checkpoint, "-o", out, "-q", "--force").code == 0
    assert json.loads((out / "edgeforge.json").read_text())["files"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_synth_writes_a_checkpoint_and_keeps_an_existing_one(edgeforge, tmp_path):
    out = tmp_path / "ck"
    shown = edgeforge("synth", "tiny-openelm", "--out", out, "-q")
    assert (shown.code, shown.out, shown.err) == (0, f"{out}\n", "")
    before = (out / "model.safetensors").read_bytes()
    again = edgeforge("synth", "tiny-openelm", "--out", out, "-q", "--seed", "1")
    assert again.code == 2 and "--force" in again.err
    assert (out / "model.safetensors").read_bytes() == before
    assert edgeforge("synth", "tiny-openelm", "-o", out, "-q", "--seed", "1", "--force").code == 0
    assert (out / "model.safetensors").read_bytes() != before


def test_run_prints_the_text_and_nothing_else_on_stdout(edgeforge, artifact):
    plain = edgeforge("run", artifact, "--prompt", "né", "-n", "12")
    data = edgeforge("run", artifact, "--prompt", "né", "-n", "12", "--json")
    assert plain.code == data.code == 0 and data.err == ""
    result = json.loads(data.out)
    assert plain.out == result["text"] + "\n"
    assert result["prompt_tokens"] == 4
    assert len(result["tokens"]) <= 12
    assert re.fullmatch(
        r"\[loaded in \d+\.\d\d s; 4 prompt tokens, first token after \d+ ms; "
        r"\d+ tokens at [\d.]+ tokens/s; .*\]\n",
        plain.err,
    )


def test_run_repeats_itself_by_its_seed(edgeforge, artifact):
    def text(*options):
        shown = edgeforge("run", artifact, "-p", "a", "-n", "40", "--json", *options)
        return json.loads(shown.out)["tokens"]

    hot = ("--temperature", "2")
    assert text(*hot, "--seed", "5") == text(*hot, "--seed", "5") != text(*hot, "--seed", "6")
    assert text("--seed", "5") == text("--seed", "6")
    # So small a share leaves the likeliest token alone.
    assert text(*hot, "--top-p", "1e-6") == text()


def test_verify_prints_one_table_for_several_artifacts(edgeforge, artifact, checkpoint, tmp_path):
    fp16 = tmp_path / "all" / "b-fp16"
    api.export(checkpoint, fp16, recipe="fp16")
    (tmp_path / "all" / "a-int4").symlink_to(artifact)
    shown = edgeforge("verify", tmp_path / "all", *VERIFY, "--full")
    assert shown.code == 0 and shown.err == ""
    assert shown.out.count("Accuracy") == shown.out.count("Cost on this machine") == 1
    heading = next(line for line in shown.out.splitlines() if "int4" in line and "fp16" in line)
    assert heading.index("onnx int4") < heading.index("onnx fp16")
    data = edgeforge("verify", tmp_path / "all" / "a-int4", fp16, *VERIFY, "--json")
    assert data.code == 0 and data.err == ""
    reports = json.loads(data.out)
    assert [report["recipe"] for report in reports] == ["int4-gptq", "fp16"]
    written = json.loads((fp16 / "report.json").read_text())
    assert written.pop("sha256") and reports[1] == written
    assert reports[0]["stored_weights_equal"] is True
    assert reports[0]["tokens"] >= 300 and reports[0]["timings"] is None


def test_verify_begins_with_a_verdict_and_says_what_it_looked_at(edgeforge, artifact):
    shown = edgeforge("verify", artifact, *VERIFY)
    lines = shown.out.splitlines()
    assert re.fullmatch(
        r"onnx  SOUND  weights bit-exact; ran in onnxruntime; perplexity x \d\.\d{3}", lines[0]
    )
    assert max(map(len, lines)) <= 80 and "\x1b" not in shown.out
    told = " ".join(shown.out.split())
    assert re.search(r"Measured on 300 of the [\d,]+ tokens of the demo model's held-out", told)
    assert "--tokens all" in told and "Accuracy" not in told


def test_verify_takes_every_token_of_a_text(edgeforge, artifact, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a sentence. " * 200, encoding="utf-8")
    command = ("verify", artifact, "--no-timed", "-q", "--text", text)
    (some,) = json.loads(edgeforge(*command, "--tokens", "700", "--json").out)
    (every,) = json.loads(edgeforge(*command, "--tokens", "all", "--json").out)
    assert some["tokens"] == 700 and every["tokens"] == some["text_tokens"] == 2405
    assert some["intervals"] is None and every["intervals"]["units"] == 10
    shown = edgeforge(*command, "--tokens", "all")
    assert "Measured on all 2,405 tokens of text.txt." in shown.out
    assert "--tokens all" not in shown.out


def test_verify_times_an_artifact(edgeforge, artifact):
    shown = edgeforge("verify", artifact, "--tokens", "64", "-q", "--json")
    timings = json.loads(shown.out)[0]["timings"]
    assert timings["decode_tokens_per_second"] > 0 and timings["peak_bytes"] > 0


def test_verify_takes_a_text_of_the_users(edgeforge, artifact, tmp_path):
    text = tmp_path / "mein text ä.txt"
    text.write_text("Ein kurzer Text, größer als nichts.", encoding="utf-8")
    shown = edgeforge("verify", artifact, "--no-timed", "-q", "--text", text, "--json")
    (report,) = json.loads(shown.out)
    assert report["text"] == text.name
    assert report["tokens"] == len(text.read_bytes()) + 1  # and the token that begins it


def test_names_with_brackets_are_shown_as_they_are(edgeforge, checkpoint, tmp_path):
    recipe, text = tmp_path / "[bold]mine.yaml", tmp_path / "t[red].txt"
    recipe.write_text("- {match: '*', format: int8-pc}")
    text.write_text("some text")
    out = tmp_path / "out"
    assert edgeforge("export", checkpoint, "-o", out, "-q", "--recipe", recipe).code == 0
    command = ("verify", out, "--no-timed", "-q", "--text", text)
    shown = edgeforge(*command, "--full")
    assert shown.code == 0
    assert "onnx [bold]mine" in shown.out and "of t[red].txt" in shown.out
    shown = edgeforge(*command)
    assert shown.code == 0
    assert "recipe [bold]mine" in shown.out and "of t[red].txt" in shown.out


def test_verify_finds_a_checkpoint_that_moved(edgeforge, artifact, checkpoint, tmp_path):
    moved = tmp_path / "umgezogen"
    os.rename(checkpoint, moved)
    try:
        lost = edgeforge("verify", artifact, *VERIFY)
        found = edgeforge("verify", artifact, *VERIFY, "--checkpoint", moved)
    finally:
        os.rename(moved, checkpoint)
    assert lost.code == 3 and str(checkpoint) in lost.err
    assert found.code == 0


def test_inspect_shows_what_is_inside(edgeforge, artifact):
    shown = edgeforge("inspect", artifact, "--weights")
    assert shown.code == 0 and shown.err == ""
    for words in ("recipe int4", "context 512 tokens", "model.onnx.data", "int4-g32", "all files"):
        assert words in shown.out
    manifest = json.loads((artifact / "edgeforge.json").read_text())
    assert all(name in shown.out for name in manifest["weights"])
    data = edgeforge("inspect", artifact, "--json")
    assert json.loads(data.out) == {**manifest, "problems": []} and data.err == ""


def test_a_stripped_artifact_says_so_and_holds_no_graph_for_verification(
    edgeforge, checkpoint, tmp_path
):
    out = tmp_path / "out"
    assert edgeforge("export", checkpoint, "-o", out, "-q", "--strip").code == 0
    assert not (out / "verify.onnx").exists()
    shown = edgeforge("inspect", out, "--json")
    assert json.loads(shown.out)["options"] == {"strip": True}


@pytest.mark.parametrize("size", ["much", "-3GB", "0", "3 XB"])
def test_a_memory_that_is_no_size(edgeforge, checkpoint, tmp_path, size):
    shown = edgeforge("export", checkpoint, "-o", tmp_path / "out", f"--max-memory={size}")
    assert shown.code == 2
    assert f"{size!r} is not a size: write it like 900MB, 3GB or 1.5GiB" in shown.err
    assert not (tmp_path / "out").exists()
