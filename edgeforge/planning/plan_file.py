"""Writes a plan as a recipe of rules that gives the same formats again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from edgeforge.errors import UsageError
from quant.formats.activations import NONE
from quant.plans.algorithms import IMPORTED
from quant.plans.plan import Assignment, QuantPlan


def write_plan(
    plan: QuantPlan, shapes: Mapping[str, tuple[int, ...]], notes: Sequence[str], file: Path
) -> None:
    """Writes a plan as a recipe of ordered rules that gives the same plan again.

    The last rule has the most frequent format and matches every weight that no earlier rule names.

    Args:
        plan: the plan of a model; imported weights need no rule.
        shapes: each weight's shape.
        notes: comments to put before the rules.
        file: the ``.yaml`` file to write.

    Raises:
        UsageError: the file cannot be written.
    """
    given = {
        name: assignment
        for name, assignment in plan.weights.items()
        if len(shapes[name]) > 1 and assignment.algorithm != IMPORTED
    }
    rules = {name: _rule(assignment) for name, assignment in given.items()}
    commonest = Counter(rules.values()).most_common(1)[0][0] if rules else "format: fp16"
    lines = [
        *(f"# {note}" for note in notes),
        *([f"rotation: {plan.rotation}", "rules:"] if plan.rotation else ()),
        *(f"- {{match: {n}, {rule}}}" for n, rule in rules.items() if rule != commonest),
        f"- {{match: '*', {commonest}}}",
    ]
    try:
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--save-plan {file} cannot be written: {error.strerror}") from error


def check_plan_file(file: Path | None) -> None:
    """Refuses, before any work, a file that could not be read back as a recipe.

    Raises:
        UsageError: the file's name does not end in ``.yaml`` or ``.yml``.
    """
    if file is not None and file.suffix not in (".yaml", ".yml"):
        raise UsageError(f"--save-plan {file} is not possible: a recipe's file ends in .yaml")


def _rule(assignment: Assignment) -> str:
    from quant.plans.algorithms import algorithms_for

    usual = assignment.algorithm == algorithms_for(assignment.format)[0]
    algorithm = "" if usual else f", algorithm: {assignment.algorithm}"
    activation = assignment.activation
    rounded = "" if activation == NONE else f", activation: {activation}"
    return f"format: {assignment.format.name}{algorithm}{rounded}"
