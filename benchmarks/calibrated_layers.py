"""Measures a calibrated quantizer's time and peak memory per layer, at a model's true shape.

The script makes a checkpoint of random weights with a few layers of the shape and a small
vocabulary, because a layer's cost depends on neither number, and calibrates on random tokens. The
first layer's time includes work that occurs only once.
"""

import argparse
import random
import resource
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from pages import add_page_option, write_block
from tables import line_up

from edgeforge.calibration.filling import Filling
from edgeforge.calibration.rescaled import quantize_rescaled
from edgeforge.calibration.sequential import quantize_sequentially
from edgeforge.model.model import open_model
from edgeforge.model.trace import trace
from edgeforge.synth import synthesise as synth
from quant.plans.plan import QuantPlan, calibrated_weights
from quant.plans.rules import Recipe, Rule
from quant.quantizers.registry import CALIBRATED
from quant.store.fill import fill_store
from quant.store.partial import partial_store

VOCABULARY = 1024
WIDTHS = [45, 8, 8]


def main() -> None:
    """Reads the arguments, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="llama-3.2-1b", choices=synth.PRESETS)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--format", default="int4-g128")
    parser.add_argument("--algorithm", default="gptq-order", choices=CALIBRATED)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    add_page_option(parser)
    options = parser.parse_args()
    shape = synth.PRESETS[options.preset]
    sliced = {**shape.config, "num_hidden_layers": options.layers, "vocab_size": VOCABULARY}
    sliced |= {key: 1 for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in sliced}
    synth.PRESETS["slice"] = replace(shape, config=sliced, generation_config={})
    rules = (
        Rule("embedding", "int8-pc"),
        Rule("head", "int8-pc", optional=True),
        Rule("*", options.format, options.algorithm),
    )
    with tempfile.TemporaryDirectory() as folder:
        model = open_model(str(synth.synthesise("slice", Path(folder) / "slice")))
        weights = model.weights
        plan = Recipe("slice", "", rules).plan(weights.shapes(), weights.roles())
        program = trace(model.spec, options.length)
        draw = random.Random(0)
        blocks = [
            [draw.randrange(VOCABULARY) for _ in range(options.length)]
            for _ in range(options.sequences)
        ]
        calibrated = calibrated_weights(plan)
        rest = {name: given for name, given in plan.weights.items() if name not in calibrated}
        rows = [["quantized", "seconds", "peak MB"]]
        print(line_up(rows[0], WIDTHS), flush=True)
        with partial_store(Path(folder), "store", plan, weights.shapes()) as partial:
            fill_store(weights, QuantPlan("rest", rest), partial)
            begun = last = time.perf_counter()
            seen = set(partial.done)

            def tell(done: int, size: int) -> None:
                nonlocal last
                now = time.perf_counter()
                for name in partial.done.keys() - seen:
                    rows.append([name, f"{now - last:.1f}", f"{peak():.0f}"])
                    print(line_up(rows[-1], WIDTHS), flush=True)
                seen.update(partial.done)
                last = now

            filling = Filling(weights, plan, partial, progress=tell)
            quantize_rescaled(filling, program, blocks)
            quantize_sequentially(filling, program, blocks)
            whole = time.perf_counter() - begun
    ending = f"{whole / options.layers:.1f} s a layer, peak memory {peak() / 1000:.2f} GB"
    print(ending)
    if options.page:
        write_block(
            options.page,
            rows,
            f"{options.layers} layers of {options.preset}'s shape, {options.format} by "
            f"{options.algorithm}, {options.sequences} sequences of {options.length} tokens: "
            f"{ending}.",
        )


def peak() -> float:
    """Returns the process's largest resident set so far, in megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


if __name__ == "__main__":
    main()
