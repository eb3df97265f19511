"""What files say reaches the terminal as text, whatever it is."""

import json
import shutil

import pytest

from edgeforge import api
from edgeforge.cli.chat import emit
from edgeforge.cli.printable import console, json_text, printable_lines
from exporters.registry import TARGETS

pytestmark = pytest.mark.usefixtures("cache")
EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\x7f\u202e[red]x[/y]\r"
# What may stand in output besides printable characters.
FINE = "\n \t"


@pytest.fixture(scope="module")
def artifacts(folder, checkpoint):
    out = folder / "artifacts"
    api.export(checkpoint, out, targets=list(TARGETS), recipe="int4", context=32)
    return folder / "artifacts"


def spoilt(value, key=""):
    """A manifest in which every text that is free to say anything does."""
    if isinstance(value, dict):
        free = key in ("inputs", "outputs", "states", "tools")
        return {
            f"{name}{EVIL}" if free else name: spoilt(each, name) for name, each in value.items()
        }
    if isinstance(value, list):
        return [spoilt(each, key) for each in value]
    files = ("target", "entry", "path", "digest", "sha256")
    kept = (*files, "format", "algorithm", "activation", "float_columns")
    return f"{value}{EVIL}" if isinstance(value, str) and key not in kept else value


def is_plain(text: str) -> bool:
    return all(character.isprintable() or character in FINE for character in text)


@pytest.mark.parametrize("target", TARGETS)
def test_a_manifests_words_command_no_terminal(edgeforge, artifacts, tmp_path, target):
    artifact = shutil.copytree(artifacts / target, tmp_path / "artifact")
    file, is_quick = artifact / "edgeforge.json", target == "onnx"
    manifest = spoilt(json.loads(file.read_text()))
    manifest |= {"warnings": [f"one{EVIL}"], "notes": [f"two{EVIL}\nedgeforge: three"]}
    file.write_text(json.dumps(manifest))
    for command in (
        ("inspect", artifact, "--weights"),
        ("inspect", artifact, "--json"),
        ("run", artifact, "-p", "a", "-n", "1", "--json"),
        *([("verify", artifact, "--full", "--no-timed", "--tokens", "16")] if is_quick else []),
    ):
        shown = edgeforge(*command)
        assert is_plain(shown.out) and is_plain(shown.err), command
        assert "Traceback" not in shown.err
        if "inspect" in command:
            assert shown.out and shown.code == 0, shown.err
            assert "\nedgeforge: three" not in shown.out
        if "inspect" in command and "--json" in command:
            assert json.loads(shown.out)["recipe"] == f"int4{EVIL}"


def test_a_formats_name_is_no_markup(edgeforge, artifacts, tmp_path):
    artifact = shutil.copytree(artifacts / "onnx", tmp_path / "artifact")
    manifest = json.loads((artifact / "edgeforge.json").read_text())
    for record in manifest["weights"].values():
        record |= {"format": "[/red]", "algorithm": "[/blue]\x1b[2J"}
    (artifact / "edgeforge.json").write_text(json.dumps(manifest))
    shown = edgeforge("inspect", artifact, "--weights")
    assert "[/red]" in shown.out and "Traceback" not in shown.err and is_plain(shown.out)


def test_a_packages_description_commands_no_terminal(edgeforge, artifacts, tmp_path):
    from exporters.coreml.package import open_package

    package = shutil.copytree(artifacts / "coreml" / "model.mlpackage", tmp_path / "x.mlpackage")
    (model,) = package.rglob("*.mlmodel")
    spec = open_package(package).spec
    spec.description.metadata.userDefined["edgeforge.evil"] = EVIL
    spec.description.metadata.author = EVIL
    model.write_bytes(spec.SerializeToString())
    for options in ((), ("--json",)):
        shown = edgeforge("coreml-run", package, *options)
        assert shown.code == 0 and is_plain(shown.out), shown.err
        assert "owned" in shown.out


def test_the_models_answer_is_whole_in_a_pipe_and_harmless_on_a_terminal(monkeypatch, capsys):
    for is_terminal, wanted in ((False, EVIL), (True, "\\x1b]0;owned\\x07\\x1b[2J")):
        monkeypatch.setattr("sys.stdout.isatty", lambda is_terminal=is_terminal: is_terminal)
        emit(f"größe\t漢字\u3000\n{EVIL}")
        shown = capsys.readouterr().out
        assert shown.startswith(f"größe\t漢字\u3000\n{wanted}")
        assert ("\x1b" in shown) is not is_terminal


def test_a_traceback_that_quotes_a_file_commands_no_terminal(edgeforge, monkeypatch):
    def refused(what):
        from edgeforge.errors import UsageError

        raise UsageError(EVIL)

    monkeypatch.setattr("edgeforge.cli.catalogue.catalogue", refused)
    shown = edgeforge("--traceback", "list", "recipes")
    assert "Traceback" in shown.err and "owned" in shown.err and is_plain(shown.err)


def test_tables_keep_their_colours_and_escape_their_cells(capsys):
    from rich.table import Table

    table = Table("heading")
    table.add_row("[bold]cell[/bold]\x1b[2J")
    console(force_terminal=True, color_system="standard", width=60).print(table)
    shown = capsys.readouterr().out
    assert "\x1b[1m" in shown and "\x1b[2J" not in shown and "\\x1" in shown


def test_json_reads_back_as_it_was():
    value = {EVIL: [EVIL, "größe \u2028 漢字"]}
    assert json.loads(json_text(value)) == value
    assert is_plain(json_text(value))


def test_a_line_stays_one_line():
    assert printable_lines(["a\nb", "  c"]) == "a\\nb\n  c"
