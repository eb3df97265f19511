"""What recipes cost: bits a weight against the quantization error, on one model and one text.

FLOAT and QUANTIZED logits of the reference operators; no runtime takes part. Every recipe of
``edgeforge list recipes``, or those named: also files of rules, and formats with an algorithm for
every matrix, such as ``int3-g64:gptq-order``. Calibrated recipes look at the calibration text that
ships, of which no passage is in the text measured on. Excess is how far the perplexity lies above
FLOAT's; the standard error of the mean KL is over blocks of text, for tokens of one block are not
independent. Bits are stored bits over the checkpoint's own weights: what a rotation adds is counted
in them. FLOAT is never rotated.
"""

import argparse
import itertools
import math
from pathlib import Path

import torch
from judging import filled_store

from edgeforge.calibration.text import Calibration, CalibrationOptions, draw_calibration
from edgeforge.model.model import HELDOUT, Model, open_model
from edgeforge.model.rotated_weights import rotate
from edgeforge.model.rotations import ROTATIONS
from edgeforge.model.trace import trace
from edgeforge.reference.walk import ReferenceRunner, store_reader
from edgeforge.tokenizer import Tokenizer, read_text, split_blocks
from edgeforge.verification.metrics import DivergenceMeter, PerplexityMeter, Scored
from quant.plans.plan import QuantPlan, calibrated_weights
from quant.plans.recipes import RECIPES, Recipe, Rule, find_recipe
from quant.program.program import Program
from quant.program.rewrite import quantize_program

BLOCK = 256


def main() -> None:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="*", default=[*RECIPES])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", type=Path, default=HELDOUT)
    parser.add_argument("--tokens", type=int, default=24576)
    parser.add_argument("--calibration-tokens", type=int, default=CalibrationOptions.tokens)
    parser.add_argument("--seed", type=int, default=0, help="of the calibration")
    parser.add_argument(
        "--rotations",
        default="",
        help="each recipe without and with these: `all`, or names with commas between",
    )
    options = parser.parse_args()
    model = open_model(options.model)
    tokenizer = Tokenizer(model.checkpoint.tokenizer_files.get("tokenizer.json"), options.model)
    tokens = tokenizer.encode(read_text(options.text), special=False)
    blocks = [
        torch.tensor(block) for block in split_blocks(tokens, BLOCK, model.spec.bos, options.tokens)
    ]
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
    print(f"{options.tokens} tokens; FLOAT perplexity {lossless:.4f}")
    print(
        f"{'recipe':<30} {'bits':>7} {'MB':>7} {'KL mean':>9} {'+-':>7} {'KL p99':>8} {'top-1':>7} "
        f"{'perplexity':>10} {'excess':>7} {'ratio':>7} {'seconds':>7}"
    )
    rows = []
    names = ROTATIONS if options.rotations == "all" else options.rotations.split(",")
    rotated = [rotate(model, name, program.context) for name in names if name]
    forms = [("", model, program), *((f" {r.record.name}", r.model, r.program) for r in rotated)]
    for recipe, (rotation, own, traced) in itertools.product(options.recipes, forms):
        name = recipe + rotation
        plan = named(recipe).plan(own.weights.shapes(), own.weights.roles())
        bits = plan.bits_per_weight(own.weights.shapes(), model.spec.num_parameters)
        figures = measure(own, traced, plan, calibration, blocks, wanted, lossless)
        rows.append((bits, name, figures))
        print(f"{name:<30} {bits:>7.4f} {figures}", flush=True)
    print("\nby size:")
    for bits, name, figures in sorted(rows):
        print(f"{name:<30} {bits:>7.4f} {figures}")


def named(name: str) -> Recipe:
    """A recipe by name, from a file, or of one format and algorithm for every matrix."""
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
) -> str:
    """Quantization error of one plan, as the end of a line."""
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
    calibrated = f"{seconds:>7.1f}" if calibrated_weights(plan) else f"{seconds:>7.2f}"
    return (
        f"{size:>7.3f} {result.kl_mean:>9.5f} {error:>7.5f} {result.kl_p99:>8.4f} "
        f"{result.top1_agreement:>7.2%} {value:>10.4f} {value - lossless:>7.4f} "
        f"{value / lossless:>7.4f} {calibrated}"
    )


if __name__ == "__main__":
    main()
