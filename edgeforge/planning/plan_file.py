"""Writes a plan as a recipe of rules that gives the same formats again."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from edgeforge.errors import UsageError
from edgeforge.output_folder.inputs import Input, refuse_inputs
from edgeforge.output_folder.whole_file import whole_file
from quant.errors import QuantizationError
from quant.formats.activations import NONE
from quant.input_files import open_input
from quant.plans.algorithms import IMPORTED
from quant.plans.plan import Assignment, QuantPlan


def write_plan(
    plan: QuantPlan,
    shapes: Mapping[str, tuple[int, ...]],
    notes: Sequence[str],
    file: Path,
    *,
    replace: bool = False,
) -> None:
    """Writes a plan as a recipe of ordered rules that gives the same plan again.

    The last rule has the most frequent format and matches every weight that no earlier rule names.

    Args:
        plan: the plan of a model; imported weights need no rule.
        shapes: each weight's shape.
        notes: comments to put before the rules.
        file: the ``.yaml`` file to write.
        replace: whether to replace a file with another recipe.

    Raises:
        UsageError: the file cannot be written, or holds something else.
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
    content = ("\n".join(lines) + "\n").encode()
    try:
        if os.path.lexists(file):
            with open_input(file) as found:
                if found.read(len(content) + 1) == content:
                    return
            if not replace:
                raise UsageError(
                    f"--save-plan {file} exists and holds another plan: name another file, or pass "
                    f"--force to replace it"
                )
        with whole_file(file) as stream:
            stream.write(content)
    except OSError as error:
        raise UsageError(f"--save-plan {file} cannot be written: {error.strerror}") from error


def check_plan_file(
    file: Path | None, inputs: Sequence[Input] = (), out: Path | None = None
) -> None:
    """Refuses, before any work, a file that could not be read back as a recipe or is a user's.

    Args:
        file: the file to write, if any.
        inputs: what the file may neither be nor lie in.
        out: the output folder, which is put in place as a whole later.

    Raises:
        UsageError: the file's name does not end in ``.yaml`` or ``.yml``, or it is an input, or
            what lies there is no recipe.
    """
    from quant.plans.recipes import find_recipe

    if file is None:
        return
    if file.suffix not in (".yaml", ".yml"):
        raise UsageError(f"--save-plan {file} is not possible: a recipe's file ends in .yaml")
    whole = () if out is None else (Input("the output folder", out, whole=True),)
    refuse_inputs(file, (*inputs, *whole), "--save-plan")
    if not os.path.lexists(file):
        return
    try:
        find_recipe(str(file))
    except QuantizationError as error:
        raise UsageError(
            f"--save-plan {file} exists and is not a recipe, so it is not replaced: name another "
            f"file"
        ) from error


def _rule(assignment: Assignment) -> str:
    from quant.plans.algorithms import algorithms_for

    usual = assignment.algorithm == algorithms_for(assignment.format)[0]
    algorithm = "" if usual else f", algorithm: {assignment.algorithm}"
    activation = assignment.activation
    rounded = "" if activation == NONE else f", activation: {activation}"
    return f"format: {assignment.format.name}{algorithm}{rounded}"
