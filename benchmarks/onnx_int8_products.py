"""Products of 8-bit activations by 8-bit weights in ONNX Runtime: which are right, which are fast.

One matrix, one thread. Errors are relative L2 norms: against the float product, and against the
product of activations rounded token by token (`quant.program.ops.round_per_token`), which is what a
plan promises with ``int8-token``. Times are medians of interleaved rounds, as ratios to
``MatMulNBits`` at 8 bits in blocks of 128.

``signed`` weights go through kernels that add pairs of products in 16 bits on processors with AVX2
and no VNNI: their errors there are overflows.
"""

import argparse
import statistics
import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper

from quant.program.ops import round_per_token

MICROSOFT = "com.microsoft"
BASE = "MatMulNBits, block 128"
Arrays = dict[str, npt.NDArray[np.generic]]


def node(op: str, inputs: Sequence[str], output: str, domain: str = "", **given: object):
    """One ONNX node."""
    return helper.make_node(op, list(inputs), [output], domain=domain, **given)


def model(nodes: list[NodeProto], arrays: Arrays, size: int) -> bytes:
    """``x: float32[1, t, size]`` to ``y``, likewise."""
    used = {name for made in nodes for name in made.input}
    graph = helper.make_graph(
        nodes,
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, "t", size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, "t", size])],
        initializer=[numpy_helper.from_array(v, n) for n, v in arrays.items() if n in used],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(MICROSOFT, 1)]
    made: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=11).SerializeToString()
    return made


def per_token(codes: str, points: str) -> list[NodeProto]:
    """As `exporters.onnx.rounded` writes it."""
    return [
        node("Reshape", ["x", "flat"], "rows"),
        node("ReduceMax", ["rows", "last"], "highest", keepdims=0),
        node("ReduceMin", ["rows", "last"], "lowest", keepdims=0),
        node("Max", ["highest", "zero"], "high"),
        node("Min", ["lowest", "zero"], "low"),
        node("Sub", ["high", "low"], "range"),
        node("Div", ["range", "steps_of_8_bits"], "plain_step"),
        node("Max", ["plain_step", "smallest"], "steps"),
        node("Div", ["low", "steps"], "minus_zeros"),
        node("Neg", ["minus_zeros"], "plain_zeros"),
        node("Round", ["plain_zeros"], "zeros"),
        node("Cast", ["zeros"], "byte_zeros", to=TensorProto.UINT8),
        node("Cast", ["zeros"], "wide_zeros", to=TensorProto.INT32),
        node("QuantizeLinear", ["rows", "steps", "byte_zeros"], "q", axis=0),
        node("Unsqueeze", ["steps", "last"], "step"),
        node("Unsqueeze", ["wide_zeros", "last"], "zero_column"),
        node("Mul", ["zero_column", "minus_sums"], "correction"),
        node(
            "QGemm",
            ["q", "one", "byte_0", codes, "scale", points, "correction"],
            "unscaled",
            MICROSOFT,
            transB=1,
        ),
        node("Mul", ["unscaled", "step"], "scaled"),
        node("Reshape", ["scaled", "back"], "y"),
    ]


def static(codes: str, points: str) -> list[NodeProto]:
    """One scale that is known before."""
    product = ["q_rows", "input_scale", "byte_128", codes, "scale", points]
    return [
        node("QuantizeLinear", ["x", "input_scale", "byte_128"], "q"),
        node("Reshape", ["q", "flat"], "q_rows"),
        node("QGemm", product, "product", MICROSOFT, transB=1),
        node("Reshape", ["product", "back"], "y"),
    ]


def candidates(arrays: Arrays, size: int) -> dict[str, bytes]:
    """Models by what they are."""
    made = {}
    for block in (128, 256):
        arrays[f"blocks_{block}"] = arrays["unsigned"].reshape(size, size // block, block)
        arrays[f"scales_{block}"] = np.repeat(arrays["scale"][:, None], size // block, 1)
        fields = {"K": size, "N": size, "bits": 8, "block_size": block, "accuracy_level": 4}
        inputs = ["x", f"blocks_{block}", f"scales_{block}"]
        nodes = [node("MatMulNBits", inputs, "y", MICROSOFT, **fields)]
        made[f"MatMulNBits, block {block}"] = model(nodes, arrays, size)
    nodes = [node("DynamicQuantizeMatMul", ["x", "turned", "scale", "zeros_s"], "y", MICROSOFT)]
    made["DynamicQuantizeMatMul, signed"] = model(nodes, arrays, size)
    qdq = [
        node("QuantizeLinear", ["x", "input_scale", "sbyte_0"], "q"),
        node("DequantizeLinear", ["q", "input_scale", "sbyte_0"], "d"),
        node("DequantizeLinear", ["turned", "scale", "zeros_s"], "w", axis=1),
        node("MatMul", ["d", "w"], "y"),
    ]
    made["one scale: QDQ, signed"] = model(qdq, arrays, size)
    for codes, points in (("signed", "zeros_s"), ("unsigned", "zeros_u")):
        made[f"one scale: QGemm, {codes}"] = model(static(codes, points), arrays, size)
        made[f"per token: QGemm, {codes}"] = model(per_token(codes, points), arrays, size)
    return made


def main() -> None:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    size, draw = options.size, np.random.default_rng(0)
    signed = draw.integers(-127, 128, (size, size)).astype(np.int8)
    scale = (1e-3 * (draw.random(size) + 0.5)).astype(np.float32)
    x = draw.standard_normal((1, 128, size)) * np.exp(draw.standard_normal((1, 128, 1)))
    x = (x + 0.1).astype(np.float32)
    arrays: Arrays = {
        "signed": signed,
        "turned": np.ascontiguousarray(signed.T),
        "unsigned": (signed.astype(np.int16) + 128).astype(np.uint8),
        "scale": scale,
        "zeros_s": np.zeros(size, np.int8),
        "zeros_u": np.full(size, 128, np.uint8),
        "minus_sums": -signed.sum(1, dtype=np.int32),
        "input_scale": np.array(np.abs(x).max() / 127, np.float32),
        "byte_0": np.array(0, np.uint8),
        "byte_128": np.array(128, np.uint8),
        "sbyte_0": np.array(0, np.int8),
        "one": np.array(1, np.float32),
        "zero": np.array(0, np.float32),
        "steps_of_8_bits": np.array(255, np.float32),
        "smallest": np.array(1e-30, np.float32),
        "last": np.array([1], np.int64),
        "flat": np.array([-1, size], np.int64),
        "back": np.array([1, -1, size], np.int64),
    }
    weight = signed.astype(np.float64) * scale[:, None].astype(np.float64)
    exact = x.astype(np.float64) @ weight.T
    promised = round_per_token(torch.from_numpy(x)).double().numpy() @ weight.T
    sessions, errors = {}, {}
    for name, data in candidates(arrays, size).items():
        chosen = onnxruntime.SessionOptions()
        chosen.intra_op_num_threads, chosen.log_severity_level = 1, 3
        sessions[name] = onnxruntime.InferenceSession(data, chosen)
        found = sessions[name].run(None, {"x": x})[0]
        errors[name] = [
            float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
            for wanted in (exact, promised)
        ]
    times: dict[tuple[str, int], list[float]] = {}
    for _ in range(options.rounds):
        for tokens, repeats in ((1, 40), (128, 2)):
            given = {"x": x[:, :tokens]}
            for name, session in sessions.items():
                session.run(None, given)
                begun = time.perf_counter()
                for _ in range(repeats):
                    session.run(None, given)
                spent = (time.perf_counter() - begun) / repeats
                times.setdefault((name, tokens), []).append(spent)
    print(f"{'':32} {'error':>9} {'promised':>9} {'1 token':>9} {'128':>9}")
    for name in sessions:
        ratios = [
            statistics.median(times[name, tokens]) / statistics.median(times[BASE, tokens])
            for tokens in (1, 128)
        ]
        first, second = errors[name]
        print(f"{name:<32} {first:>9.2e} {second:>9.2e} {ratios[0]:>9.2f} {ratios[1]:>9.2f}")


if __name__ == "__main__":
    main()
