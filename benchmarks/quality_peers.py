"""Compares accuracy at equal bytes with onnxruntime's and llama.cpp's weight quantizers.

Each quantizer quantizes every matrix of the same model, and the stored values run through the
reference operators on the same text, as EdgeForge's own do. No runtime's kernel takes part, so only
the choice of formats, integers and scales differs. Bits count the stored bytes of all matrices,
scales and zero points included; vectors stay float32 on all sides.

The peers use no calibration text. Nor does the column ``data-free``: it is the best of EdgeForge's
recipes without calibration that take no more bytes than the peer. ``mixed`` chooses formats on the
calibration text, at the peer's own bytes, and rounds to nearest; ``mixed-gptq`` also chooses the
integers on that text. Mixed plans use the formats of the first target whose formats fit the budget.
"""

import argparse
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import ggml_quantizers
import onnxruntime_quantizers
import torch
from judging import Judge, Scores, filled_store
from pages import add_page_option, write_block
from plans import mixed_plan, parameters, stored_bytes, uniform_plan
from tables import line_up, print_rows

from edgeforge.calibration.text import CalibrationOptions, draw_calibration
from edgeforge.model.model import HELDOUT, Model, open_model
from quant.errors import QuantizationError
from quant.plans.plan import QuantPlan, calibrated_weights, is_quantized
from quant.plans.recipes import RECIPES

HEADER = ["quantizer", "bits", "KL mean", "KL p99", "perplexity x", "top-1 %"]
CALIBRATED = ("int4-g128-gptq", "int4-gptq", "int4-awq")
Quantize = Callable[[], Iterator[tuple[str, torch.Tensor, float]]]


@dataclass(frozen=True)
class Row:
    """A contender's row: its name, its matrices' stored bits per weight, and its scores."""

    name: str
    bits: float
    scores: Scores

    def cells(self) -> list[str]:
        """Returns the cells under `HEADER`."""
        scores = self.scores
        return [
            self.name,
            f"{self.bits:.4f}",
            scores.kl_mean.show(5),
            scores.kl_p99.show(4),
            scores.perplexity_ratio.show(4),
            scores.agreement.show(2, 0.01),
        ]


def main() -> None:
    """Reads the arguments, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", type=Path, default=HELDOUT)
    parser.add_argument("--tokens", type=int, default=12288)
    parser.add_argument("--groups", type=int, nargs="+", default=[32, 128])
    parser.add_argument(
        "--llama-cpp", type=Path, help="a checkout of llama.cpp or ggml, for llama.cpp's rows"
    )
    parser.add_argument("--skip-onnxruntime", action="store_true")
    parser.add_argument(
        "--targets",
        nargs="+",
        default=["onnx", "coreml"],
        help="targets of mixed plans, in order of preference",
    )
    parser.add_argument(
        "--only", nargs="+", default=[""], help="only peers whose names contain one of these texts"
    )
    parser.add_argument("--recipes", nargs="+", help="EdgeForge's recipes; by default all that fit")
    add_page_option(parser)
    options = parser.parse_args()
    model = open_model(options.model)
    arena = Arena(model, options.text, options.tokens, options.targets)
    print(f"{options.model}, {arena.judge.title()}")
    peers = [
        (name, quantize)
        for name, quantize in peers_of(model, arena, options)
        if any(part in name for part in options.only)
    ]
    if not peers:
        parser.error(
            "no peer is left: give --llama-cpp FOLDER, or leave out --skip-onnxruntime or --only"
        )
    widths = [max(28, *map(len, HEADER)), 7, 17, 15, 15, 12]
    print(line_up(HEADER, widths))
    judged: list[Row] = []
    for name, quantize in peers:
        try:
            judged.append(arena.peer(name, quantize))
            print(line_up(judged[-1].cells(), widths), flush=True)
        except ValueError as error:  # onnxruntime has bugs with odd numbers of groups
            print(f"{name} fails: {error}", flush=True)
    plain = []
    for recipe in recipes(model, options.recipes):
        row = arena.recipe(recipe)
        plain += [] if calibrated_weights(recipe) else [row]
        print(line_up(row.cells(), widths), flush=True)
    rows = [["mean KL above the peer's", "bits", "data-free", "mixed", "mixed-gptq"]]
    found: dict[tuple[int, str], Row | None] = {}
    for peer in sorted(judged, key=lambda row: row.bits):
        best = min(
            (row for row in plain if row.bits <= peer.bits + 1e-9),
            key=lambda row: row.scores.kl_mean.value,
            default=None,
        )
        line = [peer.name, f"{peer.bits:.4f}", versus(best, peer)]
        for recipe in ("mixed", "mixed-gptq"):
            nbytes = round(peer.bits * arena.parameters / 8)
            if (nbytes, recipe) not in found:
                found[nbytes, recipe] = row = arena.mixed(recipe, nbytes)
                if row is not None:
                    print(line_up(row.cells(), widths), flush=True)
            line.append(versus(found[nbytes, recipe], peer))
        rows.append(line)
    print(
        "\nmean KL at no more bytes than each peer: below 0, EdgeForge is nearer to FLOAT; the "
        "intervals are those of the paired ratio"
    )
    print_rows(rows)
    if options.page:
        write_block(
            options.page,
            rows,
            f"{options.model}, {arena.judge.title()}. A cell is the mean KL relative to the peer's "
            f"at no more bytes: below 0, EdgeForge is nearer to FLOAT. Intervals are of the paired "
            f"ratio.",
        )


def versus(ours: Row | None, peer: Row) -> str:
    """Returns our recipe's name and how far its divergence lies above the peer's, in percent."""
    if ours is None:
        return "-"
    name = "" if ours.name.startswith("mixed") else f"{ours.name} "
    return f"{name}{ours.scores.kl_above(peer.scores).show(1, 0.01)} %"


def peers_of(
    model: Model, arena: "Arena", options: argparse.Namespace
) -> Iterator[tuple[str, Quantize]]:
    """Yields the peers' quantizers with their names."""
    weights = arena.weights
    if not options.skip_onnxruntime:
        if importlib.util.find_spec("onnx_ir") is None:
            raise SystemExit(
                "onnxruntime's quantizers need onnx_ir: install the extra [bench], or use "
                "--skip-onnxruntime"
            )
        for group in options.groups:
            for symmetric in (True, False):
                kind = f"g{group}{'' if symmetric else ' asym'}"
                made = onnxruntime_quantizers.configurations(group, symmetric)
                for name, config in made.items():
                    yield (
                        f"onnxruntime {name} {kind}",
                        lambda g=group, s=symmetric, c=config: onnxruntime_quantizers.quantized(
                            weights, g, s, c
                        ),
                    )
    if options.llama_cpp is None:
        print("llama.cpp is left out: give a checkout with --llama-cpp FOLDER")
        return
    ggml = ggml_quantizers.Ggml(options.llama_cpp)
    for file_type in ggml_quantizers.FILE_TYPES:
        types = [
            (each.kind, name)
            for name, pieces in ggml_quantizers.types_of(model, file_type, ggml).items()
            for each in pieces
        ]
        counts = {kind: sum(k == kind for k, _ in types) for kind in sorted({k for k, _ in types})}
        print(f"llama.cpp {file_type}: " + ", ".join(f"{n} {kind}" for kind, n in counts.items()))
        yield (
            f"llama.cpp {file_type}",
            lambda f=file_type: ggml_quantizers.quantized(model, weights, f, ggml),
        )


def recipes(model: Model, wanted: list[str] | None) -> Iterator[QuantPlan]:
    """Yields EdgeForge's plans of integers and palettes, some calibrated, by rising size."""
    shapes, roles = model.weights.shapes(), model.weights.roles()
    plans = [
        uniform_plan(model, f"{format}-gptq", format, "gptq-order")
        for format in ("int4-g32", "int4-g32-asym", "int4-g128-asym")
    ]
    for recipe in RECIPES.values():
        try:
            plan = recipe.plan(shapes, roles)
            plan.check(shapes)
        except QuantizationError:
            continue  # the recipe's groups do not divide this model's matrices
        matrices = [given for name, given in plan.weights.items() if len(shapes[name]) > 1]
        if not all(is_quantized(given.format) for given in matrices):
            continue
        if not calibrated_weights(plan) or recipe.name in CALIBRATED:
            plans.append(plan)
    plans = [plan for plan in plans if wanted is None or plan.recipe in wanted]
    yield from sorted(plans, key=lambda plan: plan.bits_per_weight(shapes))


class Arena:
    """Judges peers, recipes and mixed plans on one model and one text."""

    def __init__(self, model: Model, text: Path, tokens: int, targets: list[str]) -> None:
        self._model, self._targets = model, targets
        calibration = CalibrationOptions()
        self._calibration = draw_calibration(model, calibration, model.spec.max_context)
        self.judge = Judge.of_text(model, text, tokens, self._calibration.length)
        self.weights = {
            name: model.weights.float_weight(name)
            for name, shape in model.weights.shapes().items()
            if len(shape) == 2
        }
        self.parameters = parameters(model, vectors=False)

    def peer(self, name: str, quantize: Quantize) -> Row:
        """Returns a peer's row."""
        found, stored = {}, 0.0
        for weight, values, bits in quantize():
            found[weight] = values
            stored += bits
        assert found.keys() == self.weights.keys()
        return Row(name, stored / self.parameters, self.judge.judge(found))

    def recipe(self, plan: QuantPlan) -> Row:
        """Returns the row of a plan."""
        program = self.judge.program
        with filled_store(self._model, program, plan, self._calibration) as filled:
            scores = self.judge.judge_store(program, plan, filled.store)
        bits = 8 * stored_bytes(self._model, plan, vectors=False) / self.parameters
        return Row(plan.recipe, bits, scores)

    def mixed(self, recipe: str, nbytes: int) -> Row | None:
        """Returns the row of a mixed plan whose matrices take at most ``nbytes`` bytes.

        Returns None where no plan does.
        """
        shapes = self._model.weights.shapes().values()
        vectors = sum(4 * shape[0] for shape in shapes if len(shape) == 1)
        try:
            plan = mixed_plan(self._model, recipe, nbytes + vectors, self._targets)
        except QuantizationError:
            return None
        row = self.recipe(plan)
        return replace(row, name=f"{recipe} at {row.bits:.2f}")


if __name__ == "__main__":
    main()
