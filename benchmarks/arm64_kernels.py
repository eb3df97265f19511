"""Measures what arm64 kernels do to an artifact: their lowering error, and how much they execute.

The first table holds the logits of artifacts on this machine and on emulated cores against
QUANTIZED, over the same held-out tokens, with and without KleidiAI. The second counts instructions
of three recipes on two cores, as ratios to the first recipe; a count is no latency. The emulator is
set up with `edgeforge devices setup arm64 --executorch`.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from pages import add_page_option, write_block
from tables import print_rows
from torch import Tensor

from device_harness.device_session import open_on
from device_harness.devices.arm64.instructions import count_instructions
from device_harness.devices.registry import open_device
from device_harness.registry import open_session
from edgeforge.export_options import ExportOptions
from edgeforge.model.model import HELDOUT, Model, open_model
from edgeforge.pipeline import export
from edgeforge.tokenizer import TOKENIZER, Tokenizer, read_text
from edgeforge.verification.metrics import DivergenceMeter
from edgeforge.verification.references import references
from edgeforge.verification.sample import spread_blocks
from exporters.manifest import Manifest
from exporters.registry import find_target

CORES = ("cortex-a55", "cortex-a76", "cortex-a710", "max")
COUNTED = ("cortex-a76", "cortex-a710")
RECIPES = ("int4-g32", "int4-g128", "int8")
BLOCK = 250


def main() -> None:
    """Reads the arguments, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--table", choices=("error", "instructions"), default="error")
    parser.add_argument("--recipe", default="int4-gptq", help="of the first table")
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--targets", default="onnx,executorch")
    parser.add_argument("--cores", default="")
    add_page_option(parser)
    options = parser.parse_args()
    model, targets = open_model(options.model), options.targets.split(",")
    with tempfile.TemporaryDirectory() as root:
        if options.table == "error":
            cores = (options.cores or ",".join(CORES)).split(",")
            rows, about = errors(model, options, targets, cores, Path(root))
        else:
            cores = (options.cores or ",".join(COUNTED)).split(",")
            rows, about = ratios(model, targets, cores, Path(root))
    print(about)
    print_rows(rows)
    if options.page:
        write_block(options.page, rows, about)


def errors(
    model: Model, options: argparse.Namespace, targets: list[str], cores: list[str], root: Path
) -> tuple[list[list[str]], str]:
    """Returns the first table, and a sentence about it."""
    rows = [["target", "where", "KleidiAI", "KL mean", "KL p99", "top-1 %", "logits of the host"]]
    for target in targets:
        folder = root / target
        export(model, [find_target(target)], folder, ExportOptions(options.recipe, context=1024))
        manifest = Manifest.read(folder)
        blocks = list(held_out(model, options.tokens))
        # Targets can choose other formats for the same recipe, and so have references of their own.
        made = references(manifest, model, lambda *told: None)
        quantized = [logits.float() for logits in made.quantized.logits(blocks)]
        host: list[Tensor] = []
        for core in ("", *cores):
            for kleidiai in ("on", "off") if core and target == "onnx" else (None,):
                begun = time.perf_counter()
                found = logits_of(folder, manifest, core, kleidiai, blocks)
                host = host or found
                meter = DivergenceMeter()
                for one, other in zip(quantized, found, strict=True):
                    meter.add(one, other)
                result = meter.result()
                far = max(float((a - b).abs().max()) for a, b in zip(host, found, strict=True))
                rows.append(
                    [
                        target,
                        core or "this machine (x86-64)",
                        kleidiai or "-",
                        f"{result.kl_mean:.2e}",
                        f"{result.kl_p99:.1e}",
                        f"{100 * result.top1_agreement:.2f}",
                        f"within {far:.2g}" if core else "",
                    ]
                )
                print(*rows[-1], f"{time.perf_counter() - begun:.0f} s", flush=True)
    return rows, (
        f"{options.model}, {options.recipe}, {sum(map(len, blocks))} held-out tokens, against "
        f'QUANTIZED; "within" is the largest difference from the logits on this machine.'
    )


def logits_of(
    folder: Path, manifest: Manifest, core: str, kleidiai: str | None, blocks: list[Tensor]
) -> list[Tensor]:
    """Logits of each block, ``float32[t, vocab]``; on this machine where no core is named."""
    if not core:
        with open_session(folder, manifest, 1) as session:
            return [torch.from_numpy(session.logits(block.numpy()).copy()) for block in blocks]
    with (
        open_device(f"arm64:{core}") as device,
        open_on(device, folder, manifest, 1, {"kleidiai": kleidiai}) as there,
    ):
        return [torch.from_numpy(there.logits(block.numpy()).copy()) for block in blocks]


def held_out(model: Model, tokens: int) -> Iterator[Tensor]:
    """Blocks of the held-out text, spread over all of it."""
    files = model.checkpoint.tokenizer_files
    tokenizer = Tokenizer(files.get(TOKENIZER), model.checkpoint.source)
    text, head = tokenizer.encode(read_text(HELDOUT), special=False), tokenizer.added()[0]
    for block in spread_blocks(text, BLOCK, head, tokens):
        yield torch.tensor(block, dtype=torch.int64)


def ratios(
    model: Model, targets: list[str], cores: list[str], root: Path
) -> tuple[list[list[str]], str]:
    """Returns the second table, and a sentence about it."""
    rows = [["target", "core", "recipe", "prefill M", "ratio", "a token M", "ratio", "dot", "i8mm"]]
    for target in targets:
        folders = {recipe: root / target / recipe for recipe in RECIPES}
        for recipe, folder in folders.items():
            export(model, [find_target(target)], folder, ExportOptions(recipe, context=256))
        for core in cores:
            first = None
            for recipe, folder in folders.items():
                found = count_instructions(folder, 16, 24, core)
                first = first or found
                parts = (found.prefill, found.decode)
                prefill = found.prefill["all"] / first.prefill["all"]
                decode = found.decode["all"] / first.decode["all"]
                shares = [
                    "/".join(f"{100 * part[kind] / part['all']:.0f}" for part in parts) + " %"
                    for kind in ("dot", "i8mm")
                ]
                rows.append(
                    [
                        target,
                        core,
                        recipe,
                        f"{found.prefill['all'] / 1e6:.2f}",
                        f"{prefill:.3f}",
                        f"{found.decode['all'] / 1e6:.2f}",
                        f"{decode:.3f}",
                        *shares,
                    ]
                )
                print(*rows[-1], flush=True)
    return rows, (
        "The demo model, 16 tokens in one call, then 23 one by one, one thread. Ratios are to the "
        "first recipe; shares of dot-product and int8-matrix instructions are of prefill and of a "
        "token. A count is a cost to compare by, and no latency."
    )


if __name__ == "__main__":
    main()
