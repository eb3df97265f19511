"""Compares EdgeForge's quantizers with onnxruntime's: weights per second and relative error.

The script quantizes one matrix with a few wide columns, as trained weights have. EdgeForge reads
bfloat16 rows, as in an export; onnxruntime's MatMulNBits quantizer gets the float32 matrix that it
requires, in a graph of one MatMul. An error is the 2-norm of the difference between the stored
values and the weights, relative to the weights' 2-norm; the script computes it from the stored
numbers of both sides. The last two columns are EdgeForge's figures divided by onnxruntime's: a
speed above 1 is faster, an error below 1 is more exact. Integers are rounded to nearest; palettes
come from k-means and have no counterpart in onnxruntime.
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
from pages import add_page_option, write_block
from tables import line_up

from quant.formats.formats import PaletteFormat, parse_format
from quant.formats.packing import look_up, unpack_codes
from quant.quantizers.kmeans import KMeans
from quant.quantizers.rtn import RTN

FORMATS = ["int4-g32", "int4-g64", "int4-g128", "int4-g32-asym", "int4-g128-asym", "int8-g128"]
OURS_ALONE = ["int4-pc", "int8-pc", "lut4-gc16", "lut6-gc16", "lut8-gc16"]
ALGORITHMS = ["default", "rtn", "k_quant"]
CHUNK_WEIGHTS = 1 << 20
WIDTHS = [15, 22, 11, 14, 8, 8]


def main() -> None:
    """Reads the arguments, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--skip-peer", action="store_true")
    parser.add_argument("--json", type=Path, help="write all records here")
    add_page_option(parser)
    options = parser.parse_args()
    pin(options.threads)
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    weight = trained_like(options.rows, options.columns)
    records: dict[str, Any] = {}
    print(f"{options.rows} x {options.columns}, load average {os.getloadavg()[0]:.1f}")
    rows = [["format", "by", "M weights/s", "relative error", "speed", "error"]]
    print(line_up(rows[0], WIDTHS))
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
        # Contenders take turns, so that other load on the machine affects all of them.
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
            ratios = ["", ""]
            if label.startswith("onnxruntime"):
                ratios = [f"{rates[last] / rate:.2f}x", f"{errors[last] / errors[label]:.3f}x"]
            rows.append([name, label, f"{rate / 1e6:.1f}", f"{errors[label]:.5f}", *ratios])
            print(line_up(rows[-1], WIDTHS), flush=True)
        records[name] = {
            label: {"weights_per_s": rates[label], "relative_error": errors[label]}
            for label in rates
        }
    if options.json:
        options.json.write_text(json.dumps(records, indent=2) + "\n")
    if options.page:
        write_block(
            options.page,
            rows,
            f"One matrix of {options.rows} x {options.columns}. Speed and error are EdgeForge's "
            f"gain over that row.",
        )


def trained_like(rows: int, columns: int) -> torch.Tensor:
    """Returns normal weights, bfloat16 [rows, columns]; one column in 128 is four times as wide."""
    random = np.random.default_rng(0)
    weight = random.standard_normal((rows, columns), dtype=np.float32) / np.sqrt(columns)
    weight[:, random.choice(columns, columns // 128, replace=False)] *= 4
    return torch.from_numpy(weight).to(torch.bfloat16)


def ours(weight: torch.Tensor, name: str, threads: int) -> tuple[float, float]:
    """Quantizes all rows in chunks by a pool of threads; returns seconds and relative error."""
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
    """Does the same as `ours` for palettes, whose tables groups of rows share."""
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
    """Whether this script can get the format from onnxruntime's algorithm.

    `k_quant` always adds zero points; at 8 bits only the default algorithm works without a table
    of weight names.
    """
    if algorithm == "k_quant":
        return name.startswith("int4") and name.endswith("-asym")
    return algorithm == "default" or name.startswith("int4")


def peer(weight: torch.Tensor, name: str, algorithm: str) -> tuple[float, float]:
    """Quantizes the same matrix with onnxruntime; returns seconds and relative error."""
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
    """Returns a model of one MatMul with ``weight``, transposed to float32 [columns, rows]."""
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
    """Returns ``|W - decoded| / |W|`` for codes [rows, columns], scale and zero [rows, groups]."""
    values = weight.to(torch.float32).numpy()
    rows, columns = values.shape
    grouped = codes.reshape(rows, scale.shape[1], -1).astype(np.float32)
    if isinstance(zero, np.ndarray):
        zero = zero[..., None].astype(np.float32)
    decoded = ((grouped - zero) * scale[..., None].astype(np.float32)).reshape(rows, columns)
    return float(np.linalg.norm(values - decoded) / np.linalg.norm(values))


if __name__ == "__main__":
    main()
