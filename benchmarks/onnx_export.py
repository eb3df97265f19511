"""Compares EdgeForge's ONNX export with onnxruntime-genai's model builder, in one run.

Each leg (an export, or a load with its prefill and decode) runs in its own process. Both sides run
on the same cores with the same number of threads, from the same checkpoint of random weights, and
the same code times their artifacts. Repeats are interleaved, so that other load on the machine
affects all contenders. The script prints medians and their ratios.
"""

import argparse
import importlib.util
import json
import math
import os
import shutil
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from measured_process import edgeforge, folder_bytes, pin, run, say, work_folder
from pages import add_page_option, write_block
from tables import Gain, Metric, comparison_rows, print_rows

HERE = Path(__file__).resolve().parent
PEER_OPTIONS = {
    "peer default": [],
    "peer tuned": ["block_size=128", "prune_lm_head=true", "fuse_mlp_gate_up=true"],
}
OURS = "EdgeForge"


METRICS = [
    Metric("export_s", "export, s", 1, 1, True),
    Metric("export_peak", "export peak memory, MB", 1e6, 0, True),
    Metric("artifact", "artifact, MB", 1e6, 1, True),
    Metric("load_s", "load, s", 1, 2, True),
    Metric("loaded_peak", "peak memory to load, MB", 1e6, 0, True),
    Metric("peak", "peak memory to run, MB", 1e6, 0, True),
    Metric("prefill_tps", "prefill, tokens/s", 1, 1, False),
    Metric("decode_tps", "decode, tokens/s", 1, 1, False),
    Metric("read_per_token", "weights read a token, MB", 1e6, 1, True),
    Metric("bandwidth_share", "decode, % of memory bandwidth", 0.01, 0, False),
]


def main() -> None:
    """Reads the arguments, runs the legs, prints the table."""
    options = parse_arguments()
    pin(options.threads)
    os.environ["HF_HUB_OFFLINE"] = "1"
    with work_folder(options.workdir, "onnx-export-") as root:
        records = measure(options, root)
    print_table(records, options)
    if options.json:
        options.json.write_text(json.dumps(records, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    """Reads the command line, and checks that the peer's packages are installed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="llama-3.2-1b", help="a shape of `edgeforge synth`")
    parser.add_argument("--recipe", default="int4-g128", help="EdgeForge's recipe")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prefill", type=int, default=128, help="tokens in the prompt")
    parser.add_argument("--decode", type=int, default=64, help="tokens generated")
    parser.add_argument(
        "--speed-rounds",
        type=int,
        default=5,
        help="how often each repeat loads and times every artifact",
    )
    parser.add_argument("--skip-peer", action="store_true", help="measure only EdgeForge")
    parser.add_argument("--skip-edgeforge", action="store_true", help="measure only the peer")
    parser.add_argument(
        "--reuse", action="store_true", help="export only what --workdir does not hold yet"
    )
    parser.add_argument("--genai", action="store_true", help="also time with onnxruntime-genai")
    parser.add_argument("--workdir", type=Path, help="keep the folders here (default: a scratch)")
    parser.add_argument("--json", type=Path, help="write all records here")
    add_page_option(parser)
    options = parser.parse_args()
    if not options.skip_peer:
        missing = [
            name
            for name in ("onnxruntime_genai", "transformers", "onnx_ir")
            if importlib.util.find_spec(name) is None
        ]
        if missing:
            parser.error(f"the peer needs {', '.join(missing)}: install them, or use --skip-peer")
    return options


def measure(options: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Runs all legs; returns one record per repeat for each contender."""
    checkpoint = root / options.preset
    if not checkpoint.exists():
        say(f"writing random weights of {options.preset}")
        run([edgeforge(), "synth", options.preset, "--out", checkpoint])
    if not options.skip_peer and not (checkpoint / "tokenizer.json").exists():
        give_tokenizer(checkpoint)
    contenders = [] if options.skip_edgeforge else [OURS]
    contenders += [] if options.skip_peer else list(PEER_OPTIONS)
    legs: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    bandwidths = []
    for repeat in range(options.repeats):
        load = os.getloadavg()[0]
        say(f"repeat {repeat + 1} of {options.repeats} (load average {load:.1f})")
        for name in contenders:
            artifact = root / name.lower().replace(" ", "-")
            record = {"load_average": os.getloadavg()[0]}
            if not (options.reuse and artifact.exists()):
                record |= export(name, checkpoint, artifact, options)
            record["artifact"] = folder_bytes(artifact)
            record["read_per_token"] = bytes_per_token(artifact)
            legs[name].append(record)
        # Contenders are timed close together, and each round measures the bandwidth of the moment.
        timed: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
        for turn in range(options.speed_rounds):
            probe = run([sys.executable, HERE / "bandwidth.py", "--threads", options.threads])
            bandwidths.append(probe.json()["bytes_per_s"])
            # The contenders take turns to go first, because what ran before affects a timing.
            first = turn % len(contenders)
            for name in contenders[first:] + contenders[:first]:
                artifact = root / name.lower().replace(" ", "-")
                record = time_both_runtimes(name, artifact, options)
                read = record["decode_tps"] * legs[name][-1]["read_per_token"]
                timed[name].append(record | {"bandwidth_share": read / bandwidths[-1]})
        for name, rounds in timed.items():
            legs[name][-1] |= {
                key: statistics.median(record[key] for record in rounds) for key in rounds[0]
            }
            legs[name][-1]["rounds"] = rounds
            say(f"  {name}: {describe(legs[name][-1])}")
    return {"preset": options.preset, "bandwidth": bandwidths, "legs": legs}


def export(
    name: str, checkpoint: Path, artifact: Path, options: argparse.Namespace
) -> dict[str, float]:
    """Exports ``artifact`` with empty caches; returns wall seconds and peak bytes."""
    cache = artifact.with_name(artifact.name + "-cache")
    for folder in (artifact, cache):
        shutil.rmtree(folder, ignore_errors=True)
    # Flushes earlier writes now, so that this export's time does not include them.
    os.sync()
    if name == OURS:
        command = [edgeforge(), "export", checkpoint, "--target", "onnx"]
        command += ["--recipe", options.recipe, "--out", artifact]
        done = run(command, {"EDGEFORGE_CACHE": str(cache)})
    else:
        command = [sys.executable, "-P", "-m", "onnxruntime_genai.models.builder", "-i", checkpoint]
        command += ["-o", artifact, "-p", "int4", "-e", "cpu", "-c", cache]
        extra = PEER_OPTIONS[name]
        done = run([*command, "--extra_options", *extra] if extra else command)
    shutil.rmtree(cache, ignore_errors=True)
    say(f"  {name}: exported in {done.wall:.1f} s, peak {done.peak / 1e6:.0f} MB")
    return {"export_s": done.wall, "export_peak": done.peak}


def time_both_runtimes(name: str, artifact: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measures speeds in onnxruntime, and in onnxruntime-genai where asked for."""
    record = time_artifact(artifact, options, "onnxruntime")
    tokens = record.pop("tokens")
    if options.genai:
        genai = time_artifact(artifact, options, "genai")
        agreed = common_start(tokens, genai.pop("tokens"))
        if agreed < min(options.decode, 8):
            say(f"  {name}: WARNING: the runtimes agree on only the first {agreed} greedy tokens")
        record |= {f"genai_{key}": value for key, value in genai.items()}
    return record


def time_artifact(artifact: Path, options: argparse.Namespace, runtime: str) -> dict[str, Any]:
    """Times load, prefill and decode in a fresh process."""
    command = [sys.executable, HERE / "onnx_speed.py", artifact, "--runtime", runtime]
    for option in ("threads", "prefill", "decode"):
        command += [f"--{option}", getattr(options, option)]
    return run(command).json()


def bytes_per_token(artifact: Path) -> int:
    """Returns the bytes of weights that one decoded token reads: those of all matrix products.

    An embedding reads only a few rows, so its table counts only where it is also the head.
    """
    import onnx

    config = json.loads((artifact / "genai_config.json").read_text())
    name = config["model"]["decoder"]["filename"]
    graph = onnx.load(artifact / name, load_external_data=False).graph
    sizes = {tensor.name: tensor_bytes(tensor) for tensor in graph.initializer}
    total = 0
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            # Not the stored size: the kernel reads float32 scales, whatever the stored dtype is.
            wants = {entry.name: entry.i for entry in node.attribute}
            weights, groups = wants["K"] * wants["N"], wants["K"] // wants["block_size"]
            total += weights * wants["bits"] // 8 + wants["N"] * groups * 4
            total += sizes.get(node.input[3], 0) if len(node.input) > 3 else 0
        elif node.op_type in ("MatMul", "Gemm"):
            total += sum(sizes.get(name, 0) for name in node.input)
    return total


def tensor_bytes(tensor: Any) -> int:
    """Returns the stored bytes of an ONNX initializer, whose data may lie in another file."""
    import onnx

    for entry in tensor.external_data:
        if entry.key == "length":
            return int(entry.value)
    width = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return math.prod(tensor.dims) * width


def common_start(first: list[int], second: list[int]) -> int:
    """Returns the number of tokens that two generations have in common at their start."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def give_tokenizer(checkpoint: Path) -> None:
    """Writes a byte tokenizer beside the random weights: the peer does not export without one."""
    from edgeforge.synth.synthesise import write_byte_tokenizer

    write_byte_tokenizer(checkpoint, entries=259)


def print_table(records: dict[str, Any], options: argparse.Namespace) -> None:
    """Prints each contender's medians and EdgeForge's gain over the others (above 1: better)."""
    legs = records["legs"]
    others = [name for name in legs if name != OURS] if OURS in legs else []
    genai = [replace(m, key=f"genai_{m.key}", title=f"genai: {m.title}") for m in METRICS]
    about = (
        f"{options.preset}, {options.threads} threads, {options.repeats} repeats, prompt of "
        f"{options.prefill}, {options.decode} tokens decoded, memory bandwidth "
        f"{statistics.median(records['bandwidth']) / 1e9:.1f} GB/s"
    )
    print(f"\n{about}")
    gains = [Gain(f"gain over {name.removeprefix('peer ')}", OURS, name) for name in others]
    rows = comparison_rows([*METRICS, *genai], legs, gains)
    print_rows(rows)
    if options.page:
        write_block(options.page, rows, f"{about}.")


def describe(record: dict[str, float]) -> str:
    """Returns one line with the figures of a repeat."""
    return (
        f"load {record['load_s']:.2f} s, prefill {record['prefill_tps']:.1f}, "
        f"decode {record['decode_tps']:.1f} tokens/s"
    )


if __name__ == "__main__":
    main()
