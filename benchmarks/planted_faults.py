"""Plants every fault that `tests/planted_faults` knows on every target, and asks `verify`.

The faults are in the demo model's artifacts; those of longrope's two sets are in a small random
model that has such sets. A second table counts false alarms: sound artifacts of the demo model and
of small random models of every family, each run with another text, other weights, another recipe.
"""

import argparse
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pages import add_page_option, markdown, write_block
from safetensors.numpy import load_file, save_file

from edgeforge.errors import EdgeForgeError
from edgeforge.export_options import ExportOptions
from edgeforge.model.model import DEMO, DEMO_FOLDER, HELDOUT, Model, open_model
from edgeforge.verification.meaning.check import check_meaning
from edgeforge.verification.references import reopen
from edgeforge.verification.soundness import CheckFailed
from edgeforge.verification.verify import verify_together
from edgeforge.verification.verify_options import VerifyOptions
from exporters.errors import ExportError
from exporters.manifest import Manifest
from exporters.registry import TARGETS

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.exporters.conftest import CASES, DISTINCT, phi3, write_checkpoint
from tests.planted_faults.captured import Captured, capture
from tests.planted_faults.table import FAULTS, other_weights
from tests.planted_faults.written import Fault, write_faulty

RECIPES = ("int4", "int8", "fp16", "int4-gptq", "w8a8")
LONGROPE = phi3(
    head_dim=32,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=512,
    original_max_position_embeddings=64,
    rope_scaling={
        "type": "longrope",
        "long_factor": [1 + 0.9 * i for i in range(16)],
        "short_factor": [1 + 0.1 * i for i in range(16)],
    },
)
# What refuses an artifact before or while it runs.
REFUSALS = (EdgeForgeError, ExportError, RuntimeError)


@dataclass(frozen=True)
class Outcome:
    """What `verify` said of an artifact.

    Attributes:
        failed: the names of the checks that failed; ``refused`` where verify ended before.
        message: the sentence of the first of them.
    """

    failed: tuple[str, ...]
    message: str


def main() -> None:
    """Plants faults and counts false alarms, as the arguments ask."""
    arguments = _parse()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        if arguments.runs:
            rows, about = _false_alarms(root, arguments)
        else:
            rows, about = _planted(root, arguments)
    print(about, *markdown(rows), sep="\n")
    if arguments.page:
        write_block(arguments.page, rows, about)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--faults", nargs="+", help="some faults' names; all by default")
    parser.add_argument("--recipe", default="int4")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--runs", type=int, default=0, help="count false alarms in so many runs")
    parser.add_argument("--seconds", type=float, help="begin no run after so many seconds")
    add_page_option(parser)
    return parser.parse_args()


def _planted(root: Path, arguments: argparse.Namespace) -> tuple[list[list[str]], str]:
    targets = [TARGETS[name] for name in arguments.targets]
    options = ExportOptions(recipe=arguments.recipe, context=arguments.context)
    demo = capture(open_model(DEMO), targets, options, root / "demo")
    changed = capture(open_model(str(_other_demo(root))), targets, options, root / "changed")
    longrope = capture(
        open_model(str(write_checkpoint(root / "longrope", LONGROPE))),
        targets,
        options,
        root / "longrope-out",
    )
    rows = [["fault", "target", "verify", "named by", "what it says", "figures that fail too"]]
    missed = 0
    for name in ["none", *(fault.name for fault in FAULTS), "weights"]:
        if arguments.faults and name not in arguments.faults:
            continue
        for target in arguments.targets:
            fault = _fault(name, changed[target])
            captured = longrope[target] if name == "rope-sets" else demo[target]
            outcome = _verified(captured, fault, root / name / target, arguments.tokens)
            rows.append(_row(fault, target, outcome))
            missed += fault is not None and not outcome.failed
            print(*rows[-1], sep=" | ", file=sys.stderr, flush=True)
    count = len(rows) - 1 - sum(row[0] == "none" for row in rows)
    about = (
        f"{count - missed} of {count} planted faults are caught: the demo model, "
        f"{arguments.recipe}, {arguments.context} tokens of context, {arguments.tokens} tokens of "
        f"text."
    )
    return rows, about


def _fault(name: str, changed: Captured) -> Fault | None:
    if name == "none":
        return None
    if name == "weights":
        return other_weights(changed)
    return next(fault for fault in FAULTS if fault.name == name)


def _other_demo(root: Path) -> Path:
    """A checkpoint with the demo model's shapes and other weights, as after some training."""
    folder = root / "other"
    folder.mkdir()
    for path in DEMO_FOLDER.iterdir():
        if path.suffix == ".json":
            (folder / path.name).write_bytes(path.read_bytes())
    draw = np.random.default_rng(0)
    tensors = load_file(DEMO_FOLDER / "model.safetensors")
    for name, values in tensors.items():
        noise = 1 + 0.05 * draw.standard_normal(values.shape).astype(np.float32)
        tensors[name] = (values.astype(np.float32) * noise).astype(values.dtype)
    save_file(tensors, folder / "model.safetensors")
    return folder


def _verified(captured: Captured, fault: Fault | None, folder: Path, tokens: int) -> Outcome:
    write_faulty(captured, fault, folder / "artifact", folder / "apart")
    return _outcome([folder / "artifact"], VerifyOptions(tokens=tokens, timed=False))


def _outcome(folders: Sequence[Path], options: VerifyOptions) -> Outcome:
    """What verify says of artifacts of one export, all together."""
    try:
        evaluations = verify_together(list(folders), options)
    except CheckFailed as error:
        return Outcome(("refused", *_facts(folders)), _sentence(error))
    except REFUSALS as error:
        return Outcome(("does not run",), _sentence(error))
    failed = [check for each in evaluations for check in each.checks if check.verdict == "failed"]
    return Outcome(
        tuple(dict.fromkeys(check.name for check in failed)), failed[0].message if failed else ""
    )


def _facts(folders: Sequence[Path]) -> list[str]:
    """The facts that are otherwise in artifacts of which verify gives no figures."""
    found: dict[str, None] = {}
    for folder in folders:
        manifest = Manifest.read(folder)
        for check in check_meaning(folder, manifest, reopen(manifest, None)):
            if check.verdict == "failed":
                found[check.name] = None
    return list(found)


def _sentence(error: Exception) -> str:
    return _shortened(str(error))


def _shortened(message: str) -> str:
    """A message's first sentence, without the folders of this run."""
    return re.sub(r"\S*/artifact: | \(/.*", "", message.partition("; ")[0])


def _row(fault: Fault | None, target: str, outcome: Outcome) -> list[str]:
    figures = [name for name in outcome.failed if _is_figure(name)]
    facts = [name for name in outcome.failed if name not in figures]
    return [
        "none" if fault is None else fault.about,
        target,
        "fails" if outcome.failed else "passes",
        ", ".join(facts),
        _shortened(outcome.message),
        ", ".join(figures),
    ]


def _is_figure(name: str) -> bool:
    kinds = ("lowering.", "total.", "shipped.", "perplexity", "greedy.", "float.", "non_finite")
    return name.startswith(kinds)


def _false_alarms(root: Path, arguments: argparse.Namespace) -> tuple[list[list[str]], str]:
    """Verifies sound artifacts, each run with other seeds and another text."""
    started, rows = time.monotonic(), [["artifacts of", "runs", "artifacts", "false alarms"]]
    counts: dict[str, list[int]] = {}
    runs = 0
    for seed in range(arguments.runs):
        if arguments.seconds and time.monotonic() - started > arguments.seconds:
            break
        label, outcomes = _sound_run(root / f"run-{seed}", seed, arguments)
        runs += 1
        count = counts.setdefault(label, [0, 0, 0])
        count[0] += 1
        count[1] += len(outcomes)
        for target, outcome in outcomes:
            if outcome.failed:
                count[2] += 1
                print(seed, label, target, outcome, file=sys.stderr, flush=True)
    rows += [[label, *map(str, count)] for label, count in counts.items()]
    alarms = sum(count[2] for count in counts.values())
    return rows, f"{alarms} false alarms in {runs} runs of sound artifacts."


def _sound_run(
    folder: Path, seed: int, arguments: argparse.Namespace
) -> tuple[str, list[tuple[str, Outcome]]]:
    """One run: a model, a recipe and a text that the seed decides."""
    folder.mkdir(parents=True)
    recipe = RECIPES[seed // 2 % len(RECIPES)]
    if seed % 2:
        case = DISTINCT[seed // 2 % len(DISTINCT)]
        label, source = f"random {case}", str(write_checkpoint(folder / "model", CASES[case], seed))
        context = 48
    else:
        label, source, context = "the demo model", DEMO, arguments.context
    model = open_model(source)
    options = ExportOptions(recipe=recipe, context=context)
    text = folder / "text.txt"
    text.write_text(_text(seed), encoding="utf-8")
    artifacts = {}
    for name, captured in _captured(model, arguments.targets, options, folder).items():
        artifacts[name] = folder / name / "artifact"
        write_faulty(captured, None, artifacts[name], folder / "apart")
    checks = VerifyOptions(text=text, tokens=arguments.tokens, timed=False)
    outcome = _outcome(list(artifacts.values()), checks)
    if not outcome.failed:
        return label, [(name, outcome) for name in artifacts]
    found = [(name, _outcome([artifact], checks)) for name, artifact in artifacts.items()]
    return label, found


def _captured(
    model: Model, targets: Sequence[str], options: ExportOptions, folder: Path
) -> dict[str, Captured]:
    """Exports to all targets at once, or to those that can hold the recipe."""
    try:
        return capture(model, [TARGETS[name] for name in targets], options, folder / "all")
    except (EdgeForgeError, ValueError):
        found: dict[str, Captured] = {}
        for name in targets:
            try:
                found |= capture(model, [TARGETS[name]], options, folder / name)
            except (EdgeForgeError, ValueError) as error:
                print(name, _sentence(error), file=sys.stderr)
        return found


def _text(seed: int) -> str:
    """Paragraphs of the held-out text in another order."""
    paragraphs = HELDOUT.read_text(encoding="utf-8").split("\n\n")
    draw = np.random.default_rng(seed)
    return "\n\n".join(paragraphs[i] for i in draw.permutation(len(paragraphs)))


if __name__ == "__main__":
    main()
