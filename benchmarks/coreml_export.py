"""Compares EdgeForge's Core ML export with coremltools' own, interleaved in one run.

Both sides begin with weights that are quantized already. EdgeForge has a filled weight store, and
traces, lowers and writes three functions. coremltools has the package, and reads and writes one
function of it. Each export runs in its own process, imports included, on the same cores. Repeats
are interleaved, and the script prints medians and their ratios.
"""

import argparse
import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from measured_process import edgeforge, folder_bytes, pin, run, say, work_folder
from pages import add_page_option, write_block
from tables import Gain, Metric, comparison_rows, print_rows

from edgeforge.synth.presets import PRESETS
from edgeforge.synth.synthesise import synthesise
from exporters.coreml.names import DECODE, PACKAGE

HERE = Path(__file__).resolve().parent
OURS, THEIRS = "EdgeForge", "coremltools"
METRICS = [
    Metric("seconds", "export, s"),
    Metric("peak", "peak memory, MB", 1e6, 0),
    Metric("artifact", "package, MB", 1e6),
]


def main() -> None:
    """Reads the arguments, runs the exports, prints the table."""
    options = parse_arguments()
    pin(options.threads)
    with work_folder(options.workdir, "coreml-export-") as root:
        records = measure(options, root)
    print_table(records, options)
    if options.json:
        options.json.write_text(json.dumps(records, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="llama-3.2-1b", help="a shape of `edgeforge synth`")
    parser.add_argument("--layers", type=int, default=4, help="how many of its layers; 0: all")
    parser.add_argument("--recipe", default="int4", help="EdgeForge's recipe")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--skip-coremltools", action="store_true", help="measure only EdgeForge")
    parser.add_argument("--workdir", type=Path, help="keep the folders here (default: a scratch)")
    parser.add_argument("--json", type=Path, help="write all records here")
    add_page_option(parser)
    return parser.parse_args()


def measure(options: argparse.Namespace, root: Path) -> dict[str, list[dict[str, Any]]]:
    """Returns one record per repeat for each contender; fills the store before timing anything."""
    checkpoint = root / f"{options.preset}-{options.layers}"
    if not checkpoint.exists():
        say(f"writing random weights of {checkpoint.name}")
        shape = PRESETS[options.preset]
        if options.layers:
            config = {**shape.config, "num_hidden_layers": options.layers}
            PRESETS["slice"] = dataclasses.replace(shape, config=config)
        synthesise("slice" if options.layers else options.preset, checkpoint)
    os.environ["EDGEFORGE_CACHE"] = str(root / "cache")
    package = root / "edgeforge" / PACKAGE
    export = [
        *(edgeforge(), "export", checkpoint, "-q"),
        *("--target", "coreml", "--recipe", options.recipe, "--out", root / "edgeforge"),
    ]
    say("filling the weight store")
    run([*export, "--force"])
    contenders = [OURS] if options.skip_coremltools else [OURS, THEIRS]
    records: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    for repeat in range(options.repeats):
        for name in contenders:
            say(f"repeat {repeat + 1} of {options.repeats}: {name}")
            if name == OURS:
                done, written = run([*export, "--force"]), package
            else:
                written = root / "coremltools.mlpackage"
                shutil.rmtree(written, ignore_errors=True)
                script = HERE / "coremltools_export.py"
                done = run([sys.executable, script, package, written, DECODE])
            records[name].append(
                {"seconds": done.wall, "peak": done.peak, "artifact": folder_bytes(written)}
            )
    return records


def print_table(records: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> None:
    """Prints medians, and the ratio of coremltools' to EdgeForge's."""
    layers = f"{options.layers} layers" if options.layers else "all layers"
    about = f"{options.preset}, {layers}, {options.recipe}"
    print(f"{about}; load {os.getloadavg()[0]:.1f}")
    gains = [Gain("gain", OURS, THEIRS)] if THEIRS in records else []
    rows = comparison_rows(METRICS, records, gains)
    print_rows(rows)
    if options.page:
        write_block(options.page, rows, f"{about}.")


if __name__ == "__main__":
    main()
