"""EdgeForge's ONNX export against onnxruntime-genai's model builder, in turn in one run.

Each leg (an export, a load with its prefill and decode) runs in a process of its own, both sides
on the same cores, with the same threads, from the same checkpoint of random weights, and their
artifacts are timed by the same code. Repeats are interleaved, so that whatever else the machine
does falls on all alike; medians and their ratios are printed.
"""

import argparse
import importlib.util
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from measured_process import edgeforge, folder_bytes, pin, run, say
from tables import Gain, Metric, print_comparison

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
    """Read the arguments, run the legs, print the table."""
    options = parse_arguments()
    pin(options.threads)
    os.environ["HF_HUB_OFFLINE"] = "1"
    root = options.workdir or Path(tempfile.mkdtemp(prefix="onnx-export-"))
    root.mkdir(parents=True, exist_ok=True)
    try:
        records = measure(options, root)
    finally:
        if options.workdir is None:
            shutil.rmtree(root, ignore_errors=True)
    print_table(records, options)
    if options.json:
        options.json.write_text(json.dumps(records, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
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
        help="how often in a repeat each artifact is loaded and timed, in turn",
    )
    parser.add_argument("--skip-peer", action="store_true", help="measure EdgeForge alone")
    parser.add_argument("--skip-edgeforge", action="store_true", help="measure the peer alone")
    parser.add_argument(
        "--reuse", action="store_true", help="export only what --workdir does not hold yet"
    )
    parser.add_argument("--genai", action="store_true", help="also time both by onnxruntime-genai")
    parser.add_argument("--workdir", type=Path, help="keep the folders here (default: a scratch)")
    parser.add_argument("--json", type=Path, help="write all records here")
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
    """All legs; per contender a list of one record a repeat."""
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
        # Speeds next to each other in time, each round with the bandwidth of the moment.
        timed: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
        for turn in range(options.speed_rounds):
            probe = run([sys.executable, HERE / "bandwidth.py", "--threads", options.threads])
            bandwidths.append(probe.json()["bytes_per_s"])
            # Each goes first in its turn: what ran just before leaves its mark.
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
    """Write ``artifact`` from nothing; wall seconds and peak bytes."""
    cache = artifact.with_name(artifact.name + "-cache")
    for folder in (artifact, cache):
        shutil.rmtree(folder, ignore_errors=True)
    # What was written before must not be flushed to the disk on this leg's time.
    os.sync()
    if name == OURS:
        command = [edgeforge(), "export", checkpoint, "--target", "onnx"]
        command += ["--recipe", options.recipe, "--out", artifact]
        done = run(command, {"EDGEFORGE_CACHE": str(cache)})
    else:
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", checkpoint]
        command += ["-o", artifact, "-p", "int4", "-e", "cpu", "-c", cache]
        extra = PEER_OPTIONS[name]
        done = run([*command, "--extra_options", *extra] if extra else command)
    shutil.rmtree(cache, ignore_errors=True)
    say(f"  {name}: exported in {done.wall:.1f} s, peak {done.peak / 1e6:.0f} MB")
    return {"export_s": done.wall, "export_peak": done.peak}


def time_both_runtimes(name: str, artifact: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Speeds in onnxruntime, and in onnxruntime-genai where asked for."""
    record = time_artifact(artifact, options, "onnxruntime")
    tokens = record.pop("tokens")
    if options.genai:
        genai = time_artifact(artifact, options, "genai")
        agreed = common_start(tokens, genai.pop("tokens"))
        if agreed < min(options.decode, 8):
            say(f"  {name}: WARNING: the runtimes agree on {agreed} greedy tokens only")
        record |= {f"genai_{key}": value for key, value in genai.items()}
    return record


def time_artifact(artifact: Path, options: argparse.Namespace, runtime: str) -> dict[str, Any]:
    """Load, prefill and decode in a fresh process."""
    command = [sys.executable, HERE / "onnx_speed.py", artifact, "--runtime", runtime]
    for option in ("threads", "prefill", "decode"):
        command += [f"--{option}", getattr(options, option)]
    return run(command).json()


def bytes_per_token(artifact: Path) -> int:
    """Bytes of weights that one decoded token reads: all that matrix products refer to.

    Embedding rows are looked up, not read through, so a table counts only where the head is it.
    """
    import onnx

    config = json.loads((artifact / "genai_config.json").read_text())
    name = config["model"]["decoder"]["filename"]
    graph = onnx.load(artifact / name, load_external_data=False).graph
    sizes = {tensor.name: tensor_bytes(tensor) for tensor in graph.initializer}
    total = 0
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            # By its attributes: scales are float32 when they are read, however they are stored.
            wants = {entry.name: entry.i for entry in node.attribute}
            weights, groups = wants["K"] * wants["N"], wants["K"] // wants["block_size"]
            total += weights * wants["bits"] // 8 + wants["N"] * groups * 4
            total += sizes.get(node.input[3], 0) if len(node.input) > 3 else 0
        elif node.op_type in ("MatMul", "Gemm"):
            total += sum(sizes.get(name, 0) for name in node.input)
    return total


def tensor_bytes(tensor: Any) -> int:
    """Stored bytes of an ONNX initializer whose numbers may lie in another file."""
    import onnx

    for entry in tensor.external_data:
        if entry.key == "length":
            return int(entry.value)
    width = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return math.prod(tensor.dims) * width


def common_start(first: list[int], second: list[int]) -> int:
    """How many tokens two generations begin with in common."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def give_tokenizer(checkpoint: Path) -> None:
    """A byte tokenizer beside the random weights: the peer does not export without one."""
    from edgeforge.synth.synthesise import write_byte_tokenizer

    write_byte_tokenizer(checkpoint, entries=259)


def print_table(records: dict[str, Any], options: argparse.Namespace) -> None:
    """Medians a contender, and EdgeForge's gain over each other one (above 1: EdgeForge wins)."""
    legs = records["legs"]
    others = [name for name in legs if name != OURS] if OURS in legs else []
    genai = [replace(m, key=f"genai_{m.key}", title=f"genai: {m.title}") for m in METRICS]
    print(
        f"\n{options.preset}, {options.threads} threads, {options.repeats} repeats, prompt of "
        f"{options.prefill}, {options.decode} tokens decoded, memory bandwidth "
        f"{statistics.median(records['bandwidth']) / 1e9:.1f} GB/s"
    )
    gains = [Gain(f"gain over {name.removeprefix('peer ')}", OURS, name) for name in others]
    print_comparison([*METRICS, *genai], legs, gains)


def describe(record: dict[str, float]) -> str:
    """One line of what a repeat gave."""
    return (
        f"load {record['load_s']:.2f} s, prefill {record['prefill_tps']:.1f}, "
        f"decode {record['decode_tps']:.1f} tokens/s"
    )


if __name__ == "__main__":
    main()
