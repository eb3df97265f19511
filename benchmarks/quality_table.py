"""Measures each algorithm at 8, 4, 3 and 2 bits: size, and error on held-out text with intervals.

Every matrix has the same format and group size; mixed plans choose formats and may take as many
bytes as the uniform format above them. Calibrated algorithms use the calibration text that ships
with EdgeForge, which shares no passage with the measured text. Where a row is impossible, a line
says why. The column "excess" is the perplexity's excess over FLOAT's, as a share of RTN's excess.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from judging import Judge, Scores, filled_store
from pages import add_page_option, write_block
from plans import mixed_plan, parameters, stored_bytes, uniform_plan
from tables import line_up

from edgeforge.calibration.text import CalibrationOptions, draw_calibration
from edgeforge.model.model import HELDOUT, Model, open_model
from edgeforge.model.rotated_weights import rotate
from quant.errors import QuantizationError
from quant.plans.plan import QuantPlan
from quant.program.program import Program

HEADER = [
    *("bits, algorithm", "bits a weight", "MB", "KL mean", "KL p99"),
    *("perplexity x", "top-1 %", "excess", "s"),
]
WIDTHS = [22, 13, 6, 17, 15, 15, 12, 6, 5]
# By the row's title: the algorithm's name, and whether weights are rotated first.
ALGORITHMS = {
    "RTN": ("rtn-minmax", False),
    "scale search": ("rtn", False),
    "AWQ": ("awq", False),
    "GPTQ": ("gptq-order", False),
    "GPTQ + rotation": ("gptq-order", True),
}
MIXED = {"mixed": "mixed", "mixed, GPTQ": "mixed-gptq"}
ROTATION = "hadamard"


@dataclass(frozen=True)
class Prepared:
    """The model to quantize, perhaps rotated, with its program and its plan."""

    model: Model
    program: Program
    plan: QuantPlan


def main() -> None:
    """Reads the arguments, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", type=Path, default=HELDOUT)
    parser.add_argument("--tokens", type=int, default=24576)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3, 2])
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument(
        "--zero-points", action="store_true", help="groups with a zero point, not symmetric ones"
    )
    parser.add_argument("--targets", nargs="+", default=["onnx", "coreml"], help="of mixed plans")
    add_page_option(parser)
    options = parser.parse_args()
    model = open_model(options.model)
    calibration = draw_calibration(model, CalibrationOptions(), model.spec.max_context)
    judge = Judge.of_text(model, options.text, options.tokens, calibration.length)
    print(f"{options.model}, {judge.title()}")
    print(line_up(HEADER, WIDTHS))
    rows = [HEADER]
    for bits in options.bits:
        format = f"int{bits}-g{options.group}" + ("-asym" if options.zero_points else "")
        baseline: Scores | None = None
        for title in (*ALGORITHMS, *MIXED):
            try:
                made = prepare(judge, title, format, options.targets)
            except QuantizationError as error:
                print(f"{bits}, {title}: left out: {error}", flush=True)
                continue
            with filled_store(made.model, made.program, made.plan, calibration) as filled:
                scores = judge.judge_store(made.program, made.plan, filled.store)
            if title == "RTN":
                baseline = scores
            size = stored_bytes(made.model, made.plan)
            cells = [
                f"{bits}, {title}",
                f"{8 * size / parameters(model):.3f}",
                f"{size / 1e6:.3f}",
                scores.kl_mean.show(5),
                scores.kl_p99.show(4),
                scores.perplexity_ratio.show(4),
                scores.agreement.show(2, 0.01),
                "-" if baseline is None else f"{excess(scores) / excess(baseline):.2f}",
                f"{filled.seconds:.1f}",
            ]
            rows.append(cells)
            print(line_up(cells, WIDTHS), flush=True)
    if options.page:
        write_block(options.page, rows, f"{options.model}, {judge.title()}.")


def excess(scores: Scores) -> float:
    """Returns the perplexity's excess over FLOAT's, as a share of FLOAT's."""
    return scores.perplexity_ratio.value - 1


def prepare(judge: Judge, title: str, format: str, targets: list[str]) -> Prepared:
    """Returns the model, program and plan of a row.

    Raises:
        QuantizationError: the format or the algorithm does not suit the model.
    """
    model, program = judge.model, judge.program
    if title in MIXED:
        room = stored_bytes(model, uniform_plan(model, title, format, None))
        return Prepared(model, program, mixed_plan(model, MIXED[title], room, targets))
    algorithm, rotated = ALGORITHMS[title]
    if rotated:
        turned = rotate(model, ROTATION, program.context)
        model, program = turned.model, turned.program
    return Prepared(model, program, uniform_plan(model, title, format, algorithm))


if __name__ == "__main__":
    main()
