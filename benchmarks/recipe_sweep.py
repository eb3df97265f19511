"""Measures recipes: bits per weight against the quantization error, on one model and one text.

The reference operators compute the FLOAT and QUANTIZED logits; no runtime takes part. The script
measures every recipe of ``edgeforge list recipes``, or those named: also files of rules, and
formats with an algorithm for every matrix, such as ``int3-g64:gptq-order``. Calibrated recipes use
the calibration text that ships with EdgeForge, which shares no passage with the measured text. The
column "excess" is the perplexity minus FLOAT's. The column "+-" is the standard error of the mean
KL over blocks of text, because tokens of one block are not independent. "Bits" are stored bits
divided by the number of the checkpoint's own weights, so matrices that a rotation adds count as
bits. FLOAT is never rotated.
"""

import argparse
import itertools
import math
from pathlib import Path

import torch
from judging import filled_store
from pages import add_page_option, write_block
from tables import line_up

from edgeforge.calibration.text import Calibration, CalibrationOptions, draw_calibration
from edgeforge.model.model import HELDOUT, Model, open_model
from edgeforge.model.rotated_weights import rotate
from edgeforge.model.rotations import ROTATIONS
from edgeforge.model.trace import trace
from edgeforge.reference.walk import ReferenceRunner, store_reader
from edgeforge.tokenizer import Tokenizer, read_text, split_blocks
from edgeforge.verification.metrics import DivergenceMeter, PerplexityMeter, Scored
from quant.plans.plan import QuantPlan, calibrated_weights
from quant.plans.recipes import RECIPES, find_recipe
from quant.plans.rules import Recipe, Rule
from quant.program.program import Program
from quant.program.rewrite import quantize_program

BLOCK = 256
HEADER = [
    *("recipe", "bits a weight", "MB", "KL mean", "+-", "KL p99"),
    *("top-1", "perplexity", "excess", "ratio", "seconds"),
]
WIDTHS = [30, 13, 7, 8, 7, 7, 7, 10, 7, 7, 7]


def main() -> None:
    """Reads the arguments, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="*", default=[*RECIPES])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", type=Path, default=HELDOUT)
    parser.add_argument("--tokens", type=int, default=24576)
    parser.add_argument("--calibration-tokens", type=int, default=None)
    parser.add_argument("--seed", type=int, default=0, help="seed of the calibration's draw")
    parser.add_argument(
        "--rotations",
        default="",
        help="also measure each recipe with these: `all`, or names separated by commas",
    )
    add_page_option(parser)
    options = parser.parse_args()
    model = open_model(options.model)
    tokenizer = Tokenizer(model.checkpoint.tokenizer_files.get("tokenizer.json"), options.model)
    tokens = tokenizer.encode(read_text(options.text), special=False)
    head = tokenizer.added()[0]
    blocks = [torch.tensor(block) for block in split_blocks(tokens, BLOCK, head, options.tokens)]
    text = CalibrationOptions(tokens=options.calibration_tokens, seed=options.seed)
    calibration = draw_calibration(model, text, model.spec.max_context)
    program = trace(model.spec, max(BLOCK, calibration.length))
    reference = ReferenceRunner(
        program, lambda given: model.weights.float_weight(given.name), model.weights.float_rows
    )
    wanted = list(reference.logits(blocks))
    meter = PerplexityMeter()
    for block, logits in zip(blocks, wanted, strict=True):
        meter.add(logits, block[1:])
    lossless = meter.result().value
    about = f"{options.tokens} held-out tokens; FLOAT perplexity {lossless:.4f}"
    print(about)
    print(line_up(HEADER, WIDTHS))
    rows = []
    names = ROTATIONS if options.rotations == "all" else options.rotations.split(",")
    rotated = [rotate(model, name, program.context) for name in names if name]
    forms = [("", model, program), *((f" {r.record.name}", r.model, r.program) for r in rotated)]
    for recipe, (rotation, own, traced) in itertools.product(options.recipes, forms):
        name = recipe + rotation
        plan = named(recipe).plan(own.weights.shapes(), own.weights.roles())
        bits = plan.bits_per_weight(own.weights.shapes(), model.spec.num_parameters)
        figures = measure(own, traced, plan, calibration, blocks, wanted, lossless)
        rows.append((bits, [name, f"{bits:.4f}", *figures]))
        print(line_up(rows[-1][1], WIDTHS), flush=True)
    print("\nby size:")
    ordered = [cells for _, cells in sorted(rows)]
    for cells in ordered:
        print(line_up(cells, WIDTHS))
    if options.page:
        write_block(options.page, [HEADER, *ordered], f"{options.model}, {about}.")


def named(name: str) -> Recipe:
    """Returns a recipe by name, from a file, or of one ``FORMAT:ALGORITHM`` for every matrix."""
    format, colon, algorithm = name.partition(":")
    return Recipe(name, "", (Rule("*", format, algorithm),)) if colon else find_recipe(name)


def measure(
    model: Model,
    program: Program,
    plan: QuantPlan,
    calibration: Calibration,
    blocks: list[torch.Tensor],
    wanted: list[torch.Tensor],
    lossless: float,
) -> list[str]:
    """Quantization error of one plan, as the cells after a recipe's name and bits."""
    divergence, perplexity, means = DivergenceMeter(), PerplexityMeter(), []
    with filled_store(model, program, plan, calibration) as filled:
        runner = ReferenceRunner(quantize_program(program, plan), store_reader(filled.store))
        for block, logits, found in zip(blocks, wanted, runner.logits(blocks), strict=True):
            scored, own = Scored(found), DivergenceMeter()
            divergence.add(logits, scored)
            own.add(logits, scored)
            means.append(own.result().kl_mean)
            perplexity.add(scored, block[1:])
        size, seconds = filled.store.nbytes / 1e6, filled.seconds
    result, value = divergence.result(), perplexity.result().value
    error = torch.tensor(means).std() / math.sqrt(len(means))
    return [
        f"{size:.3f}",
        f"{result.kl_mean:.5f}",
        f"{error:.5f}",
        f"{result.kl_p99:.4f}",
        f"{result.top1_agreement:.2%}",
        f"{value:.4f}",
        f"{value - lossless:.4f}",
        f"{value / lossless:.4f}",
        f"{seconds:.1f}" if calibrated_weights(plan) else f"{seconds:.2f}",
    ]


if __name__ == "__main__":
    main()
