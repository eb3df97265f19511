"""The command line as a user meets it: streams, exit codes, JSON, help."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from edgeforge import api
from edgeforge.cli import app as cli
from edgeforge.synth.synthesise import synthesise

COMMANDS = ("export", "verify", "inspect", "run", "list", "synth")
VERIFY = ("--no-timed", "--tokens", "300", "-q")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def checkpoint(folder):
    return synthesise("tiny-llama", folder / "checkpoint")


@pytest.fixture(scope="module")
def artifact(folder, checkpoint):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEFORGE_CACHE", str(folder / "cache"))
        return api.export(checkpoint, folder / "artifact")[0]


@pytest.fixture(autouse=True)
def cache(monkeypatch, folder):
    monkeypatch.setenv("EDGEFORGE_CACHE", str(folder / "cache"))


@pytest.fixture
def edgeforge(monkeypatch, capfd):
    """Runs a command in this process: its exit code, stdout and stderr."""

    def run(*arguments: object) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["edgeforge", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as error:
            code = error.code or 0
        out, err = capfd.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return run


def in_a_process(*arguments: object, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "edgeforge.cli.app", *map(str, arguments)],
        capture_output=True,
        timeout=120,
        **options,
    )


def test_help_loads_nothing_heavy():
    code = (
        "import sys; sys.argv = ['edgeforge', '--help']\n"
        "from edgeforge.cli import app\n"
        "try: app.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'numpy', 'safetensors', 'tokenizers', 'rich',"
        " 'huggingface_hub', 'yaml', 'transformers'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stderr == "[]\n"
    assert all(name in shown.stdout for name in COMMANDS)


def test_help_answers_in_half_a_second():
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
        (["export", "x", "-o", "y", "--recpie", "int4"], "No such option: --recpie"),
        (["run", "x", "-p", "y", "-n", "0"], "Invalid value for '--max-tokens' / '-n': "),
        (["run", "x", "-p", "y", "--seed", "-1"], "Invalid value for '--seed': "),
        (["run", "x", "-p", "y", "--temperature", "hot"], "Invalid value for '--temperature': "),
        (["verify", "x", "--threads", "0"], "Invalid value for '--threads': "),
        (["verify", "x", "--tokens", "1"], "Invalid value for '--tokens': "),
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
    line = rf"{tmp_path}/out: onnx, int4, context 64, \d\.\d+ bits a weight, \d+\.\d kB\n"
    assert re.fullmatch(line, shown.out)
    for stage in ("hash", "trace", "quantize", "write onnx"):
        assert stage in shown.err
    manifest = json.loads((tmp_path / "out" / "edgeforge.json").read_text())
    assert (manifest["context"], manifest["recipe"]) == (64, "int4")


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
    (out / "edgeforge.json").write_text("old")
    shown = edgeforge("export", checkpoint, "-o", out, "-q")
    assert shown.code == 2 and shown.err.count("\n") == 1
    assert "exists and is not empty: choose another folder, or --force" in shown.err
    assert [path.name for path in out.iterdir()] == ["edgeforge.json"]
    assert edgeforge("export", checkpoint, "-o", out, "-q", "--force").code == 0
    assert json.loads((out / "edgeforge.json").read_text())["target"] == "onnx"
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
    shown = edgeforge("verify", tmp_path / "all", *VERIFY)
    assert shown.code == 0 and shown.err == ""
    assert shown.out.count("Accuracy") == shown.out.count("Cost on this machine") == 1
    heading = next(line for line in shown.out.splitlines() if "onnx int4" in line)
    assert heading.index("onnx int4") < heading.index("onnx fp16")
    data = edgeforge("verify", tmp_path / "all" / "a-int4", fp16, *VERIFY, "--json")
    assert data.code == 0 and data.err == ""
    reports = json.loads(data.out)
    assert [report["recipe"] for report in reports] == ["int4", "fp16"]
    assert reports[1] == json.loads((fp16 / "report.json").read_text())
    assert reports[0]["stored_weights_equal"] is True
    assert reports[0]["tokens"] >= 300 and reports[0]["timings"] is None


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
    shown = edgeforge("verify", out, "--no-timed", "-q", "--text", text)
    assert shown.code == 0
    assert "onnx [bold]mine" in shown.out and "of t[red].txt" in shown.out


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


def test_a_traceback_is_shown_when_asked_for(edgeforge, tmp_path):
    for arguments in (("--traceback", "inspect", tmp_path), ("inspect", tmp_path, "--traceback")):
        shown = edgeforge(*arguments)
        assert shown.code == 5 and shown.out == ""
        assert shown.err.startswith("Traceback (most recent call last):")
        assert "ExportError" in shown.err
        assert shown.err.splitlines()[-1].startswith("edgeforge: ")
        assert "is no EdgeForge artifact" in shown.err.splitlines()[-1]


@pytest.mark.parametrize("bug", [RuntimeError("a bug"), EOFError(), KeyError("x"), OSError(2, "y")])
def test_a_bug_is_not_taken_for_a_users_error(edgeforge, monkeypatch, bug):
    def broken(what):
        raise bug

    monkeypatch.setattr("edgeforge.cli.catalogue.catalogue", broken)
    with pytest.raises(type(bug)) as caught:
        edgeforge("list", "recipes")
    assert caught.value is bug


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (OSError(28, "No space left on device", "/x/y"), 5, "/x/y: No space left on device"),
        (PermissionError(13, "Permission denied", "/x/y"), 2, "/x/y: Permission denied"),
        (OSError(30, "Read-only file system"), 2, "Read-only file system"),
    ],
)
def test_what_the_machine_refuses_is_no_bug(edgeforge, monkeypatch, error, code, words):
    def refused(what):
        raise error

    monkeypatch.setattr("edgeforge.cli.catalogue.catalogue", refused)
    shown = edgeforge("list", "recipes")
    assert (shown.code, shown.out, shown.err) == (code, "", f"edgeforge: {words}\n")


def test_a_message_is_one_line_without_terminal_commands(edgeforge, monkeypatch):
    def refused(what):
        from edgeforge.errors import UsageError

        raise UsageError("two\n  lines and \x1b[2J a command, größe 漢字")

    monkeypatch.setattr("edgeforge.cli.catalogue.catalogue", refused)
    shown = edgeforge("list", "recipes")
    assert shown.err == "edgeforge: two lines and \\x1b[2J a command, größe 漢字\n"


def test_ctrl_c_is_one_line_and_exit_130(edgeforge, monkeypatch):
    def interrupted(what):
        raise KeyboardInterrupt

    monkeypatch.setattr("edgeforge.cli.catalogue.catalogue", interrupted)
    shown = edgeforge("list", "recipes")
    assert (shown.code, shown.out) == (130, "")
    assert shown.err == "edgeforge: interrupted; nothing was left half-written\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_signals_end_a_command_as_ctrl_c_does(edgeforge, monkeypatch, number):
    # Whoever runs the tests may have been started by nohup, which has SIGHUP ignored.
    inherited = signal.signal(number, signal.SIG_DFL)
    unwound = []

    def sent(what):
        try:
            signal.raise_signal(number)
        finally:
            unwound.append(what)

    monkeypatch.setattr("edgeforge.cli.catalogue.catalogue", sent)
    try:
        shown = edgeforge("list", "recipes")
        assert unwound == ["recipes"] and shown.code == 128 + number
        assert shown.err == "edgeforge: interrupted; nothing was left half-written\n"
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, inherited)


def test_a_signal_ends_a_command_though_ctrl_c_is_ignored(edgeforge, monkeypatch):
    monkeypatch.setattr(
        "edgeforge.cli.catalogue.catalogue", lambda what: signal.raise_signal(signal.SIGTERM)
    )
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert edgeforge("list", "recipes").code == 143
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_hang_up_that_nohup_ignores_stays_ignored(edgeforge, monkeypatch):
    monkeypatch.setattr(
        "edgeforge.cli.catalogue.catalogue", lambda what: signal.raise_signal(signal.SIGHUP) or {}
    )
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert edgeforge("list", "recipes").code == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_reader_that_leaves_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as stream:
        shown = subprocess.run(
            [sys.executable, "-m", "edgeforge.cli.app", "list", "presets"],
            stdout=stream,
            stderr=subprocess.PIPE,
            timeout=60,
        )
    assert (shown.returncode, shown.stderr) == (141, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_a_full_disk_under_stdout_is_an_error():
    with open("/dev/full", "wb") as full:
        shown = subprocess.run(
            [sys.executable, "-m", "edgeforge.cli.app", "list", "presets"],
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=60,
        )
    assert shown.returncode == 5
    assert shown.stderr.startswith(b"edgeforge: No space left on device\n")


def test_text_that_the_terminal_cannot_show_is_escaped(artifact):
    shown = in_a_process(
        "run", artifact, "-p", "x", "-n", "6", env={**os.environ, "PYTHONIOENCODING": "ascii"}
    )
    assert shown.returncode == 0 and shown.stdout.isascii()


def test_exit_codes_reach_the_shell(tmp_path):
    assert in_a_process("list", "recipes").returncode == 0
    shown = in_a_process("inspect", tmp_path)
    assert shown.returncode == 5 and shown.stdout == b"" and shown.stderr.count(b"\n") == 1


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
