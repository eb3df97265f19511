"""Accuracy a byte beside onnxruntime's own weight quantizers: same model, same text, same bytes.

Every matrix of the model becomes a MatMul in a float16 ONNX file, which each of onnxruntime's
quantizers turns into MatMulNBits; codes, scales and zero points are read back out of that file, and
the weights they stand for run through the reference operators, as EdgeForge's own do. No kernel
takes part, so what differs is the choice of integers and scales alone. Nothing is calibrated.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from edgeforge.metrics import DivergenceMeter, PerplexityMeter, Scored
from edgeforge.model import HELDOUT, Model, open_model
from edgeforge.reference import ReferenceRunner
from edgeforge.text import Tokenizer, read_text, split_blocks
from edgeforge.trace import trace
from quant.formats import IntFormat
from quant.plan import Assignment
from quant.quantize import stored_values
from quant.registry import QUANTIZERS

BLOCK = 256


@dataclass(frozen=True)
class Contender:
    """One quantizer: gives what a matrix becomes, and the bits that it takes."""

    name: str
    quantize: Callable[[dict[str, torch.Tensor]], Iterator[tuple[str, torch.Tensor, float]]]


def main() -> None:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", type=Path, default=HELDOUT)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--groups", type=int, nargs="+", default=[32, 128])
    options = parser.parse_args()
    model = open_model(options.model)
    tokenizer = Tokenizer(model.checkpoint.tokenizer_files.get("tokenizer.json"), options.model)
    tokens = tokenizer.encode(read_text(options.text), special=False)
    blocks = [
        torch.tensor(block) for block in split_blocks(tokens, BLOCK, model.spec.bos, options.tokens)
    ]
    weights = {
        name: model.weights.float_weight(name)
        for name, shape in model.weights.shapes().items()
        if len(shape) == 2
    }
    judge = Judge(model, blocks)
    print(
        f"{options.model}, {options.tokens} tokens of {options.text.name}; FLOAT perplexity "
        f"{judge.perplexity:.4f}"
    )
    for group in options.groups:
        for symmetric in (True, False):
            print(f"\n4 bits, groups of {group}, {'symmetric' if symmetric else 'zero points'}")
            print(f"{'quantizer':<26} {'bits':>7} {'KL mean':>18} {'KL p99':>8} {'top-1':>7} ppl x")
            for contender in contenders(group, symmetric):
                try:
                    line = judge.line(contender, weights)
                except ValueError as error:  # it has bugs with odd numbers of groups
                    line = f"fails: {error}"
                print(f"{contender.name:<26} {line}", flush=True)


class Judge:
    """FLOAT on the text, against which quantized weights are held."""

    def __init__(self, model: Model, blocks: list[torch.Tensor]) -> None:
        self._model, self._blocks = model, blocks
        self._program = trace(model.spec, BLOCK)
        self._wanted = list(self._logits({}))
        meter = PerplexityMeter()
        for block, logits in zip(blocks, self._wanted, strict=True):
            meter.add(logits, block[1:])
        self.perplexity = meter.result().value

    def _logits(self, replaced: Mapping[str, torch.Tensor]) -> Iterator[torch.Tensor]:
        def read(name: str) -> torch.Tensor:
            return replaced[name] if name in replaced else self._model.weights.float_weight(name)

        runner = ReferenceRunner(
            self._program,
            lambda given: read(given.name),
            lambda name, tokens: read(name)[tokens],
        )
        yield from runner.logits(self._blocks)

    def line(self, contender: Contender, weights: dict[str, torch.Tensor]) -> str:
        """Bits a weight of the matrices, KL with its 95 % interval, and what follows."""
        found, stored, count = {}, 0.0, 0
        for name, values, bits in contender.quantize(weights):
            found[name] = values
            stored, count = stored + bits, count + values.numel()
        assert found.keys() == weights.keys()
        divergence, perplexity, means = DivergenceMeter(), PerplexityMeter(), []
        for block, wanted, logits in zip(
            self._blocks, self._wanted, self._logits(found), strict=True
        ):
            scored, alone = Scored(logits), DivergenceMeter()
            divergence.add(wanted, scored)
            alone.add(wanted, scored)
            means.append(alone.result().kl_mean)
            perplexity.add(scored, block[1:])
        result = divergence.result()
        spread = 1.96 * float(np.std(means, ddof=1)) / len(means) ** 0.5
        return (
            f"{stored / count:>7.4f} {result.kl_mean:>9.5f} ± {spread:.5f} {result.kl_p99:>8.4f} "
            f"{result.top1_agreement:>7.2%} {perplexity.result().value / self.perplexity:.4f}"
        )


def contenders(group: int, symmetric: bool) -> Iterator[Contender]:
    """EdgeForge's data-free quantizers, and onnxruntime's that can make such integers."""
    from onnxruntime.quantization import matmul_nbits_quantizer as peers

    fmt = IntFormat(4, group, symmetric)
    for algorithm in QUANTIZERS if symmetric else ["rtn"]:
        yield Contender(
            f"EdgeForge {algorithm}", lambda weights, a=algorithm: ours(weights, fmt, a)
        )
    by_name = {"bits": 4, "group_size": group, "scheme": "sym" if symmetric else "asym"}
    made: dict[str, Callable[[str], object]] = {
        "default": lambda name: peers.DefaultWeightOnlyQuantConfig(group, symmetric),
        "rtn": lambda name: peers.RTNWeightOnlyQuantConfig(
            customized_weight_config={name: dict(by_name)}
        ),
    }
    if not symmetric:
        made["k_quant"] = lambda name: peers.KQuantWeightOnlyQuantConfig(
            customized_weight_config={name: dict(by_name)}
        )
        made["hqq"] = lambda name: peers.HQQWeightOnlyQuantConfig(group, 4)
    for name, config in made.items():
        yield Contender(
            f"onnxruntime {name}",
            partial(theirs, group=group, symmetric=symmetric, config=config),
        )


def ours(
    weights: dict[str, torch.Tensor], fmt: IntFormat, algorithm: str
) -> Iterator[tuple[str, torch.Tensor, float]]:
    """What EdgeForge would store."""
    for name, weight in weights.items():
        values = stored_values(weight, Assignment(fmt, algorithm), name)
        yield name, values, 8.0 * fmt.nbytes(*weight.shape)


def theirs(
    weights: dict[str, torch.Tensor],
    group: int,
    symmetric: bool,
    config: Callable[[str], object],
) -> Iterator[tuple[str, torch.Tensor, float]]:
    """What one of onnxruntime's quantizers stores, as MatMulNBits' documentation reads it."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    for name, weight in weights.items():
        quantizer = MatMulNBitsQuantizer(
            matmul_model(name, weight), group, symmetric, algo_config=config(name)
        )
        with redirect_stdout(sys.stderr):  # it shows its progress on stdout
            quantizer.process()
        graph = quantizer.model.model.graph
        (node,) = (n for n in graph.node if n.op_type == "MatMulNBits")
        held = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
        packed, scale, *rest = (held[i] for i in node.input[1:] if i)
        rows, blocks = packed.shape[:2]
        codes = nibbles(packed.reshape(rows, -1)).reshape(rows, blocks, group).astype(np.float32)
        scale = scale.reshape(rows, blocks, 1)
        bits = 4.0 * codes.size + 8 * scale.nbytes
        if not rest:
            zero: np.ndarray = np.full((rows, blocks, 1), 8.0, np.float32)
        elif rest[0].dtype == np.uint8:
            zero = nibbles(rest[0].reshape(rows, -1))[:, :blocks, None].astype(np.float32)
            bits += 4.0 * zero.size
        else:  # zero points as floats
            zero = rest[0].reshape(rows, blocks, 1).astype(np.float32)
            bits += 8 * rest[0].nbytes
        values = ((codes - zero) * scale.astype(np.float32)).reshape(rows, -1)
        yield name, torch.from_numpy(values[:, : weight.shape[1]].copy()), bits


def nibbles(packed: np.ndarray) -> np.ndarray:
    """Two codes a byte, the low half first."""
    return np.stack((packed & 15, packed >> 4), -1).reshape(len(packed), -1)


def matmul_model(name: str, weight: torch.Tensor) -> onnx.ModelProto:
    """``x @ weight.T`` in float16."""
    rows, columns = weight.shape
    matrix = numpy_helper.from_array(weight.t().contiguous().half().numpy(), f"{name}.matrix")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", matrix.name], ["y"], name=name)],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["t", columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, ["t", rows])],
        [matrix],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


if __name__ == "__main__":
    main()
