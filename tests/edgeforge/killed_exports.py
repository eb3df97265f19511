"""Kills exports at many moments and looks at what is left: nothing may be lost, ever.

    python tests/edgeforge/killed_exports.py --kills 20 --seed 0 --targets onnx,coreml

Half of the moments are drawn from the files' operations of an export that nobody disturbs (just
before one of them, the process kills itself), half from its duration. After each kill

- every file of the user's is as it was;
- the place of the output is empty if it was, or else holds the old artifact or the new one, whole;
- the next export into that place works, sweeps what was left, and gives the bytes of an export that
  nobody disturbed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgeforge.calibration.text import CalibrationOptions
from edgeforge.export_options import ExportOptions
from edgeforge.model import trace as trace_module
from edgeforge.model.model import open_model
from edgeforge.output_folder import swap
from edgeforge.pipeline import export
from edgeforge.synth.synthesise import synthesise
from exporters.manifest import Manifest, check_files
from exporters.registry import find_target

# Audit events of operations on files whose first argument is a path.
_OPERATIONS = ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate")
CONTEXT = 48
# Recipe, whether an artifact is replaced, and whether the system exchanges folders in one step.
KINDS = tuple(
    (recipe, *place)
    for recipe in ("int4-g32", "int4-gptq")
    for place in ((False, True), (True, True), (True, False))
)
_EARLIER = "int4-pc"


@dataclass
class Kill:
    """One kill: before the operation ``number``, or after ``seconds``."""

    number: int | None = None
    seconds: float | None = None

    def __str__(self) -> str:
        return f"operation {self.number}" if self.seconds is None else f"{self.seconds:.2f} s"


@dataclass
class Case:
    """What is exported where.

    Attributes:
        root: a folder of this run's own.
        targets: the targets' names.
        recipe: the recipe.
        force: whether an artifact is there already, to be replaced.
        exchange: whether the system may exchange two folders in one step.
    """

    root: Path
    targets: list[str]
    recipe: str
    force: bool
    exchange: bool

    def run(self) -> None:
        """The export, in this process."""
        os.environ["EDGEFORGE_CACHE"] = str(self.root / "cache")
        if not self.exchange:
            swap.exchange = lambda one, other: False
        options = ExportOptions(
            self.recipe,
            context=CONTEXT,
            force=self.force,
            calibration=CalibrationOptions(tokens=192, length=48),
        )
        model = open_model(str(self.root / "user" / "model"))
        export(model, [find_target(name) for name in self.targets], self.root / "out", options)


def in_child(work: Callable[[], None], kill: Kill | None = None, root: Path | None = None) -> int:
    """Runs work in a fork of this process; returns its exit status, or minus a signal's number."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if kill is not None and kill.number is not None:
                _kill_at(kill.number, str(root))
            work()
            code = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(code)
    if kill is not None and kill.seconds is not None:
        time.sleep(kill.seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _kill_at(number: int, root: str) -> None:
    seen = 0

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        if event in _OPERATIONS and str(arguments[0]).startswith(root):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def operations_of(case: Case) -> tuple[int, float]:
    """Runs an export that nobody disturbs; returns its operations on files and its seconds."""
    log, begun = case.root / "log", time.monotonic()

    def work() -> None:
        found = 0

        def watch(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal found
            found += event in _OPERATIONS and str(arguments[0]).startswith(str(case.root))

        sys.addaudithook(watch)
        case.run()
        count = found
        log.write_text(str(count))

    if in_child(work):
        raise SystemExit("an export that nobody disturbs failed")
    seconds = time.monotonic() - begun
    count = int(log.read_text())
    log.unlink()
    return count, seconds


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file, by path; of an artifact's report nothing, for there is none."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def require(truth: bool, words: str) -> None:
    """Ends the run with what is wrong."""
    if not truth:
        raise SystemExit(f"killed_exports: {words}")


def check_place(case: Case, old: dict[str, str], new: dict[str, str], when: str) -> str:
    """Checks the output's place after a kill; returns what is there."""
    out = case.root / "out"
    if not out.exists():
        moved = list(case.root.glob(".out.old-*"))
        require(not case.force or (not case.exchange and bool(moved)), f"{when}: nothing is there")
        return "nothing" if not case.force else "old, to be put back"
    for manifest in sorted(out.rglob("edgeforge.json")):
        problems = check_files(manifest.parent, Manifest.read(manifest.parent))
        require(not problems, f"{when}: {problems}")
    found = digests(out)
    require(found in (old, new), f"{when}: the place holds neither the old nor the new artifact")
    return "new" if found == new else "old"


def run_kills(
    kills: int,
    seed: int,
    targets: list[str],
    recipes: list[str],
    by_clock: bool,
    say: Callable[[str], None],
) -> None:
    """Kills exports at ``kills`` moments and checks each; ends the run at the first fault.

    Args:
        kills: how many.
        seed: of the moments.
        targets: the targets' names.
        recipes: the recipes' names.
        by_clock: whether every second moment is a time, at which an export may have ended already,
            and not an operation on files.
        say: called with a line for each kill.
    """
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="killed-exports-") as name:
        base = Path(name).resolve()
        model = base / "user" / "model"
        synthesise("tiny-llama", model)
        trace_once(model)
        (base / "user" / "thesis.txt").write_text("years of work")
        (base / ".out.partial-1").mkdir()  # a name like a left-over's, but a user's file in it
        (base / ".out.partial-1" / "thesis.txt").write_text("years of work")
        kinds = [kind for kind in KINDS if kind[0] in recipes]
        draw.shuffle(kinds)
        known: dict[tuple[str, bool, bool], tuple[int, float, dict[str, str], dict[str, str]]] = {}
        for turn in range(kills):
            recipe, force, exchange = kind = kinds[turn % min(len(kinds), max(1, kills // 3))]
            case = Case(base, targets, recipe, force, exchange)
            earlier = Case(base, targets, _EARLIER, False, True)
            if kind not in known:
                old = prepare(case, earlier)
                count, seconds = operations_of(case)
                known[kind] = count, seconds, old, digests(base / "out")
            count, seconds, old, new = known[kind]
            prepare(case, earlier)
            user = digests(base / "user")
            if by_clock and turn % 2:
                kill = Kill(seconds=draw.uniform(0, 0.9 * seconds))
            else:
                # The last operations, of the swap, are the most delicate.
                early = draw.random() < 0.5
                kill = Kill(number=draw.randint(1 if early else max(1, count - 40), count))
            status = in_child(case.run, kill, base)
            place = check_place(case, old, new, f"{kind}, {kill}")
            require(digests(base / "user") == user, f"{kind}, {kill}: a user's file was changed")
            left = len(left_overs(base))
            again = Case(base, targets, recipe, True, exchange)
            require(in_child(again.run) == 0, f"{kind}, {kill}: the next export failed")
            require(digests(base / "out") == new, f"{kind}, {kill}: the next export differs")
            require(not left_overs(base), f"{kind}, {kill}: left are {left_overs(base)}")
            require(digests(base / "user") == user, f"{kind}, {kill}: a user's file was changed")
            require((base / ".out.partial-1" / "thesis.txt").is_file(), "a user's file is gone")
            ended = "killed" if status == -signal.SIGKILL else f"ended with {status} before it"
            say(
                f"{turn + 1:3} {recipe}{', over an old one' if force else ''}"
                f"{'' if exchange else ', two renames'}: {ended} at {kill}; there is {place}; "
                f"{left} left over, then swept"
            )


def prepare(case: Case, earlier: Case) -> dict[str, str]:
    """Empties the place and the cache, and puts an earlier artifact there if one is replaced."""
    for name in ("out", "cache"):
        shutil.rmtree(case.root / name, ignore_errors=True)
    if not case.force:
        return {}
    kept = case.root / f"earlier-{earlier.recipe}"
    if not kept.is_dir():
        require(in_child(earlier.run) == 0, "an export that nobody disturbs failed")
        shutil.copytree(case.root / "out", kept / "out")
        shutil.move(case.root / "cache", kept / "cache")
        shutil.rmtree(case.root / "out")
    shutil.copytree(kept, case.root, dirs_exist_ok=True)
    return digests(case.root / "out")


def trace_once(model: Path) -> None:
    """Traces the model before any fork: that takes most of an export's time and writes nothing."""
    trace = trace_module.trace
    traced = trace(open_model(str(model)).spec, CONTEXT)
    trace_module.trace = lambda spec, context: traced


def left_overs(base: Path) -> list[str]:
    """What killed exports left beside the output and in the cache."""
    beside = [path for path in base.glob(".out.*") if path.name != ".out.partial-1"]
    stores = [*(base / "cache" / "stores").glob(".*"), *(base / "cache").rglob("*.partial*")]
    return sorted({str(path.relative_to(base)) for path in (*beside, *stores)})


def main() -> None:
    """Reads the options and prints a line for each kill."""
    parser = argparse.ArgumentParser(description="Kill exports and look at what is left.")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", default="onnx")
    parser.add_argument("--recipes", default="int4-g32,int4-gptq")
    parser.add_argument(
        "--operations-only", action="store_true", help="no moment of the clock, all of the work"
    )
    asked = parser.parse_args()
    targets, recipes = asked.targets.split(","), asked.recipes.split(",")
    by_clock = not asked.operations_only
    run_kills(
        asked.kills, asked.seed, targets, recipes, by_clock, lambda line: print(line, flush=True)
    )
    print(f"{asked.kills} kills: nothing was lost, every next export gave the same bytes")


if __name__ == "__main__":
    main()
