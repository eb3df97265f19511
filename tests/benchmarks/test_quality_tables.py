"""The tables with models side by side, and the picture, from measurements."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

PAGE = "".join(
    f"<!-- begin {name} -->\n<!-- end {name} -->\n"
    for name in ("recipes", "peers", "equal-bytes", "chat", "curves")
)


@pytest.fixture
def tables(benchmark):
    return benchmark("quality_tables")


@pytest.fixture
def one(benchmark):
    """Makes a measurement with this mean divergence."""
    measurements, judging = benchmark("measurements"), benchmark("judging")

    def make(name, kind, bits, kl, *, chat=False, refused=""):
        if refused:
            return measurements.refused_now(name, kind, refused, {})
        noise = np.random.default_rng(5).random((8, 256))
        noise /= noise.mean()

        def text(factor):
            scores = judging.Scores(factor * kl * noise, np.full(8, 0.1), np.full(8, 0.9))
            return measurements.OnText(2048, 21.0, scores)

        texts = {"held-out": text(1.0)} | ({"chat": text(0.5)} if chat else {})
        return measurements.made_now(name, kind, 1000, 1000 * bits, 1.0, texts, {})

    return make


@pytest.fixture
def found(one):
    demo = [
        one("int4", "data-free", 4.6, 0.04),
        one("int4-pc", "data-free", 4.1, 0.08),
        one("int4-gptq on its own text", "own text", 4.6, 0.025),
        one("int4-gptq", "calibrated", 4.6, 0.02),
        one("mixed at 4.5 bits", "mixed", 4.5, 0.03),
        one("genai builder default", "peer", 4.5, 0.045),
        one("llama.cpp Q4_0", "peer", 4.9, 0.03),
        one("llama.cpp Q8_0", "peer", 8.5, 0.0002),
        one("torchao 8da4w g128", "peer", 4.125, 0.09),
    ]
    smollm2 = [
        one("int4", "data-free", 4.6, 0.4, chat=True),
        one("genai builder default", "peer", 4.5, 0.3, chat=True),
        one("torchao 8da4w g128", "peer", 0, 0, refused="576 columns"),
    ]
    by_model = {"demo": demo, "smollm2": smollm2}
    return {model: {m.contender: m for m in given} for model, given in by_model.items()}


def cells(rows, title):
    (row,) = [row for row in rows if row[0] == title]
    return row[1:]


def test_a_peer_meets_the_best_recipe_at_no_more_bytes(tables, found):
    rows = tables.equal_bytes(found)
    bits, plain, own, mixed, calibrated, *_ = cells(rows, "llama.cpp Q4_0")
    assert bits == "4.900"
    assert plain.startswith("**+33 ") and plain.endswith("`int4`")  # 0.04 against 0.03
    assert own.startswith("-17 ") and own.endswith("`int4-gptq` on its own text")
    assert mixed.startswith(("-0 ", "0 "))
    assert calibrated.startswith("-33 ")
    # At 4.5 bits int4 is too large; the smaller recipe meets the peer.
    assert cells(rows, "genai builder default")[1].endswith("`int4-pc`")
    # What takes 4.6 bits says nothing against 8.5.
    assert cells(rows, "llama.cpp Q8_0")[:5] == ["8.500", "-", "-", "-", "-"]
    # A peer that cannot hold a model, and one that was not measured.
    assert cells(rows, "torchao 8da4w g128")[5:] == ["-"] * 5
    assert cells(rows, "llama.cpp Q4_0")[5:] == ["-"] * 5


def test_models_stand_side_by_side_and_a_dash_is_what_cannot_be(tables, found):
    rows = tables.TABLES["peers"].rows(found)
    assert len({len(row) for row in rows}) == 1
    assert rows[0][1] == "demo: bits" and rows[0][5] == "SmolLM2-135M: bits"
    assert cells(rows, "genai builder default")[:3:2] == ["4.500", "90.0 ±0.0"]
    assert cells(rows, "torchao 8da4w g128")[4:] == ["-"] * 4
    own = [row[0] for row in tables.TABLES["recipes"].rows(found)]
    assert own == [
        *("", "`int4`", "`int4-pc`", "`int4-gptq` on its own text", "`mixed` at 4.5 bits"),
        "`int4-gptq`",
    ]


def test_curves_give_each_side_its_best_within_the_bits(tables, found):
    rows = tables.curves(found)
    assert [cell.split(" ")[-1] for cell in cells(rows, "EdgeForge, weights alone")[:3]] == [
        *("-", "`int4-pc`", "`int4`")
    ]
    assert cells(rows, "torchao")[0] == "-"
    assert cells(rows, "onnxruntime")[3] == "-"
    assert cells(rows, "onnxruntime")[4].startswith("0.3")


def test_chat_shows_models_with_a_template_only(tables, found):
    rows = tables.chat(found)
    assert [row[0] for row in rows[1:]] == [
        *("SmolLM2-135M, `int4`", "SmolLM2-135M, genai builder default")
    ]
    held, talk = rows[1][2], rows[1][3]
    assert held.startswith("0.4") and talk.startswith("0.2")


def test_the_page_says_when_and_where_it_was_measured(tables, found, tmp_path, monkeypatch):
    (tmp_path / "quality.md").write_text(PAGE)
    write = tables.write_block
    monkeypatch.setattr(tables, "write_block", lambda *a, **k: write(*a, **k, folder=tmp_path))
    days = iter(["2026-01-02", "2026-01-05"])
    demo = found["demo"]
    for name in ("int4", "llama.cpp Q4_0"):
        changed = {**vars(demo[name]), "day": next(days), "machine": "Fast 9000, 2 cores used"}
        demo[name] = type(demo[name])(**changed)
    only = {"demo": {name: demo[name] for name in ("int4", "llama.cpp Q4_0")}}
    for name in tables.TABLES:
        tables.write_table(name, only)
    text = (tmp_path / "quality.md").read_text()
    assert text.count("Measured on 2026-01-02 to 2026-01-05 on Fast 9000, 2 cores used, by ") == 4
    assert "$ make bench-quality TABLES=equal-bytes\n" in text
    assert "demo: 2,048 held-out tokens, FLOAT perplexity 21.00;" in text
    # Nothing was measured on chat, so that block is as it was.
    assert "<!-- begin chat -->\n<!-- end chat -->" in text


def test_the_picture_is_svg_with_every_point_between_four_and_six_bits(tables, found, benchmark):
    text = benchmark("curve_picture").picture(tables.panels(found))
    root = ElementTree.fromstring(text)
    points = [e.text for e in root.iter("{http://www.w3.org/2000/svg}title")][1:]
    assert len(points) == 10
    assert "Q4_0: 4.90 bits, KL 0.03" in points
    lows = [
        float(e.get("cy"))
        for e in root.iter("{http://www.w3.org/2000/svg}circle")
        if e.find("{http://www.w3.org/2000/svg}title") is not None
    ]
    assert all(30 <= y <= 300 for y in lows)
    assert len(text) < 20_000


def test_every_block_of_the_page_has_a_table_that_writes_it(tables, benchmark):
    pages, demo = benchmark("pages"), benchmark("demo_tables")
    blocks = {name for name, page in pages.blocks().items() if page.name == "quality.md"}
    assert blocks == {*tables.TABLES, *demo.DEMO_TABLES}
