"""Exports presets at released sizes whole to every target: seconds, peak memory, bytes.

The weights are random: `edgeforge synth` writes them, and they are removed after each preset. The
weight store is filled once for the first target; the others read it from the cache.
"""

import argparse
import os
import shutil
from pathlib import Path

from measured_process import edgeforge, folder_bytes, pin, run, say, work_folder
from pages import add_page_option, markdown, write_block

from edgeforge.synth.presets import PRESETS
from edgeforge.synth.synthesise import synthesise
from exporters.registry import TARGETS

RELEASED = (
    *("gemma-3-270m", "lfm2-350m", "qwen2.5-0.5b", "qwen3-0.6b", "gemma-3-1b", "lfm2-1.2b"),
    *("olmo2-1b", "qwen2.5-1.5b", "granite-3.3-2b", "smollm3-3b"),
)
ABOUT = (
    "Whole exports by `edgeforge export`, each in a process of its own; the first target's time "
    "holds the quantization, which the others find in the cache. Peak memory is that of resident "
    "pages, those of mapped files too."
)
TITLES = ["preset", "parameters", "target", "export, s", "peak memory, MB", "artifact, MB"]


def main() -> None:
    """Reads the arguments, exports, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--presets", nargs="*", default=RELEASED, choices=PRESETS)
    parser.add_argument("--recipe", default="int4")
    parser.add_argument("--context", type=int, default=2048, help="tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workdir", type=Path, help="where the folders are made and removed")
    add_page_option(parser)
    options = parser.parse_args()
    pin(options.threads)
    rows = [TITLES]
    with work_folder(options.workdir, "family-exports-") as root:
        os.environ["EDGEFORGE_CACHE"] = str(root / "cache")
        for preset in options.presets:
            say(preset)
            rows += measure(preset, root, options)
            shutil.rmtree(root / "cache", ignore_errors=True)
    print(*markdown(rows), sep="\n")
    if options.page:
        write_block(options.page, rows, ABOUT)


def measure(preset: str, root: Path, options: argparse.Namespace) -> list[list[str]]:
    """Returns a row for each target."""
    rows = []
    model, out = root / "model", root / "artifact"
    synthesise(preset, model, force=True)
    for target in TARGETS:
        command = [edgeforge(), "export", model, "--target", target, "--recipe", options.recipe]
        command += ["--context", str(options.context), "--threads", str(options.threads)]
        done = run([*command, "--out", out, "-q"])
        cells = [f"{done.wall:.0f}", f"{done.peak / 1e6:.0f}", f"{folder_bytes(out) / 1e6:.0f}"]
        rows.append([preset, f"{PRESETS[preset].parameters:,}", target, *cells])
        say(" | ".join(rows[-1]))
        shutil.rmtree(out)
    shutil.rmtree(model)
    return rows


if __name__ == "__main__":
    main()
