"""Exports a tiny model of each family by several recipes to every target, and measures lowering.

The models are `edgeforge synth`'s tiny presets, whose weights are random: the figures say whether
an artifact computes what its quantized weights stand for, and nothing of a model's quality.
"""

import argparse
import shutil
import sys
from pathlib import Path

import torch
from measured_process import work_folder
from pages import add_page_option, markdown, write_block

from edgeforge.errors import EdgeForgeError
from edgeforge.export_options import ExportOptions
from edgeforge.families.registry import FAMILIES
from edgeforge.model.model import Model, open_model
from edgeforge.pipeline import export
from edgeforge.synth.synthesise import PRESETS, synthesise
from edgeforge.verification.evaluation import Evaluation
from edgeforge.verification.verify import verify_together
from edgeforge.verification.verify_options import VerifyOptions
from exporters.errors import ExportError
from exporters.registry import TARGETS, find_target
from quant.errors import QuantizationError

RECIPES = ("fp16", "int8", "int4")
CONTEXT = 96
ABOUT = (
    "Nats a token by which the artifact differs from what its quantized weights stand for, on a "
    "tiny model of each family with random weights."
)
TINY = [name for name in PRESETS if name.startswith("tiny-")]
PRESET_OF = {PRESETS[name].model_type: name for name in reversed(TINY)}


def main() -> None:
    """Reads the arguments, exports and measures, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", nargs="*", default=sorted(FAMILIES), help="which of them")
    parser.add_argument("--recipes", nargs="*", default=RECIPES)
    parser.add_argument("--tokens", type=int, default=512, help="of the held-out text")
    parser.add_argument("--workdir", type=Path, help="keep the folders here (default: a scratch)")
    add_page_option(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with work_folder(options.workdir, "families-") as root:
        for family in options.families:
            model = open_model(str(synthesise(PRESET_OF[family], root / "model", force=True)))
            found = {each: measure(model, each, root, options.tokens) for each in options.recipes}
            rows.append([f"`{family}`", *(found[each][at] for at in TARGETS for each in found)])
            print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    titles = [f"{target}, {recipe}" for target in TARGETS for recipe in options.recipes]
    rows.insert(0, ["family", *titles])
    print(*markdown(rows), sep="\n")
    if options.page:
        write_block(options.page, rows, ABOUT)


def measure(model: Model, recipe: str, root: Path, tokens: int) -> dict[str, str]:
    """Returns a cell for each target: the mean divergence of the artifact from QUANTIZED."""
    cells, folders = {}, {}
    for target in TARGETS:
        folders[target] = root / recipe / target
        shutil.rmtree(folders[target], ignore_errors=True)
        given = ExportOptions(recipe=recipe, context=CONTEXT, threads=1)
        try:
            export(model, [find_target(target)], folders[target], given)
        except (EdgeForgeError, ExportError, QuantizationError) as error:
            cells[target] = "refused"
            print(f"{model.spec.model_type}, {target}, {recipe}: {error}", file=sys.stderr)
            del folders[target]
    asked = VerifyOptions(tokens=tokens, timed=False, threads=1)
    try:
        evaluations = verify_together(list(folders.values()), asked)
    except (EdgeForgeError, ExportError) as error:
        print(f"{model.spec.model_type}, {recipe}: {error}", file=sys.stderr)
        return cells | dict.fromkeys(folders, "error")
    return cells | dict(zip(folders, map(cell, evaluations), strict=True))


def cell(evaluation: Evaluation) -> str:
    """Returns the divergence in nats a token, and whether a check failed."""
    failed = [check for check in evaluation.checks if check.verdict == "failed"]
    for check in failed:
        print(f"{evaluation.target}, {evaluation.recipe}: {check.message}", file=sys.stderr)
    shown = f"{max(evaluation.lowering.kl_mean, 0.0):.1e}"
    return f"{shown} (failed)" if failed else shown


if __name__ == "__main__":
    main()
