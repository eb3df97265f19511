"""Compares EdgeForge's ExecuTorch export with ExecuTorch's own `export_llm`, in one run.

Both start from the same checkpoint of random weights at Llama-3.2-1B's shape, 4 layers of it unless
`--full` is given. The peer gets the checkpoint in the layout that it reads; that conversion is not
counted. Each export and each timing runs in its own process, on the same cores with the same number
of threads, and the same code times all programs. The script prints medians and their ratios.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from measured_process import edgeforge, pin, run, say, work_folder
from pages import add_page_option, write_block
from tables import Gain, Metric, comparison_rows, print_rows

HERE = Path(__file__).resolve().parent
PRESET, SLICE_LAYERS = "llama-3.2-1b", 4
PEER = "export_llm"
RECIPES = {"EdgeForge g32": "int4-g32", "EdgeForge g128": "int4-g128"}
POSITIONS = 8, 512, 1500

METRICS = [
    Metric("export_s", "export, s", 1, 1, True),
    Metric("export_cpu", "export, CPU s", 1, 1, True),
    Metric("export_peak", "export peak memory, MB", 1e6, 0, True),
    Metric("artifact", "program, MB", 1e6, 1, True),
    Metric("load_s", "load (repacks weights), s", 1, 2, True),
    Metric("peak", "peak memory to run, MB", 1e6, 0, True),
    Metric("prefill_tps", "prefill of 128, tokens/s", 1, 1, False),
    *(Metric(f"decode_tps_{at}", f"decode at {at}, tokens/s", 1, 1, False) for at in POSITIONS),
]


def main() -> None:
    """Reads the arguments, runs the legs, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="the whole model, not 4 layers of it")
    parser.add_argument("--repeats", type=int, default=1, help="exports per contender")
    parser.add_argument("--rounds", type=int, default=3, help="timings per contender and repeat")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--skip-peer", action="store_true", help="measure only EdgeForge")
    parser.add_argument(
        "--reuse", action="store_true", help="export only what --workdir does not hold yet"
    )
    parser.add_argument("--workdir", type=Path, help="keep the folders here (default: a scratch)")
    parser.add_argument("--json", type=Path, help="write all records here")
    add_page_option(parser)
    options = parser.parse_args()
    pin(options.threads)
    os.environ["HF_HUB_OFFLINE"] = "1"
    with work_folder(options.workdir, "executorch-export-") as root:
        records = measure(options, root)
    print_table(records, options)
    if options.json:
        options.json.write_text(json.dumps(records, indent=2) + "\n")


def measure(options: argparse.Namespace, root: Path) -> dict[str, list[dict[str, Any]]]:
    """Runs all exports and timings; returns one record per repeat for each contender."""
    checkpoint = root / ("model" if options.full else f"{SLICE_LAYERS}-layers")
    contenders = [*RECIPES] if options.skip_peer else [PEER, *RECIPES]
    if not checkpoint.exists():
        say("writing random weights")
        write_checkpoint(checkpoint, None if options.full else SLICE_LAYERS)
    if not options.skip_peer and not (checkpoint / "meta.pth").exists():
        run([sys.executable, HERE / "executorch_checkpoint.py", checkpoint])
    legs: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    for repeat in range(options.repeats):
        say(f"repeat {repeat + 1} of {options.repeats} (load average {os.getloadavg()[0]:.1f})")
        programs = {name: root / f"{name.lower().replace(' ', '-')}" for name in contenders}
        for name, folder in programs.items():
            record = {"load_average": os.getloadavg()[0]}
            if not (options.reuse and (folder / "model.pte").exists()):
                record |= export(name, checkpoint, folder, options)
            record["artifact"] = (folder / "model.pte").stat().st_size
            legs[name].append(record)
        timed: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
        for turn in range(options.rounds):
            # The contenders take turns to go first, because what ran before affects a timing.
            first = turn % len(contenders)
            for name in contenders[first:] + contenders[:first]:
                timed[name].append(time_program(programs[name], options))
                say(f"  {name}: {describe(timed[name][-1])}")
        for name, rounds in timed.items():
            legs[name][-1] |= {
                key: statistics.median(record[key] for record in rounds) for key in rounds[0]
            }
            legs[name][-1]["rounds"] = rounds
        say(f"  cosine of the first prompt's logits: {agreement(programs)}")
    return legs


def write_checkpoint(folder: Path, layers: int | None) -> None:
    """Writes random weights at the true shape, with fewer layers where asked for."""
    from edgeforge.synth.synthesise import PRESETS, synthesise

    preset = PRESETS[PRESET]
    if layers is not None:
        preset = replace(preset, config={**preset.config, "num_hidden_layers": layers})
        PRESETS[folder.name] = preset
    synthesise(PRESET if layers is None else folder.name, folder)


def export(
    name: str, checkpoint: Path, folder: Path, options: argparse.Namespace
) -> dict[str, float]:
    """Exports ``folder / model.pte`` with empty caches; returns seconds and peak bytes."""
    cache = folder.with_name(folder.name + "-cache")
    for old in (folder, cache):
        shutil.rmtree(old, ignore_errors=True)
    # Flushes earlier writes now, so that this export's time does not include them.
    os.sync()
    if name == PEER:
        folder.mkdir()
        done = run(peer_command(checkpoint, folder, options.context))
    else:
        command = [edgeforge(), "export", checkpoint, "--target", "executorch", "--out", folder]
        command += ["--recipe", RECIPES[name], "--context", str(options.context), "--quiet"]
        done = run(command, {"EDGEFORGE_CACHE": str(cache)})
    shutil.rmtree(cache, ignore_errors=True)
    say(
        f"  {name}: exported in {done.wall:.1f} s ({done.cpu:.1f} s of CPU), "
        f"peak {done.peak / 1e6:.0f} MB"
    )
    return {"export_s": done.wall, "export_cpu": done.cpu, "export_peak": done.peak}


def peer_command(checkpoint: Path, folder: Path, context: int) -> list[str | Path]:
    """Returns ExecuTorch's command line as documented for XNNPACK, with groups of 32."""
    return [
        *(sys.executable, "-P", "-m", "executorch.extension.llm.export.export_llm"),
        "base.model_class=llama3_2",
        f"base.checkpoint={checkpoint / 'meta.pth'}",
        f"base.params={checkpoint / 'params.json'}",
        "model.use_kv_cache=True",
        "model.use_sdpa_with_kv_cache=True",
        "model.dtype_override=fp32",
        "quantization.qmode=8da4w",
        "quantization.group_size=32",
        "quantization.embedding_quantize='4,32'",
        "backend.xnnpack.enabled=True",
        "backend.xnnpack.extended_ops=True",
        "export.max_seq_length=129",  # its program takes one token fewer per call: 128
        f"export.max_context_length={context}",
        f"export.output_dir={folder}",
        f"export.output_name={folder / 'model.pte'}",  # a name ending in .pte is used as a path
        f"hydra.run.dir={folder}",
    ]


def time_program(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Times load, prefill and decode in a fresh process."""
    command = [sys.executable, HERE / "executorch_speed.py", folder / "model.pte"]
    command += ["--threads", str(options.threads), "--positions", *map(str, POSITIONS)]
    return run([*command, "--logits", folder / "logits.npy"]).json()


def agreement(programs: dict[str, Path]) -> str:
    """Returns the cosines between contenders' logits, to show that they run the same weights."""
    import numpy as np

    logits = {name: np.load(folder / "logits.npy") for name, folder in programs.items()}
    first, *others = logits
    cosines = (
        np.dot(logits[first], logits[name])
        / (np.linalg.norm(logits[first]) * np.linalg.norm(logits[name]))
        for name in others
    )
    return ", ".join(
        f"{first} and {name} {cosine:.3f}" for name, cosine in zip(others, cosines, strict=True)
    )


def describe(record: dict[str, float]) -> str:
    """Returns one line with the figures of a round."""
    decode = " ".join(f"{record[f'decode_tps_{at}']:.1f}" for at in POSITIONS)
    return (
        f"load {record['load_s']:.2f} s, prefill {record['prefill_tps']:.1f}, decode {decode} "
        f"tokens/s (load average {os.getloadavg()[0]:.1f})"
    )


def print_table(legs: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> None:
    """Prints each contender's medians and EdgeForge's gain over the peer (above 1: better)."""
    shape = PRESET if options.full else f"{SLICE_LAYERS} layers of {PRESET}"
    about = (
        f"{shape}, context {options.context}, {options.threads} threads, {options.repeats} "
        f"repeats of {options.rounds} rounds"
    )
    print(f"\n{about}")
    ours = [name for name in RECIPES if PEER in legs]
    gains = [Gain(f"{name.removeprefix('EdgeForge ')} over {PEER}", name, PEER) for name in ours]
    rows = comparison_rows(METRICS, legs, gains)
    print_rows(rows)
    if options.page:
        write_block(options.page, rows, f"{about}.")


if __name__ == "__main__":
    main()
