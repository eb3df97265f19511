"""Accuracy a byte beside onnxruntime's and llama.cpp's weight quantizers: same model, same text.

Every matrix becomes what each quantizer makes of it, and the weights that its integers stand for
run through the reference operators, as EdgeForge's own do. No kernel takes part, so what differs is
the choice of formats, integers and scales alone. Bits are of the bytes of all matrices as they are
stored, scales and zero points included; vectors are left in float32 on all sides.

The peers look at weights alone. Of EdgeForge's, ``data-free`` does too: the best of the recipes
that take no more bytes than the peer. ``mixed`` chooses formats on the calibration text, at the
peer's own bytes, and rounds to nearest; ``mixed-gptq`` chooses integers on it as well. Formats are
those that the first of the targets holds for which the budget is not too small.
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
    """A contender, judged: stored bits a weight of the matrices, and the scores."""

    name: str
    bits: float
    scores: Scores

    def cells(self) -> list[str]:
        """As `HEADER` has them."""
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
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", type=Path, default=HELDOUT)
    parser.add_argument("--tokens", type=int, default=12288)
    parser.add_argument("--groups", type=int, nargs="+", default=[32, 128])
    parser.add_argument(
        "--llama-cpp", type=Path, help="a checkout of llama.cpp, or of ggml: its rows need it"
    )
    parser.add_argument("--skip-onnxruntime", action="store_true")
    parser.add_argument(
        "--targets", nargs="+", default=["onnx", "coreml"], help="of mixed plans, the first first"
    )
    parser.add_argument("--only", nargs="+", default=[""], help="peers with one of these in names")
    parser.add_argument("--recipes", nargs="+", help="of EdgeForge, by name; all that fit if left")
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
        parser.error("no peer is left: give --llama-cpp, leave out --skip-onnxruntime or --only")
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
        "\nat no more bytes than each peer; below 0 EdgeForge is nearer to FLOAT; intervals are of "
        "the paired ratio"
    )
    print_rows(rows)


def versus(ours: Row | None, peer: Row) -> str:
    """How far our divergence lies above the peer's, and by which recipe."""
    if ours is None:
        return "-"
    name = "" if ours.name.startswith("mixed") else f"{ours.name} "
    return f"{name}{ours.scores.kl_above(peer.scores).show(1, 0.01)} %"


def peers_of(
    model: Model, arena: "Arena", options: argparse.Namespace
) -> Iterator[tuple[str, Quantize]]:
    """The peers' quantizers by name."""
    weights = arena.weights
    if not options.skip_onnxruntime:
        if importlib.util.find_spec("onnx_ir") is None:
            raise SystemExit(
                "onnxruntime's quantizers need onnx_ir, of the extra [bench]: install it, or use "
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
        print("llama.cpp is left out: give a checkout of it with --llama-cpp FOLDER")
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
    """EdgeForge's recipes of integers and palettes, calibrated ones among them, by rising size."""
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
            continue  # groups that this model's rows do not have
        matrices = [given for name, given in plan.weights.items() if len(shapes[name]) > 1]
        if not all(is_quantized(given.format) for given in matrices):
            continue
        if not calibrated_weights(plan) or recipe.name in CALIBRATED:
            plans.append(plan)
    plans = [plan for plan in plans if wanted is None or plan.recipe in wanted]
    yield from sorted(plans, key=lambda plan: plan.bits_per_weight(shapes))


class Arena:
    """The judge, the weights, and what is judged so far."""

    def __init__(self, model: Model, text: Path, tokens: int, targets: list[str]) -> None:
        self._model, self._targets = model, targets
        calibration = CalibrationOptions()
        self._calibration = draw_calibration(model, calibration, model.spec.max_context)
        self.judge = Judge(model, text, tokens, self._calibration.length)
        self.weights = {
            name: model.weights.float_weight(name)
            for name, shape in model.weights.shapes().items()
            if len(shape) == 2
        }
        self.parameters = parameters(model, vectors=False)

    def peer(self, name: str, quantize: Quantize) -> Row:
        """A peer's row."""
        found, stored = {}, 0.0
        for weight, values, bits in quantize():
            found[weight] = values
            stored += bits
        assert found.keys() == self.weights.keys()
        return Row(name, stored / self.parameters, self.judge.judge(found))

    def recipe(self, plan: QuantPlan) -> Row:
        """The row of a plan."""
        program = self.judge.program
        with filled_store(self._model, program, plan, self._calibration) as filled:
            scores = self.judge.judge_store(program, plan, filled.store)
        bits = 8 * stored_bytes(self._model, plan, vectors=False) / self.parameters
        return Row(plan.recipe, bits, scores)

    def mixed(self, recipe: str, nbytes: int) -> Row | None:
        """The row of a mixed plan whose matrices take so many bytes at most; None: none does."""
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
