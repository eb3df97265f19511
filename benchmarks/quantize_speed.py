"""Quantizers: weights a second and squared error, ours against onnxruntime's.

One matrix with a few wide columns, as trained weights have. Ours reads bfloat16 rows, as an export
does; onnxruntime's MatMulNBits quantizer is given the float32 matrix that it wants, in a graph of
one MatMul. Errors are of the float values that the stored numbers stand for, relative to the
weights (the ratio of 2-norms), computed here from the stored numbers on both sides. The last two
columns are EdgeForge's figures over theirs: more than 1 is faster, less than 1 is more exact.
Integers are rounded to nearest; palettes are found by k-means and have no peer there.
"""

import argparse
import contextlib
import io
import json
import logging
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from measured_process import pin

from quant.formats.formats import PaletteFormat, parse_format
from quant.formats.packing import look_up, unpack_codes
from quant.quantizers.kmeans import KMeans
from quant.quantizers.rtn import RTN

FORMATS = ["int4-g32", "int4-g64", "int4-g128", "int4-g32-asym", "int4-g128-asym", "int8-g128"]
OURS_ALONE = ["int4-pc", "int8-pc", "lut4-gc16", "lut6-gc16", "lut8-gc16"]
ALGORITHMS = ["default", "rtn", "k_quant"]
CHUNK_WEIGHTS = 1 << 20


def main() -> None:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--skip-peer", action="store_true")
    parser.add_argument("--json", type=Path, help="write all records here")
    options = parser.parse_args()
    pin(options.threads)
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    weight = trained_like(options.rows, options.columns)
    records: dict[str, Any] = {}
    print(f"{options.rows} x {options.columns}, load average {os.getloadavg()[0]:.1f}")
    print("format          by                     M weights/s  relative error    speed    error")
    for name in FORMATS + OURS_ALONE:
        contenders: dict[str, Callable[[], tuple[float, float]]] = {}
        for threads in sorted({1, options.threads}):
            label = f"EdgeForge, {threads} thread{'s' * (threads > 1)}"
            contenders[label] = lambda name=name, threads=threads: ours(weight, name, threads)
        if name in FORMATS and not options.skip_peer:
            for algorithm in ALGORITHMS:
                if peer_can(algorithm, name):
                    contenders[f"onnxruntime, {algorithm}"] = (
                        lambda name=name, algorithm=algorithm: peer(weight, name, algorithm)
                    )
        runs = {label: [] for label in contenders}
        # In turn, so that whatever else the machine does falls on all alike.
        for _ in range(options.repeats):
            for label, run in contenders.items():
                runs[label].append(run())
        rates = {
            label: weight.numel() / statistics.median(seconds for seconds, _ in pairs)
            for label, pairs in runs.items()
        }
        errors = {label: pairs[0][1] for label, pairs in runs.items()}
        last = f"EdgeForge, {options.threads} thread{'s' * (options.threads > 1)}"
        for label, rate in rates.items():
            ratios = ""
            if label.startswith("onnxruntime"):
                ratios = f"  {rates[last] / rate:6.2f}x  {errors[last] / errors[label]:6.3f}x"
            print(f"{name:15} {label:22} {rate / 1e6:11.1f}  {errors[label]:14.5f}{ratios}")
        records[name] = {
            label: {"weights_per_s": rates[label], "relative_error": errors[label]}
            for label in rates
        }
    if options.json:
        options.json.write_text(json.dumps(records, indent=2) + "\n")


def trained_like(rows: int, columns: int) -> torch.Tensor:
    """Normal weights, one column in 128 four times as wide: bfloat16 [rows, columns]."""
    random = np.random.default_rng(0)
    weight = random.standard_normal((rows, columns), dtype=np.float32) / np.sqrt(columns)
    weight[:, random.choice(columns, columns // 128, replace=False)] *= 4
    return torch.from_numpy(weight).to(torch.bfloat16)


def ours(weight: torch.Tensor, name: str, threads: int) -> tuple[float, float]:
    """Seconds to quantize all rows in chunks by a pool of threads; the relative error."""
    fmt = parse_format(name)
    step = max(1, CHUNK_WEIGHTS // weight.shape[1])
    if isinstance(fmt, PaletteFormat):
        return palettes(weight, fmt, step, threads)
    chunks = weight.split(step)
    with ThreadPoolExecutor(threads) as pool:
        began = time.perf_counter()
        made = list(pool.map(lambda rows: RTN.quantize_rows(rows, fmt), chunks))
        seconds = time.perf_counter() - began
    columns = weight.shape[1]
    groups = fmt.groups(columns)
    codes = np.concatenate([unpack_codes(m.codes, fmt, columns).numpy() for m in made])
    scale = np.concatenate([m.scale.to(torch.float32).numpy() for m in made])
    zero: np.ndarray | int = fmt.implicit_zero_point
    if not fmt.symmetric:
        zero = np.concatenate([unpack_codes(m.zero_point, fmt, groups).numpy() for m in made])
    return seconds, relative_error(weight, codes, scale, zero)


def palettes(
    weight: torch.Tensor, fmt: PaletteFormat, step: int, threads: int
) -> tuple[float, float]:
    """As `ours`, for tables that groups of rows share."""
    group = fmt.rows_per_group or len(weight)
    chunks = weight.split(max(1, step // group) * group)
    quantizer = KMeans()
    with ThreadPoolExecutor(threads) as pool:
        began = time.perf_counter()
        made = list(pool.map(lambda rows: quantizer.quantize_groups(rows, fmt), chunks))
        seconds = time.perf_counter() - began
    values = torch.cat([look_up(m.codes, m.lut, fmt) for m in made])
    wide = weight.to(torch.float32)
    return seconds, float((wide - values).norm() / wide.norm())


def peer_can(algorithm: str, name: str) -> bool:
    """Whether onnxruntime's algorithm writes this format.

    `k_quant` always adds zero points; at 8 bits the default algorithm alone needs no table of
    weight names.
    """
    if algorithm == "k_quant":
        return name.startswith("int4") and name.endswith("-asym")
    return algorithm == "default" or name.startswith("int4")


def peer(weight: torch.Tensor, name: str, algorithm: str) -> tuple[float, float]:
    """Seconds of onnxruntime's quantizer on the same matrix; the relative error."""
    from onnxruntime.quantization import matmul_nbits_quantizer as nbits

    fmt = parse_format(name)
    configs = {
        "default": nbits.DefaultWeightOnlyQuantConfig(
            block_size=fmt.group_size, is_symmetric=fmt.symmetric, accuracy_level=4, bits=fmt.bits
        ),
        "rtn": nbits.RTNWeightOnlyQuantConfig(),
        "k_quant": nbits.KQuantWeightOnlyQuantConfig(),
    }
    quantizer = nbits.MatMulNBitsQuantizer(
        one_matmul(weight),
        bits=fmt.bits,
        block_size=fmt.group_size,
        is_symmetric=fmt.symmetric,
        accuracy_level=4,
        algo_config=configs[algorithm],
    )
    began = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        quantizer.process()
    seconds = time.perf_counter() - began
    graph = quantizer.model.model.graph
    stored = {entry.name: onnx.numpy_helper.to_array(entry) for entry in graph.initializer}
    node = next(node for node in graph.node if node.op_type == "MatMulNBits")
    codes, scale, *rest = (stored[entry] for entry in node.input[1:4] if entry)
    rows, columns = weight.shape
    groups = columns // fmt.group_size
    codes = unpack_codes(torch.from_numpy(codes.reshape(rows, -1).copy()), fmt, columns).numpy()
    zero: np.ndarray | int = fmt.implicit_zero_point
    if rest:
        packed = torch.from_numpy(rest[0].reshape(rows, -1).copy())
        zero = unpack_codes(packed, fmt, groups).numpy()
    return seconds, relative_error(weight, codes, scale.reshape(rows, groups), zero)


def one_matmul(weight: torch.Tensor) -> onnx.ModelProto:
    """A graph of one MatMul with ``weight``, float32 [columns, rows] as ONNX has it."""
    rows, columns = weight.shape
    values = weight.to(torch.float32).numpy().T
    make = onnx.helper
    graph = make.make_graph(
        [make.make_node("MatMul", ["x", "weight"], ["y"], name="matmul")],
        "one",
        [make.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, columns])],
        [make.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, rows])],
        [onnx.numpy_helper.from_array(np.ascontiguousarray(values), "weight")],
    )
    opsets = [make.make_opsetid("", 21)]
    return make.make_model(graph, opset_imports=opsets, ir_version=10)


def relative_error(
    weight: torch.Tensor, codes: np.ndarray, scale: np.ndarray, zero: np.ndarray | int
) -> float:
    """``|W - decoded| / |W|``; codes [rows, columns], scale and zero [rows, groups]."""
    values = weight.to(torch.float32).numpy()
    rows, columns = values.shape
    grouped = codes.reshape(rows, scale.shape[1], -1).astype(np.float32)
    if isinstance(zero, np.ndarray):
        zero = zero[..., None].astype(np.float32)
    decoded = ((grouped - zero) * scale[..., None].astype(np.float32)).reshape(rows, columns)
    return float(np.linalg.norm(values - decoded) / np.linalg.norm(values))


if __name__ == "__main__":
    main()
