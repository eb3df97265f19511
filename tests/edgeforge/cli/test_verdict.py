"""What verify prints: a verdict first, 80 columns always, nothing cut or folded."""

from __future__ import annotations

import io
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.cells import cell_len

from device_harness.timing import Timings
from edgeforge.cli.verdict import labelled, print_results, short, summary_lines, verdict_lines
from edgeforge.verification.bounds import Bound, decide
from edgeforge.verification.evaluation import Evaluation
from edgeforge.verification.finite import NotFinite
from edgeforge.verification.greedy import GreedyAgreement
from edgeforge.verification.intervals import DivergenceIntervals, Interval, Intervals
from edgeforge.verification.metrics import Divergence, Perplexity
from edgeforge.verification.routing import Routing
from edgeforge.verification.shipped import Shipped

NAN = float("nan")
THREE = DivergenceIntervals(
    Interval(2.05e-6, 2.25e-6), Interval(0.9988, 0.9991), Interval(0.98, 0.99)
)
INTERVALS = Intervals(
    level=0.95,
    unit_blocks=1,
    units=16,
    resamples=4000,
    perplexity={name: Interval(13.4, 21.2) for name in ("float", "quantized", "artifact")},
    perplexity_ratio=Interval(1.0286, 1.0427),
    quantization=THREE,
    lowering=THREE,
    total=THREE,
)
DIVERGENCE = Divergence(8192, 2.15e-6, 1e-5, 4e-5, 0.9989, 0.985, 0.03, 0.01, 40.0)
RESULT = Evaluation(
    target="onnx",
    recipe="int4",
    runtime="onnxruntime 1.32.0 (CPU, 2 threads)",
    text="the demo model's held-out text",
    tokens=8192,
    block=512,
    text_tokens=132_183,
    perplexity={
        "float": Perplexity(20.0, 8176),
        "quantized": Perplexity(20.6, 8176),
        "artifact": Perplexity(20.708, 8176),
    },
    quantization=DIVERGENCE,
    lowering=DIVERGENCE,
    total=DIVERGENCE,
    intervals=INTERVALS,
    not_finite={},
    greedy_quantized=GreedyAgreement(8, 48, 40.5),
    greedy_float=GreedyAgreement(8, 48, 4.5),
    stored_weights_equal=True,
    bits_per_weight=4.598,
    artifact_bytes=638_700_000,
    timings=Timings("onnxruntime", 0.1, 0.02, 128, 4789.0, 32, 1335.4, 15_000_000, 84_000_000),
)
COREML = replace(
    RESULT,
    target="coreml",
    runtime="EdgeForge's interpreter of the Core ML package (fp16 rounding), not Apple's runtime",
    limits=("whether Core ML's own compiler accepts the package",),
)
EXECUTORCH = replace(RESULT, target="executorch", runtime="executorch 1.4.1 (XNNPACK on CPU)")
THREE_TARGETS = (COREML, EXECUTORCH, RESULT)
LONG = "a-recipe-of-somebody-with-a-name-that-goes-on-for-longer-than-a-whole-line-of-a-terminal"


def named(*results: Evaluation) -> dict[Path, Evaluation]:
    return {Path(f"out/demo/{index}"): result for index, result in enumerate(results)}


def plain(*results: Evaluation, asked: str = "out/demo") -> list[str]:
    lines = [line.plain for line in summary_lines(labelled(named(*results)), [Path(asked)])]
    assert max(map(cell_len, lines)) <= 80, max(lines, key=cell_len)
    assert not any(line != line.rstrip() for line in lines)
    return lines


def test_three_targets_stand_side_by_side():
    lines = plain(*THREE_TARGETS)
    assert lines[:6] == [
        "coreml      SOUND  weights bit-exact; ran in an interpreter; perplexity x 1.035",
        "executorch  SOUND  weights bit-exact; ran in executorch; perplexity x 1.035",
        "onnx        SOUND  weights bit-exact; ran in onnxruntime; perplexity x 1.035",
        "",
        "recipe int4           coreml              executorch          onnx",
        "perplexity / FLOAT's  1.0354              1.0354              1.0354",
    ]
    low = "[2.05e-6, 2.25e-6]"
    assert f"{' ' * 22}{low}  {low}  {low}" in lines
    assert "size; decode speed    638.7 MB            638.7 MB            638.7 MB" in lines
    assert f"{' ' * 22}{'1335 tokens/s       ' * 3}".rstrip() in lines
    told = " ".join(lines)
    assert "Quantization error: what rounding the weights costs." in told
    assert "Lowering error: what the runtime's own arithmetic adds." in told
    assert "8,192 of the 132,183 tokens" in told and "95 % intervals" in told
    assert "coreml ran in EdgeForge's interpreter, not in Apple's runtime." in lines
    assert lines[-2].startswith("edgeforge verify out/demo --full ")
    assert lines[-1].startswith("edgeforge verify out/demo --tokens all ")


@pytest.mark.parametrize(
    ("rounds", "lowering", "quantization", "told"),
    [
        (True, 1.4e-2, 0.41, True),
        (True, 2e-3, 0.41, False),  # far below the quantization error
        (True, 2e-3, 0.01, True),
        (True, 2e-4, 3e-4, False),
        (False, 1.4e-2, 0.41, False),  # something else than rounded activations
    ],
)
def test_rounded_activations_that_cost_much_are_told(rounds, lowering, quantization, told):
    result = replace(
        RESULT,
        rounds_activations=rounds,
        lowering=replace(DIVERGENCE, kl_mean=lowering),
        quantization=replace(DIVERGENCE, kl_mean=quantization),
    )
    assert ("export --activations float" in " ".join(plain(result))) is told


def test_one_artifact_has_its_intervals_beside_the_means():
    lines = plain(RESULT)
    assert lines[0].startswith("onnx  SOUND  weights bit-exact; ran in onnxruntime;")
    assert "perplexity / FLOAT's  1.0354              [1.0286, 1.0427]" in lines
    assert "size; decode speed    638.7 MB            1335 tokens/s" in lines
    assert not any("interpreter" in line for line in lines)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_every_artifact_is_in_every_figure(count):
    results = [
        replace(RESULT, recipe=f"int{index}", artifact_bytes=(index + 1) * 1_000_000)
        for index in range(count)
    ]
    lines = plain(*results)
    verdicts = [line for line in lines if "SOUND  " in line]
    assert len(verdicts) == count
    for index in range(count):
        assert sum(f"{index + 1}.0 MB" in line for line in lines) == 1
    # Under each other where there is no room side by side.
    assert sum(line.startswith("perplexity / FLOAT's") for line in lines) == (
        count if count > 3 else 1
    )


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("recipe", ["int4-g128-gptq-asym", LONG, "漢字" * 30])
def test_long_names_are_never_cut(count, recipe):
    same = plain(*(replace(each, recipe=recipe) for each in (*THREE_TARGETS, RESULT)[:count]))
    other = [replace(RESULT, recipe=f"{recipe}{index}") for index in range(count)]
    for lines in (same, plain(*other)):
        assert recipe in "".join(line.removeprefix("recipe ").strip() for line in lines)
    assert all(f"{recipe}{index}" in "".join(map(str.strip, lines)) for index in range(count)) or (
        count == 1
    )


def test_artifacts_that_only_their_folders_tell_apart():
    lines = plain(RESULT, RESULT)
    assert [line for line in lines if line.startswith("out/demo/")][:2] == [
        "out/demo/0",
        "out/demo/1",
    ] or [line.split()[0] for line in lines[:2]] == ["out/demo/0", "out/demo/1"]


def test_names_cannot_command_the_terminal():
    lines = plain(replace(RESULT, recipe="x\x1b[2J", text="y\x1b[2J.txt"))
    assert "\x1b" not in "".join(lines) and any("x\\x1b[2J" in line for line in lines)


@pytest.mark.parametrize("wide", ["a folder", "x" * 70, "two\nlines"])
def test_the_next_command_can_be_typed(wide):
    lines = plain(*THREE_TARGETS, asked=wide)
    folder = {"a folder": "'a folder'"}.get(wide, "DIR")
    assert lines[-2].startswith(f"edgeforge verify {folder} --full ")


def test_what_is_not_finite_is_the_verdict():
    divergence = replace(DIVERGENCE, kl_mean=NAN)
    bad = replace(
        RESULT,
        not_finite={"artifact": NotFinite(7, 9, 0, 2)},
        perplexity=RESULT.perplexity | {"artifact": Perplexity(float("inf"), 9)},
        lowering=divergence,
        total=divergence,
        intervals=replace(
            INTERVALS,
            perplexity_ratio=Interval(NAN, NAN),
            total=replace(THREE, kl_mean=Interval(NAN, NAN)),
        ),
    )
    lines = plain(COREML, bad)
    assert lines[1] == ("onnx    NOT FINITE  NaN or inf in ARTIFACT at 7 of 9; weights bit-exact")
    assert any(line.endswith(" inf") for line in lines)
    assert not any("[nan" in line for line in lines)
    for where in ("float", "quantized"):
        found = {name: NotFinite(7, 9, 0, 2) for name in (where, "artifact")}
        first = replace(bad, target="executorch", not_finite=found)
        assert plain(first)[0] == (
            f"executorch  NOT FINITE  NaN or inf in {where.upper()} at 7 of 9; weights bit-exact"
        )


def test_weights_unlike_the_stores_are_the_verdict():
    other = replace(RESULT, stored_weights_equal=False, weights_unlike_store=("a", "b"))
    assert plain(COREML, other)[1] == (
        "onnx    OTHER WEIGHTS  2 weights unlike the store's; ran in onnxruntime"
    )


def test_greedy_text_that_is_not_finite_is_the_verdict():
    other = replace(RESULT, greedy_float=replace(RESULT.greedy_float, not_finite=3))
    assert plain(COREML, other)[1] == (
        "onnx    NOT FINITE  NaN or infinite logits in greedy text; weights bit-exact"
    )


def test_what_is_not_known_is_not_printed():
    bare = replace(RESULT, timings=None, intervals=None, tokens=132_183)
    told = "\n".join(plain(bare, replace(bare, target="coreml")))
    assert "tokens/s" not in told and "decode" not in told
    assert "too little text for 95 % intervals" in told and "[1." not in told
    assert "Measured on all 132,183 tokens" in told and "--tokens all" not in told
    rough = replace(RESULT, intervals=replace(INTERVALS, unit_blocks=0.5))
    assert "rough 95 % intervals" in " ".join(plain(rough))


def test_no_difference_is_no_interval():
    none = replace(DIVERGENCE, kl_mean=0.0, top1_agreement=1.0)
    alike = replace(THREE, kl_mean=Interval(0, 0), top1_agreement=Interval(1, 1))
    lines = plain(
        replace(RESULT, total=none, intervals=replace(INTERVALS, total=alike)),
    )
    assert "KL from FLOAT         0                   no difference seen" in lines
    assert "same top-1 as FLOAT   100.0 %             no difference seen" in lines


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1e-3, "0.00100"),
        (9.99e-4, "9.99e-4"),
        (1.0, "1.00"),
        (99.94, "99.9"),
        (99.96, "100"),
        (12345.6, "12346"),
        (3.2e7, "3.20e7"),
        (float("inf"), "inf"),
        (NAN, "nan"),
    ],
)
def test_three_digits(value, text):
    assert short(value) == text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def printed(monkeypatch, stream, columns: int, full: bool = False) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys, "stdout", stream)
    print_results(named(*THREE_TARGETS), [Path("out/demo")], full=full)
    return stream.getvalue()


@pytest.mark.parametrize("columns", [80, 120, 200])
def test_the_terminals_width_changes_nothing(monkeypatch, columns):
    monkeypatch.setenv("NO_COLOR", "1")
    lines = [
        line.plain for line in summary_lines(labelled(named(*THREE_TARGETS)), [Path("out/demo")])
    ]
    assert printed(monkeypatch, Terminal(), columns).splitlines() == lines
    assert printed(monkeypatch, io.StringIO(), columns).splitlines() == lines


def test_colour_is_for_terminals_that_want_it(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    shown = printed(monkeypatch, Terminal(), 80)
    assert "\x1b[1;32mSOUND\x1b[0m" in shown
    # Bold, green and red alone: the others vanish on a dark or on a light background.
    assert set(re.findall(r"\x1b\[([\d;]*)m", shown)) == {"1", "1;32", "0"}
    assert "\x1b" not in printed(monkeypatch, io.StringIO(), 80)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in printed(monkeypatch, Terminal(), 80)


def test_full_prints_every_figure_unfolded_where_there_is_no_terminal(monkeypatch):
    shown = printed(monkeypatch, io.StringIO(), 80, full=True)
    lines = shown.splitlines()
    assert [line.plain for line in verdict_lines(labelled(named(*THREE_TARGETS)))] == lines[:3]
    for row in (
        "perplexity QUANTIZED",
        "KL p99 / max",
        "top-5 overlap",
        "tokens before it leaves FLOAT's",
        "stored integers and scales",
        "time to first token",
        "peak memory",
    ):
        assert any(line.strip().startswith(row) for line in lines)
    (line,) = (line for line in lines if line.startswith(" perplexity ARTIFACT / FLOAT"))
    assert line.count("1.0354  [1.0286, 1.0427]") == 3
    assert "  - whether Core ML's own compiler accepts the package" in lines


CHECKS = (
    decide(Bound("float.perplexity", 646.2, "at most"), 21.681, (20.1, 23.9)),
    decide(Bound("lowering.kl_mean", 0.02, "at most"), 2.37e-4, (2.18e-4, 2.54e-4)),
    decide(Bound("lowering.perplexity_ratio", 1.05, "at most"), 1.0012),
    decide(Bound("shipped.kl_max", 0.0119, "at most"), 1.7812, where=["position 748"]),
    decide(Bound("lowering.top1_agreement", 0.9, "at least"), 0.91, (0.88, 0.94), tokens=2048),
)


def test_every_bound_stands_beside_its_figure():
    lines = plain(*(replace(each, checks=CHECKS) for each in THREE_TARGETS))
    assert lines[0] == "coreml      FAILED  shipped.kl_max out of bounds; weights bit-exact"
    first = lines.index("bounds                     coreml            executorch        onnx")
    assert lines[first + 1 : first + 6] == [
        f"float.perplexity           {'21.7 <646 ok      ' * 3}".rstrip(),
        f"lowering.kl_mean           {'2.37e-4 <0.02 ok  ' * 3}".rstrip(),
        f"lowering.perplexity_ratio  {'1.00 <1.05 ok     ' * 3}".rstrip(),
        f"shipped.kl_max             {'1.78 <0.0119 FAIL ' * 3}".rstrip(),
        f"lowering.top1_agreement    {'0.91 >0.9 ?       ' * 3}".rstrip(),
    ]
    told = " ".join(" ".join(lines).split())
    assert "onnx: in doubt: lowering.top1_agreement is 0.91 [0.88, 0.94], and must be" in told
    assert "tokens would settle it." in told


@pytest.mark.parametrize("count", [1, 4])
def test_bounds_of_any_number_of_artifacts_fit(count):
    results = [replace(RESULT, recipe=f"int{index}", checks=CHECKS) for index in range(count)]
    lines = plain(*results)
    assert sum(line.startswith("shipped.kl_max") for line in lines) == count


@pytest.mark.parametrize("value", [1e-12, 9.996e-4, 0.012345, 123.456, 12345.6, 9e7, 1e300])
@pytest.mark.parametrize("limit", [1e-5, 9.53e-4, 0.0119, 1.001, 646.2, 20000.0])
def test_no_cell_is_too_wide(value, limit):
    checked = decide(Bound("shipped.kl_max", limit, "at most"), value)
    lines = plain(*(replace(each, checks=(checked,)) for each in THREE_TARGETS))
    assert sum(("FAIL" in line) or (" ok" in line) for line in lines if "kl_max" in line) >= 1


def test_what_ships_is_told_with_its_positions():
    shipped = Shipped(
        text="the first 4,096 tokens of a text",
        context=8192,
        reached=4096,
        passes=4,
        prefill=replace(DIVERGENCE, tokens=17),
        decode=replace(DIVERGENCE, tokens=71),
        kl_mean=2.29e-4,
        kl_max=1e-3,
        interval=Interval(1.81e-4, 2.91e-4),
        all_positions=replace(DIVERGENCE, tokens=46, max_difference=0.0954),
        entropy=3.4,
        not_finite=0,
        worst=(),
        furthest=(),
    )
    lines = plain(replace(RESULT, shipped=shipped))
    assert "  of what ships       2.29e-4             [1.81e-4, 2.91e-4]" in lines
    told = " ".join(" ".join(lines).split())
    assert "What ships ran over the first 4,096 tokens of a text, as an app runs it." in told
    assert "It did not run at positions 4096 to 8191 of the declared context" in told
    assert (
        "onnx: 88 of its positions are held against QUANTIZED, and 46 against the graph of all "
        "positions, whose logits differ by up to 0.0954."
    ) in told
    own = replace(DIVERGENCE, kl_mean=0.0074)
    routing = Routing(
        256, 10, agreement=0.98, router=0, gap=0.07, own=own, place="layer 0", apart=5
    )
    told = " ".join(" ".join(plain(replace(RESULT, shipped=shipped, routing=routing))).split())
    assert "by up to 0.0954; at 5 others the two graphs chose other experts there" in told
    assert "onnx: 10 of 256 tokens chose other experts than QUANTIZED's" in told
    assert "with QUANTIZED's own it is 0.0074." in told
