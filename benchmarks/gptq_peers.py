"""Compares EdgeForge's GPTQ with coremltools' on the matrices of one layer at a model's true shape.

Both sides get the same weights, the same inputs in the same sequences, the same number of threads
and the same settings: 4 bits, groups of 128, symmetric, columns in the order of falling
activations, damping 0.01. Each runs in its own process. The seconds cover gathering the inputs'
second moment and quantizing, not making the inputs or running the layer. Both get q, k and v as one
matrix, and gate and up as one matrix: EdgeForge stacks them anyway, and it saves coremltools three
second moments. Memory is the largest resident size above that before the first matrix, after all
imports.

The error is that of the layer's output, ``trace(E H E^T) / trace(W H W^T)``, with H the inputs'
second moment, summed in float64. coremltools keeps scales in float32; EdgeForge's are bfloat16.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from measured_process import high_water_mark, pin, run, say
from pages import add_page_option, write_block
from tables import Gain, Metric, comparison_rows, print_rows

from edgeforge.reference.malloc import return_large_blocks
from edgeforge.synth import synthesise as synth

OURS, THEIRS = "EdgeForge", "coremltools"
GROUP = 128
# Number of directions that all inputs share: columns of true activations are correlated.
DIRECTIONS = 64
BATCH_TOKENS = 4096  # as `edgeforge.reference.segments` joins sequences


class Stopwatch:
    """Adds up the wall and CPU seconds of all blocks that enter it."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0

    def __enter__(self) -> None:
        self._begun = time.perf_counter(), time.process_time()

    def __exit__(self, *_: object) -> None:
        wall, cpu = self._begun
        self.wall += time.perf_counter() - wall
        self.cpu += time.process_time() - cpu


@dataclass(frozen=True)
class Matrix:
    """A matrix of the layer: ``float32[rows, columns]``."""

    name: str
    rows: int
    columns: int

    def weight(self) -> torch.Tensor:
        """Returns random weights with a few wide columns."""
        draw = torch.Generator().manual_seed(self.rows + self.columns)
        weight = torch.randn(self.rows, self.columns, generator=draw).mul_(0.02)
        weight[:, :: self.columns // 16].mul_(4.0)
        return weight

    def inputs(self, sequences: int, length: int) -> Iterator[torch.Tensor]:
        """Yields random sequences, ``float32[length, columns]``; columns differ and correlate."""
        draw = torch.Generator().manual_seed(self.columns)
        spread = torch.randn(self.columns, generator=draw).exp_()
        shared = torch.randn(DIRECTIONS, self.columns, generator=draw)
        for _ in range(sequences):
            own = torch.randn(length, self.columns, generator=draw).mul_(spread)
            yield own.addmm_(torch.randn(length, DIRECTIONS, generator=draw), shared, alpha=0.3)


def main() -> None:
    """Reads the arguments, runs both sides, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="llama-3.2-1b", choices=synth.PRESETS)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", help="names of matrices")
    parser.add_argument("--side", choices=(OURS, THEIRS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    add_page_option(parser)
    options = parser.parse_args()
    pin(options.threads)
    torch.set_num_threads(options.threads)
    matrices = [
        m for m in matrices_of(options.preset) if not options.only or m.name in options.only
    ]
    if options.side is not None:
        print(json.dumps(measure(options, matrices)))
        return
    with tempfile.TemporaryDirectory() as folder:
        records = {}
        for side in (THEIRS, OURS):
            command = [sys.executable, __file__, *sys.argv[1:], "--side", side, "--folder", folder]
            records[side] = run(command).json()
            say(f"{side}: {records[side]}")
        for matrix in matrices:
            for side, error in errors(matrix, Path(folder)).items():
                records[side][f"{matrix.name} error"] = error
    shapes = ", ".join(f"{m.name} [{m.rows}, {m.columns}]" for m in matrices)
    about = (
        f"{options.preset}: {shapes}; {options.sequences} sequences of {options.length} tokens, "
        f"{options.threads} threads"
    )
    print(about)
    metrics = [Metric(f"{m.name} seconds", f"{m.name}, s", 1, 2) for m in matrices]
    metrics += [Metric("seconds", "the layer, s", 1, 2), Metric("cpu", "the layer, CPU s", 1, 2)]
    metrics += [Metric("peak", "peak memory, MB", 1e6, 0)]
    metrics += [Metric(f"{m.name} error", f"{m.name}, output error, %", 0.01, 4) for m in matrices]
    legs = {name: [found] for name, found in records.items()}
    rows = comparison_rows(metrics, legs, [Gain("gain", OURS, THEIRS)])
    print_rows(rows)
    if options.page:
        write_block(options.page, rows, f"{about}.")


def matrices_of(preset: str) -> list[Matrix]:
    """Returns the linears of one layer, stacked where they share their input."""
    config = synth.PRESETS[preset].config
    hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    width = int(config.get("head_dim") or hidden // heads)
    shared = int(config.get("num_key_value_heads", heads))
    ffn = int(config["intermediate_size"])
    return [
        Matrix("qkv_proj", (heads + 2 * shared) * width, hidden),
        Matrix("o_proj", hidden, heads * width),
        Matrix("gate_up_proj", 2 * ffn, hidden),
        Matrix("down_proj", hidden, ffn),
    ]


def measure(options: argparse.Namespace, matrices: list[Matrix]) -> dict[str, float]:
    """Returns one side's seconds by matrix and its memory; saves its weights to the folder."""
    quantize = ours if options.side == OURS else theirs
    if options.side == THEIRS:
        import coremltools.optimize.torch.layerwise_compression  # noqa: F401 (not counted)
    else:
        return_large_blocks()  # as calibration does
    torch.randn(256, 256) @ torch.randn(256, 256)  # loads torch's libraries before measuring
    found: dict[str, float] = {}
    whole, before = Stopwatch(), high_water_mark()
    for matrix in matrices:
        watch = Stopwatch()
        values = quantize(matrix, options, watch)
        whole.wall, whole.cpu = whole.wall + watch.wall, whole.cpu + watch.cpu
        found[f"{matrix.name} seconds"] = watch.wall
        np.save(options.folder / f"{options.side}-{matrix.name}.npy", values.numpy())
    peak = high_water_mark() - before
    return {**found, "seconds": whole.wall, "cpu": whole.cpu, "peak": peak}


def ours(matrix: Matrix, options: argparse.Namespace, watch: Stopwatch) -> torch.Tensor:
    """Returns the values that EdgeForge stores, float32 [rows, columns]."""
    from quant.formats.formats import IntFormat
    from quant.formats.packing import dequantize
    from quant.quantizers.input_statistics import SecondMoment
    from quant.quantizers.registry import CALIBRATED

    weight, format = matrix.weight(), IntFormat(4, GROUP)
    collected = SecondMoment(matrix.columns)
    batch: list[torch.Tensor] = []
    for number, inputs in enumerate(matrix.inputs(options.sequences, options.length), start=1):
        batch.append(inputs)
        if number == options.sequences or len(batch) * options.length >= BATCH_TOKENS:
            with watch:
                collected.add(torch.cat(batch))
            batch = []
    with watch:
        moment = [collected.mean()]
    np.save(options.folder / f"{matrix.name}.npy", moment[0].float().numpy())
    with watch:
        made = CALIBRATED["gptq-order"].quantize_matrix(
            weight, moment.pop(), format, threads=options.threads
        )
    return dequantize(made.codes, made.scale, made.zero_point, format)


def theirs(matrix: Matrix, options: argparse.Namespace, watch: Stopwatch) -> torch.Tensor:
    """Returns the values that coremltools leaves in the layer, float32 [rows, columns]."""
    from coremltools.optimize.torch.layerwise_compression.algorithms import GPTQ, ModuleGPTQConfig

    layer = torch.nn.Linear(matrix.columns, matrix.rows, bias=False, device="meta")
    layer.weight = torch.nn.Parameter(matrix.weight(), requires_grad=False)
    config = ModuleGPTQConfig(
        weight_dtype="uint4",
        granularity="per_block",
        block_size=GROUP,
        quantization_scheme="symmetric",
        use_activation_order_heuristic=True,
        hessian_dampening=0.01,
    )
    with torch.no_grad():
        with watch:
            algorithm = GPTQ(layer, config)
        for inputs in matrix.inputs(options.sequences, options.length):
            sequence = inputs[None]
            given = layer(sequence)
            with watch:
                algorithm.add_batch(sequence, given)
        with watch:
            algorithm.compress()
    return layer.weight.data


def errors(matrix: Matrix, folder: Path) -> dict[str, float]:
    """Returns, by side, the output's squared error relative to the output's squared norm."""
    moment = torch.from_numpy(np.load(folder / f"{matrix.name}.npy"))
    weight = matrix.weight()

    def form(values: torch.Tensor) -> float:
        return float(
            sum(((part @ moment) * part).sum(dtype=torch.float64) for part in values.split(2048))
        )

    whole = form(weight)
    return {
        side: form(torch.from_numpy(np.load(folder / f"{side}-{matrix.name}.npy")) - weight) / whole
        for side in (OURS, THEIRS)
    }


if __name__ == "__main__":
    main()
