"""Runs onnxruntime's own weight quantizers on matrices and returns the stored values.

Each matrix becomes a MatMul in a float16 ONNX model, which a quantizer turns into MatMulNBits. The
code then reads codes, scales and zero points back from that model, as the operator's documentation
defines them.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper


def configurations(group: int, symmetric: bool) -> dict[str, Callable[[str], object]]:
    """Returns onnxruntime's 4-bit algorithms: by name, a function from a matrix's name to settings.

    Some algorithms take settings by matrix, so the function needs the matrix's name.
    """
    from onnxruntime.quantization import matmul_nbits_quantizer as peers

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
    return made


def quantized(
    weights: Mapping[str, torch.Tensor],
    group: int,
    symmetric: bool,
    config: Callable[[str], object],
) -> Iterator[tuple[str, torch.Tensor, float]]:
    """Yields name, stored values and stored bits of every matrix.

    Raises:
        ValueError: the quantizer fails, as some do on an odd number of groups.
    """
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    for name, weight in weights.items():
        quantizer = MatMulNBitsQuantizer(
            matmul_model(name, weight), group, symmetric, algo_config=config(name)
        )
        with redirect_stdout(sys.stderr):  # the quantizer prints its progress to stdout
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
        else:  # the algorithm stores zero points as floats
            zero = rest[0].reshape(rows, blocks, 1).astype(np.float32)
            bits += 8 * rest[0].nbytes
        values = ((codes - zero) * scale.astype(np.float32)).reshape(rows, -1)
        yield name, torch.from_numpy(values[:, : weight.shape[1]].copy()), bits


def nibbles(packed: np.ndarray) -> np.ndarray:
    """Unpacks two codes per byte, the low half first."""
    return np.stack((packed & 15, packed >> 4), -1).reshape(len(packed), -1)


def matmul_model(name: str, weight: torch.Tensor) -> onnx.ModelProto:
    """Returns a model of ``x @ weight.T`` in float16."""
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
