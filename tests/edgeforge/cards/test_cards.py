"""The cards of real artifacts: what they say is what was found, and nothing of a name acts."""

from __future__ import annotations

import json
import re
import shutil
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from edgeforge.cards.card import CARD_VERSION
from edgeforge.export_options import ExportOptions
from edgeforge.model.model import open_model
from edgeforge.output_folder.contents import strange_file
from edgeforge.pipeline import export
from edgeforge.synth.synthesise import synthesise
from edgeforge.verification.verify import verify
from edgeforge.verification.verify_options import VerifyOptions
from exporters.manifest import MANIFEST, Manifest, check_files
from exporters.registry import find_target

EVIL = "a|b <script>alert(1)</script> [x](javascript:y) ![z](http://w) `c` \u202e# d"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> SimpleNamespace:
    """An artifact for each of two targets, before and after it was verified."""
    root = tmp_path_factory.mktemp("cards")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEFORGE_CACHE", str(root / "cache"))
        folder = synthesise("tiny-llama", root / "model")
        (folder / "README.md").write_text(
            "---\nlicense: other\nlicense_name: 'two: words'\nauthor: somebody\n---\n# A model\n"
        )
        targets = [find_target("onnx"), find_target("coreml")]
        folders = export(open_model(str(folder)), targets, root / "out", ExportOptions(context=64))
        shutil.copytree(root / "out", root / "before")
        found = [verify(each, VerifyOptions(tokens=640, timed=False)) for each in folders]
    return SimpleNamespace(
        root=root, checkpoint=folder, before=root / "before", out=root / "out", found=found
    )


def tables(text: str) -> list[list[list[str]]]:
    """The cells of every table, as a reader of Markdown sees them."""
    found: list[list[list[str]]] = []
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(text)
    for token, inner in pairwise(tokens):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type in ("td_open", "th_open"):
            found[-1][-1].append("".join(each.content for each in inner.children or ()))
    return found


def body(text: str) -> str:
    return text.split("\n---\n", 1)[1]


def test_export_writes_cards_without_figures(made):
    for target in ("onnx", "coreml"):
        folder = made.before / target
        data = json.loads((folder / "card.json").read_text())
        assert data["schema_version"] == CARD_VERSION and data["verified"] is None
        text = (folder / "CARD.md").read_text()
        assert "Not verified yet" in text and not re.search(r"KL from .*\d", text)
        figures, places = tables(body(text))[:2]
        assert [row[1] for row in figures[1:]] == ["not verified yet"] * 5
        assert places[1:] == [["anywhere", "not run"]]


def test_cards_are_beside_the_manifest_and_not_in_it(made):
    for folder in (made.before / "onnx", made.out / "onnx"):
        manifest = Manifest.read(folder)
        assert not {"CARD.md", "card.json"} & manifest.files.keys()
        assert check_files(folder, manifest) == []
    before, after = ((each / "onnx" / MANIFEST).read_bytes() for each in (made.before, made.out))
    assert before == after
    assert strange_file(made.out) is None


def test_verify_renews_them_with_the_figures_of_the_report(made):
    for target, how in (("onnx", "measured"), ("coreml", "interpreted")):
        folder = made.out / target
        report = json.loads((folder / "report.json").read_text())
        data = json.loads((folder / "card.json").read_text())["verified"]
        assert data["how"] == how and data["runtime"] == report["runtime"]
        assert data["tokens"] == report["tokens"]
        for name, comparison, figure in (
            ("kl", "total", "kl_mean"),
            ("quantization_kl", "quantization", "kl_mean"),
            ("lowering_kl", "lowering", "kl_mean"),
            ("top1", "total", "top1_agreement"),
        ):
            interval = report["intervals"][comparison][figure]
            assert data[name] == {"value": report[comparison][figure], **interval}
        assert data["perplexity_ratio"]["value"] == report["perplexity_ratio"]
        text = (folder / "CARD.md").read_text()
        figures, places = tables(body(text))[:2]
        shown = {row[0]: row[1] for row in figures}
        assert float(shown["KL from the checkpoint, nats a token"]) == pytest.approx(
            report["total"]["kl_mean"], rel=5e-3
        )
        assert shown["perplexity over the checkpoint's"] == f"{report['perplexity_ratio']:.4f}"
        assert places[1][1] == how and all(row[1] == "not run" for row in places[2:])
    assert "Apple's Core ML runtime on a Mac" in text and "cannot know" in text


def test_the_hub_reads_the_header(made):
    data = ModelCard.load(made.out / "onnx" / "CARD.md").data
    assert data.license == "other" and data.license_name == "two: words"
    assert data.pipeline_tag == "text-generation"
    assert {"edgeforge", "onnx", "llama"} <= set(data.tags)
    assert "| author | somebody |" in (made.out / "onnx" / "CARD.md").read_text()


def test_sizes_and_formats_are_the_manifests(made):
    manifest = Manifest.read(made.out / "onnx")
    data = json.loads((made.out / "onnx" / "card.json").read_text())
    assert sum(row["weights"] for row in data["formats"]) == len(manifest.weights)
    stored = sum(row["bytes"] for row in data["formats"])
    parameters = data["parameters"]
    assert 8 * stored / parameters == pytest.approx(manifest.bits_per_weight)


def test_nothing_of_a_name_acts(made, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEFORGE_CACHE", str(made.root / "cache"))
    folder = tmp_path / EVIL.replace("/", "_")
    shutil.copytree(made.checkpoint, folder)
    card = {"license": EVIL, "author": f"{EVIL}\n# heading\n---\n"}
    (folder / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n")
    out = tmp_path / "out"
    export(open_model(str(folder)), [find_target("onnx")], out, ExportOptions(context=64))
    text = (out / "CARD.md").read_text(encoding="utf-8")
    assert "\u202e" not in text
    seen = MarkdownIt("gfm-like", {"html": True, "linkify": False}).parse(body(text))
    kinds = {each.type for token in seen for each in (token, *(token.children or ()))}
    assert not kinds & {"link_open", "image", "html_inline"}
    headings = [b.content for a, b in pairwise(seen) if a.type == "heading_open"]
    assert [each for each in headings if "heading" in each] == []
    plain = MarkdownIt("gfm-like", {"html": True, "linkify": False})
    other = plain.parse(body((made.before / "onnx" / "CARD.md").read_text()))
    assert [each.type for each in seen] == [each.type for each in other]
    assert ModelCard.load(out / "CARD.md").data.license == "other"


def test_a_card_of_somebody_else_stays_and_is_not_removed(made, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEFORGE_CACHE", str(made.root / "cache"))
    folder = tmp_path / "out"
    shutil.copytree(made.before / "onnx", folder)
    (folder / "CARD.md").write_text("mine")
    assert strange_file(folder) == "CARD.md"
    verify(folder, VerifyOptions(tokens=64, timed=False, checkpoint=str(made.checkpoint)))
    assert (folder / "CARD.md").read_text() == "mine"
    assert json.loads((folder / "card.json").read_text())["verified"]["tokens"] == 64


@pytest.mark.parametrize("target", ["onnx", "coreml"])
def test_what_a_card_tells_to_open_is_there(made, target):
    folder = made.out / target
    manifest = Manifest.read(folder)
    text = (folder / "CARD.md").read_text()
    usage = text.partition("## How to run it")[2].partition("## How to repeat")[0]
    named = set(re.findall(r"`((?:model|tokenizer)\.[\w.]+)`", usage))
    assert all((folder / Path(name)).exists() for name in named) and named
    if target == "coreml":
        keys = set(re.findall(r'"(\w+)":', usage)) | set(re.findall(r'for: "(\w+)"', usage))
        outputs = {name.rpartition(".")[2] for name in manifest.outputs}
        assert keys == {*manifest.inputs, *outputs}
