"""The mixed recipes: choose a format for each weight so that divergence is least under a budget.

A weight may get the formats that every chosen target can store. The cost of each is measured
(`edgeforge.planning.sensitivity`), and the choice is exact for those costs
(`quant.plans.knapsack`).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from edgeforge.cache import writable_cache
from edgeforge.families.assembly import HEAD
from edgeforge.planning.budget import MIXED, Budget
from edgeforge.planning.candidates import LAST_RESORTS
from edgeforge.stage_progress import Progress
from quant.errors import QuantizationError
from quant.plans.plan import Assignment, QuantPlan, matrix_shape

if TYPE_CHECKING:
    from edgeforge.calibration.text import Calibration, CalibrationOptions
    from edgeforge.families.spec import WeightSpec
    from edgeforge.model.model import Model
    from edgeforge.planning.sensitivity import Sensitivity
    from quant.plans.knapsack import Choice, Solution
    from quant.program.program import Program


# Tokens of the calibration text on which costs are measured, those on which the costs of a large
# model are estimated, and the tokens of a block.
MEASURED_TOKENS, ESTIMATED_TOKENS, BLOCK_TOKENS = 2048, 512, 256
# How many times a limit on divergence is tightened when the plan's divergence is over it although
# its costs add up to less: the errors of single weights are not independent.
_ROUNDS: Final = 6


@dataclass(frozen=True)
class Mixed:
    """A plan under a budget, and how it came about.

    Attributes:
        plan: the format and algorithm of each weight.
        expected_kl: sum of the chosen formats' costs, nats per token.
        found_kl: KL divergence of the whole plan on the same text, with integers rounded to
            nearest, nats per token.
        notes: notes for the manifest, one sentence each.
    """

    plan: QuantPlan
    expected_kl: float
    found_kl: float
    notes: tuple[str, ...]


def text_for(model: Model, options: CalibrationOptions, context: int) -> Calibration:
    """Returns the part of the calibration text on which costs are measured.

    A model without a tokenizer is measured on random tokens; the plan's notes say so.

    Args:
        model: the opened model.
        options: the calibration text, and how much of it to use at most.
        context: declared context in tokens.

    Raises:
        UsageError: as `edgeforge.calibration.text.draw_calibration`.
    """
    from edgeforge.calibration.text import Calibration, draw_calibration
    from edgeforge.planning.sensitivity import MEASURED_PARAMETERS

    small = model.spec.num_parameters <= MEASURED_PARAMETERS
    length = min(options.length, BLOCK_TOKENS, context)
    most = MEASURED_TOKENS if small else ESTIMATED_TOKENS
    tokens = min(options.tokens or most, most)
    if model.checkpoint.tokenizer_files.get("tokenizer.json") is not None or options.source:
        return draw_calibration(model, replace(options, tokens=tokens, length=length), context)
    draw = random.Random(options.seed)
    vocabulary, count = model.spec.vocab_size, max(1, tokens // length)
    blocks = tuple(tuple(draw.randrange(vocabulary) for _ in range(length)) for _ in range(count))
    label = "seeded random tokens, for there is no tokenizer"
    warning = (
        "the formats were chosen by their errors on random tokens, because there is no "
        "tokenizer.json: give one with --tokenizer PATH"
    )
    return Calibration(label, count * length, length, options.seed, "", blocks, notes=(warning,))


def mix(
    model: Model,
    recipe: str,
    budget: Budget,
    candidates: Mapping[str, Sequence[Assignment]],
    fixed: Mapping[str, Assignment],
    calibration: Calibration,
    program: Program,
    progress: Progress,
) -> Mixed:
    """Measures the candidates and chooses a format for each matrix.

    Args:
        model: the opened model.
        recipe: a key of `MIXED`.
        budget: the budget, already checked.
        candidates: the assignments from which each matrix gets one (`allowed_formats`).
        fixed: assignments of all other weights.
        calibration: the text on which costs are measured.
        program: a program in the float dialect.
        progress: called as each stage advances.

    Raises:
        QuantizationError: the budget cannot be met; the message says what the least is.
    """
    from edgeforge.planning.sensitivity import plan_divergence, sensitivity

    shapes, weights = model.weights.shapes(), model.weights
    blocks = calibration.blocks
    assert blocks is not None
    taken = sum(a.format.nbytes(*matrix_shape(shapes[n])) for n, a in fixed.items())
    parameters = model.spec.num_parameters
    candidates = _offered(candidates, budget, shapes, taken, parameters)
    found = sensitivity(
        weights,
        program,
        candidates,
        blocks,
        model.checkpoint.digest().sha256,
        writable_cache() / "sensitivities",
        lambda done, size: progress("measure formats", done, size),
    )
    choices = _choices(candidates, found.costs, shapes)

    by_name = {n: {a.format.name: a for a in given} for n, given in candidates.items()}

    def chosen(solution: Solution) -> dict[str, Assignment]:
        return {name: by_name[name][choice.name] for name, choice in solution.chosen.items()}

    def divergence(solution: Solution) -> float:
        return plan_divergence(weights, program, chosen(solution), blocks)

    solution = _solve(choices, budget, taken, parameters)
    actual = divergence(solution)
    limit = budget.max_kl or 0.0
    for _ in range(_ROUNDS):
        if budget.max_kl is None or actual <= budget.max_kl:
            break
        limit *= 0.99 * budget.max_kl / actual
        solution = _solve(choices, replace(budget, max_kl=limit), taken, parameters)
        actual = divergence(solution)
    if budget.max_kl is not None and actual > budget.max_kl:
        raise QuantizationError(
            f"--max-kl {budget.max_kl:g} cannot be met: formats whose costs add up to at most "
            f"{limit:.3g} give {actual:.3g} together on the calibration text; give a larger limit"
        )
    plan = _plan(recipe, {**chosen(solution), **fixed}, fixed, model.spec.weights)
    return Mixed(plan, solution.cost, actual, _notes(budget, solution, found, actual, calibration))


def _offered(
    candidates: Mapping[str, Sequence[Assignment]],
    budget: Budget,
    shapes: Mapping[str, tuple[int, ...]],
    taken: int,
    parameters: int,
) -> Mapping[str, Sequence[Assignment]]:
    """Returns the candidates without `LAST_RESORTS` if a plan without them fits, else all.

    This needs only the sizes of formats, so it is decided before costs are measured.

    Raises:
        QuantizationError: the budget cannot be met even with the last resorts.
    """
    usual = {
        name: [a for a in given if a.format.name not in LAST_RESORTS] or list(given)
        for name, given in candidates.items()
    }
    if budget.max_kl is not None:
        return usual

    def require_possible(offered: Mapping[str, Sequence[Assignment]]) -> None:
        free = {n: dict.fromkeys((a.format.name for a in c), 0.0) for n, c in offered.items()}
        _solve(_choices(offered, free, shapes), budget, taken, parameters)

    with suppress(QuantizationError):
        require_possible(usual)
        return usual
    require_possible(candidates)
    return candidates


def _choices(
    candidates: Mapping[str, Sequence[Assignment]],
    costs: Mapping[str, Mapping[str, float]],
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, list[Choice]]:
    from quant.plans.knapsack import Choice

    return {
        name: [
            Choice(
                a.format.name,
                a.format.nbytes(*matrix_shape(shapes[name])),
                costs[name][a.format.name],
            )
            for a in given
        ]
        for name, given in candidates.items()
    }


def _solve(
    choices: Mapping[str, Sequence[Choice]], budget: Budget, taken: int, parameters: int
) -> Solution:
    """Returns the best choice within the budget.

    Raises:
        QuantizationError: there is none; the message says what the least is.
    """
    from quant.plans.knapsack import BudgetError, least_bytes, least_cost

    try:
        if budget.max_kl is not None:
            return least_bytes(choices, budget.max_kl)
        if budget.bits_per_weight is not None:
            return least_cost(choices, budget.bits_per_weight * parameters / 8 - taken)
        assert budget.max_size is not None
        return least_cost(choices, budget.max_size - taken)
    except BudgetError as error:
        least = float(error.args[1])
        option, value = next(iter(budget.given().items()))
        if budget.max_kl is not None:
            words = f"{least:.3g} nats per token is the least that the targets' formats give"
        elif budget.bits_per_weight is not None:
            bits = 8 * (least + taken) / parameters
            words = f"the smallest possible is {bits:.4f} bits a weight"
        else:
            words = f"the smallest possible is {int(least) + taken:,} bytes of weights"
        raise QuantizationError(f"{option} {value:g} cannot be met: {words}") from error


def _plan(
    recipe: str,
    assignments: Mapping[str, Assignment],
    fixed: Mapping[str, Assignment],
    specs: Mapping[str, WeightSpec],
) -> QuantPlan:
    """Returns the plan in the program's order, with the recipe's algorithm where it applies."""
    from quant.plans.algorithms import SIGNED, SIGNED_BY_POSITIVE, algorithms_for

    algorithm, tied, plan = MIXED[recipe], HEAD not in specs, {}
    for name, spec in specs.items():
        given = assignments[name]
        # An embedding that is not the head too has no inputs to calibrate on.
        free = name not in fixed and algorithm in algorithms_for(given.format)
        if algorithm is not None and free and (tied or spec.role != "embedding"):
            signed = given.algorithm == SIGNED
            given = replace(given, algorithm=SIGNED_BY_POSITIVE[algorithm] if signed else algorithm)
        plan[name] = given
    return QuantPlan(recipe, plan)


def _notes(
    budget: Budget,
    solution: Solution,
    found: Sensitivity,
    actual: float,
    calibration: Calibration,
) -> tuple[str, ...]:
    option, value = next(iter(budget.given().items()))
    best = solution.nbytes if budget.max_kl is not None else solution.cost
    gap = (best - solution.bound) / best if best else 0.0
    exact = "no choice of formats is better" if gap < 1e-9 else f"within {gap:.2g} of the best"
    return (
        f"formats were chosen under {option} {value:g}: {exact}, by costs that were {found.method} "
        f"on {found.tokens} tokens of {calibration.source}",
        f"the costs of the chosen formats add up to a KL divergence of {solution.cost:.4g} nats "
        f"per token; the whole plan, rounded to nearest, gives {actual:.4g} on that text",
    )
