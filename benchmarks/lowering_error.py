"""Measures what 8-bit activations cost: of one kind of matrix, of one layer, and of real artifacts.

The first table simulates the kernels' rounding in the reference operators, for a part of the model
alone: per token, as XNNPACK and ONNX Runtime on arm64 (KleidiAI) round, and per block of columns,
as ONNX Runtime's other kernels do. All other products stay float32, and the divergence is from
QUANTIZED. With `--columns` the columns that `--activations auto` would keep float32 stay as they
are.

The second table is of artifacts of the same store: their true lowering error, and their decode
speed relative to the first one's of the same target, in turns of a few tokens, because a machine's
other load changes.
"""

import argparse
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from tables import line_up
from torch import Tensor, fx

from device_harness.registry import open_session
from edgeforge.calibration.float_columns import (
    float_columns,
    rounded_products,
    texts_of,
)
from edgeforge.export_options import ExportOptions
from edgeforge.model.model import HELDOUT, open_model
from edgeforge.pipeline import export
from edgeforge.reference.walk import Values, Walk, WeightReader, block_pool, store_reader
from edgeforge.tokenizer import TOKENIZER, Tokenizer, read_text
from edgeforge.verification.metrics import DivergenceMeter
from edgeforge.verification.references import references
from edgeforge.verification.sample import spread_blocks
from exporters.float_columns import ALL, FloatColumns
from exporters.manifest import Manifest
from exporters.onnx.quantized import block_size
from exporters.options import TargetOptions
from exporters.registry import find_target
from quant.program.calls import QuantizedCall
from quant.program.ops import round_per_token
from quant.program.program import Program, node_argument

BLOCK = 256
HEADER = ["part", "matrices", "per token", "per block", "largest"]
WIDTHS = [28, 9, 10, 10, 10]
ARTIFACT_HEADER = ["artifact", "matrices", "KL mean", "KL p99", "top-1 %", "MB", "decode x"]
ARTIFACT_WIDTHS = [20, 9, 10, 10, 8, 7, 9]
_LAYER = re.compile(r"\.layers\.(\d+)\.")


class RoundedWalk(Walk):
    """A walk in which some products round what they read.

    Attributes:
        roundings: by product, the rounding.
    """

    def __init__(self, program: Program, read: WeightReader) -> None:
        super().__init__(program, read)
        self.roundings: dict[fx.Node, Callable[[Tensor], Tensor]] = {}

    def prepare(self, node: fx.Node) -> Callable[[Values], object]:
        """Rounds the activations before the product."""
        run, rounding = super().prepare(node), self.roundings.get(node)
        if rounding is None:
            return run
        source = node_argument(node, 0)
        return lambda values: run({**values, source: rounding(values[source])})

    def logits(self, blocks: list[Tensor]) -> list[Tensor]:
        """Returns ``float32[t, vocab]`` of each block."""
        values = [self.begin(block) for block in blocks]
        with block_pool() as pool:
            for node in self.order:
                self.advance(node, values, pool)
        return [known[self.program.output()][0] for known in values]


def round_per_block(x: Tensor, size: int) -> Tensor:
    """Rounds each block of ``size`` columns to 8 bits with a scale of its own."""
    blocks = x.unflatten(-1, (-1, size))
    scale = (blocks.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-30)
    return ((blocks / scale).round() * scale).flatten(-2)


def but_for(rounding: Callable[[Tensor], Tensor], kept: tuple[int, ...]) -> Callable:
    """Returns a rounding that leaves some columns as they are."""

    def rounded(x: Tensor) -> Tensor:
        rest = x.clone()
        rest[..., list(kept)] = 0
        rest = rounding(rest)
        rest[..., list(kept)] = x[..., list(kept)]
        return rest

    return rounded


def parts_of(names: dict[fx.Node, str]) -> dict[str, list[fx.Node]]:
    """Returns the products of each kind of matrix, of each layer, and all."""
    found: dict[str, list[fx.Node]] = {}
    for node, name in names.items():
        found.setdefault(_LAYER.split(name)[-1].removesuffix(".weight"), []).append(node)
    for node, name in names.items():
        layer = _LAYER.search(name)
        if layer:
            found.setdefault(f"layer {layer[1]}", []).append(node)
    return {**found, "all": list(names)}


def divergence(wanted: list[Tensor], found: list[Tensor]) -> DivergenceMeter:
    """Compares logits block by block."""
    meter = DivergenceMeter()
    for one, other in zip(wanted, found, strict=True):
        meter.add(one, other)
    return meter


def simulate(
    walk: RoundedWalk, blocks: list[Tensor], wanted: list[Tensor], kept: FloatColumns
) -> None:
    """Prints the first table."""
    products = rounded_products(walk.program)
    calls = {node: QuantizedCall.of(node) for node in products}
    names = {node: walk.program.inputs[call.codes.name].name for node, call in calls.items()}
    print(line_up(HEADER, WIDTHS))
    for part, nodes in parts_of(names).items():
        cells, largest = [part, str(len(nodes))], 0.0
        for per_token in (True, False):
            walk.roundings = {}
            for node in nodes:
                size = block_size(names[node], calls[node].integers, calls[node].shape[1])
                rounding = (
                    round_per_token if per_token else lambda x, size=size: round_per_block(x, size)
                )
                columns = kept.get(names[node], ())
                assert columns != ALL
                walk.roundings[node] = but_for(rounding, columns)
            found = divergence(wanted, walk.logits(blocks)).result()
            cells.append(f"{found.kl_mean:.2e}")
            largest = max(largest, found.kl_max)
        print(line_up([*cells, f"{largest:.1e}"], WIDTHS), flush=True)
    walk.roundings = {}


def compare(folders: dict[str, Path], blocks: list[Tensor], wanted: list[Tensor], rounds: int):
    """Prints the second table."""
    manifests = {name: Manifest.read(folder) for name, folder in folders.items()}
    with ExitStack() as stack:
        sessions = {
            name: stack.enter_context(open_session(folder, manifests[name], 1, {}))
            for name, folder in folders.items()
        }
        seconds: dict[str, list[float]] = {name: [] for name in sessions}
        for session in sessions.values():
            session.extend(blocks[0][:64].numpy())
        for _ in range(rounds):
            for name, session in sessions.items():
                begun = time.perf_counter()
                for _ in range(3):
                    session.extend(np.array([5], np.int64))
                seconds[name].append(time.perf_counter() - begun)
        print(line_up(ARTIFACT_HEADER, ARTIFACT_WIDTHS))
        for name, session in sessions.items():
            logits = [torch.from_numpy(session.logits(block.numpy())) for block in blocks]
            found = divergence(wanted, logits).result()
            apart = [
                r for r in manifests[name].weights.values() if r.float_columns not in ((), ALL)
            ]
            size = sum(record.size for record in manifests[name].files.values())
            base = next(other for other in seconds if other.split()[0] == name.split()[0])
            ratio = statistics.median(
                one / other for one, other in zip(seconds[base], seconds[name], strict=True)
            )
            cells = [
                name,
                str(len(apart)),
                f"{found.kl_mean:.2e}",
                f"{found.kl_p99:.1e}",
                f"{100 * found.top1_agreement:.1f}",
                f"{size / 1e6:.1f}",
                f"{ratio:.3f}",
            ]
            print(line_up(cells, ARTIFACT_WIDTHS), flush=True)


def main() -> None:
    """Reads the arguments, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--recipe", default="int4")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--targets", default="onnx,executorch")
    parser.add_argument("--activations", default="int8,auto", help="values, separated by commas")
    parser.add_argument("--columns", action="store_true", help="simulate with large columns kept")
    parser.add_argument("--rounds", type=int, default=40, help="turns of decoding three tokens")
    parser.add_argument("--skip-parts", action="store_true", help="print the second table alone")
    options = parser.parse_args()
    model = open_model(options.model)
    with tempfile.TemporaryDirectory() as root:
        folders = {}
        for target in options.targets.split(","):
            for asked in options.activations.split(","):
                folder = folders[f"{target} {asked}"] = Path(root) / f"{target}-{asked}"
                given = ExportOptions(
                    options.recipe,
                    context=min(2 * BLOCK, model.spec.max_context),
                    target=TargetOptions(activations=asked),
                )
                export(model, [find_target(target)], folder, given)
        manifest = Manifest.read(next(iter(folders.values())))
        made = references(manifest, model, lambda *told: None)
        reference, quantized, store = made.original, made.quantized, made.store
        tokenizer = Tokenizer(
            model.checkpoint.tokenizer_files.get(TOKENIZER), model.checkpoint.source
        )
        text, head = tokenizer.encode(read_text(HELDOUT), special=False), tokenizer.added()[0]
        spread = spread_blocks(text, BLOCK, head, options.tokens)
        blocks = [torch.tensor(block, dtype=torch.int64) for block in spread]
        walk = RoundedWalk(quantized.program, store_reader(store))
        wanted = walk.logits(blocks)
        cost = divergence(list(reference.logits(blocks)), wanted).result().kl_mean
        print(f"{options.model}, {options.recipe}, {sum(map(len, blocks))} held-out tokens")
        print(f"quantization error: KL {cost:.2e}; a twentieth of it is {cost / 20:.2e}")
        if not options.skip_parts:
            kept: FloatColumns = {}
            if options.columns:
                texts = texts_of(model, BLOCK * 2)
                kept = float_columns(quantized.program, store, texts, Path(root) / "columns")
            simulate(walk, blocks, wanted, kept)
        compare(folders, blocks, wanted, options.rounds)


if __name__ == "__main__":
    main()
