"""What recipes cost: bits a weight against the quantization error, on one model and one text.

FLOAT and QUANTIZED logits of the reference operators; no runtime takes part. Every recipe of
``edgeforge list recipes``, or those named: also files of rules.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from edgeforge.metrics import DivergenceMeter, PerplexityMeter, Scored
from edgeforge.model import HELDOUT, Model, open_model
from edgeforge.reference import ReferenceRunner, store_reader
from edgeforge.text import Tokenizer, read_text, split_blocks
from edgeforge.trace import trace
from quant.plan import QuantPlan
from quant.program import Program
from quant.quantize import fill_store
from quant.recipes import RECIPES, find_recipe
from quant.rewrite import quantize_program
from quant.store import WeightStore, new_store

BLOCK = 256


def main() -> None:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="*", default=[*RECIPES])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", type=Path, default=HELDOUT)
    parser.add_argument("--tokens", type=int, default=24576)
    options = parser.parse_args()
    model = open_model(options.model)
    tokenizer = Tokenizer(model.checkpoint.tokenizer_files.get("tokenizer.json"), options.model)
    tokens = tokenizer.encode(read_text(options.text), special=False)
    blocks = [
        torch.tensor(block) for block in split_blocks(tokens, BLOCK, model.spec.bos, options.tokens)
    ]
    program = trace(model.spec, BLOCK)
    reference = ReferenceRunner(
        program, lambda given: model.weights.float_weight(given.name), model.weights.float_rows
    )
    wanted = list(reference.logits(blocks))
    meter = PerplexityMeter()
    for block, logits in zip(blocks, wanted, strict=True):
        meter.add(logits, block[1:])
    print(f"{options.tokens} tokens; FLOAT perplexity {meter.result().value:.4f}")
    print(
        f"{'recipe':<20} {'bits':>7} {'KL mean':>9} {'KL p99':>8} {'top-1':>7} {'perplexity':>10}"
    )
    rows = []
    for name in options.recipes:
        plan = find_recipe(name).plan(model.weights.shapes(), model.weights.roles())
        bits = plan.bits_per_weight(model.weights.shapes())
        rows.append((bits, name, measure(model, program, plan, blocks, wanted)))
    for bits, name, figures in sorted(rows):
        print(f"{name:<20} {bits:>7.4f} {figures}")


def measure(
    model: Model,
    program: Program,
    plan: QuantPlan,
    blocks: list[torch.Tensor],
    wanted: list[torch.Tensor],
) -> str:
    """Quantization error of one plan, as the end of a line."""
    divergence, perplexity = DivergenceMeter(), PerplexityMeter()
    with tempfile.TemporaryDirectory() as folder:
        with new_store(Path(folder), "store", plan, model.weights.shapes()) as writer:
            fill_store(model.weights, plan, writer)
        store = WeightStore(Path(folder) / "store")
        runner = ReferenceRunner(quantize_program(program, plan), store_reader(store))
        for block, logits, found in zip(blocks, wanted, runner.logits(blocks), strict=True):
            scored = Scored(found)
            divergence.add(logits, scored)
            perplexity.add(scored, block[1:])
    result = divergence.result()
    return (
        f"{result.kl_mean:>9.5f} {result.kl_p99:>8.4f} {result.top1_agreement:>7.2%} "
        f"{perplexity.result().value:>10.4f}"
    )


if __name__ == "__main__":
    main()
