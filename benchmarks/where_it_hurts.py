"""Measures what quantizing a part of a model alone costs: one kind of matrix, or one layer.

All other weights stay as they are. Costs of parts roughly add up while they are small, so the table
shows where more bits pay: a kind of matrix that is few of the weights and much of the divergence.
"""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from judging import Judge
from tables import line_up

from edgeforge.model.model import HELDOUT, open_model
from quant.errors import QuantizationError
from quant.formats.formats import IntFormat, parse_format
from quant.formats.packing import dequantize
from quant.plans.algorithms import algorithms_for, is_calibrated
from quant.quantizers.registry import QUANTIZERS

HEADER = ["part", "share %", "KL mean", "perplexity x", "top-1 %"]
WIDTHS = [28, 7, 17, 15, 13]
_LAYER = re.compile(r"\.layers\.(\d+)\.")


def main() -> None:
    """Reads the arguments, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", type=Path, default=HELDOUT)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--format", default="int4-g32", help="an integer format")
    parser.add_argument("--algorithm", help="one without calibration; by default the format's own")
    options = parser.parse_args()
    model = open_model(options.model)
    try:
        format = parse_format(options.format)
    except QuantizationError as error:
        parser.error(str(error))
    if not isinstance(format, IntFormat):
        parser.error(f"--format {options.format} is no integer format")
    algorithm = options.algorithm or algorithms_for(format)[0]
    if algorithm not in QUANTIZERS or is_calibrated(algorithm):
        parser.error(f"--algorithm {algorithm} needs a calibration, or there is none of this name")
    judge = Judge.of_text(model, options.text, options.tokens)
    print(f"{options.model}, {format.name} by {algorithm}, {judge.title()}")
    print(line_up(HEADER, WIDTHS))
    shapes = model.weights.shapes()
    matrices = [name for name, shape in shapes.items() if len(shape) == 2]
    size = sum(shapes[name][0] * shapes[name][1] for name in matrices)
    for part, names in parts(matrices):
        share = sum(shapes[name][0] * shapes[name][1] for name in names) / size
        changed = {
            name: rounded(model.weights.float_weight(name), format, algorithm, name)
            for name in names
        }
        scores = judge.judge(changed)
        cells = [
            part,
            f"{100 * share:.1f}",
            scores.kl_mean.show(5),
            scores.perplexity_ratio.show(4),
            scores.agreement.show(2, 0.01),
        ]
        print(line_up(cells, WIDTHS), flush=True)


def parts(names: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Yields the kinds of matrix, then the layers, then everything, each with its weights.

    >>> [part for part, _ in parts(["embed.weight", "model.layers.0.mlp.up.weight"])]
    ['embed', 'mlp.up', 'layer 0', 'all']
    """
    kinds: dict[str, list[str]] = {}
    layers: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(_LAYER.split(name)[-1].removesuffix(".weight"), []).append(name)
        found = _LAYER.search(name)
        if found:
            layers.setdefault(f"layer {found[1]}", []).append(name)
    yield from kinds.items()
    yield from layers.items()
    yield "all", names


def rounded(weight: torch.Tensor, format: IntFormat, algorithm: str, name: str) -> torch.Tensor:
    """Returns a matrix's stored values, ``float32[rows, columns]``.

    Raises:
        SystemExit: the format cannot hold the matrix.
    """
    try:
        format.check(name, *weight.shape)
    except QuantizationError as error:
        raise SystemExit(str(error)) from error
    made = QUANTIZERS[algorithm].quantize_rows(weight, format, name=name)
    return dequantize(made.codes, made.scale, made.zero_point, format)


if __name__ == "__main__":
    main()
