"""Measures how seconds and divergence depend on the amount of calibration text.

For each amount, written as ``TOKENS:LENGTH``, the script quantizes a model by one recipe and
compares the stored weights with FLOAT on held-out text. "Seconds" are those of quantizing, without
tracing and writing; "CPU s" are processor seconds of all threads, which other work on the machine
changes less. The reference operators compute the logits; no runtime takes part.
"""

import argparse
import time
from pathlib import Path

from judging import Judge, filled_store
from pages import add_page_option, write_block
from tables import line_up

from edgeforge.calibration.text import CalibrationOptions, draw_calibration
from edgeforge.model.model import HELDOUT, open_model
from quant.plans.recipes import find_recipe

AMOUNTS = ["2048:256", "4096:256", "8192:256", "8192:512", "16384:256", "32768:512"]
HEADER = ["tokens", "length", "seconds", "CPU s", "KL mean", "perplexity x", "top-1 %"]
WIDTHS = [8, 8, 9, 8, 17, 15, 13]


def main() -> None:
    """Reads the arguments, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("amounts", nargs="*", default=AMOUNTS, metavar="TOKENS:LENGTH")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--recipe", default="int4-gptq")
    parser.add_argument("--text", type=Path, default=HELDOUT)
    parser.add_argument("--tokens", type=int, default=2304, help="tokens of held-out text")
    add_page_option(parser)
    options = parser.parse_args()
    amounts = [amount(given, parser) for given in options.amounts]
    model = open_model(options.model)
    judge = Judge.of_text(model, options.text, options.tokens, max(length for _, length in amounts))
    about = f"{options.model}, {options.recipe}, {judge.title()}"
    print(about)
    print(line_up(HEADER, WIDTHS))
    plan = find_recipe(options.recipe).plan(model.weights.shapes(), model.weights.roles())
    rows = []
    for tokens, length in amounts:
        text = CalibrationOptions(tokens=tokens, length=length)
        calibration = draw_calibration(model, text, judge.program.context)
        begun = time.process_time()
        with filled_store(model, judge.program, plan, calibration) as filled:
            spent = time.process_time() - begun
            scores = judge.judge_store(judge.program, plan, filled.store)
        rows.append(
            [
                f"{tokens:,}",
                str(length),
                f"{filled.seconds:.0f}",
                f"{spent:.0f}",
                scores.kl_mean.show(4),
                scores.perplexity_ratio.show(4),
                scores.agreement.show(1, 0.01),
            ]
        )
        print(line_up(rows[-1], WIDTHS), flush=True)
    if options.page:
        write_block(options.page, [HEADER, *rows], f"{about}.")


def amount(given: str, parser: argparse.ArgumentParser) -> tuple[int, int]:
    """Returns the tokens and the length of an amount of text."""
    tokens, colon, length = given.partition(":")
    if not (colon and tokens.isdecimal() and length.isdecimal() and int(tokens) >= int(length) > 0):
        parser.error(f"{given} is no amount of text: write TOKENS:LENGTH, such as 8192:256")
    return int(tokens), int(length)


if __name__ == "__main__":
    main()
