"""The solver of mixed formats, against every combination and against HiGHS."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from quant.plans.knapsack import BudgetError, Choice, least_bytes, least_cost

WEIGHTS = st.lists(
    st.lists(
        st.tuples(st.integers(1, 60), st.integers(0, 400)),
        min_size=1,
        max_size=4,
    ),
    min_size=1,
    max_size=6,
)


def problem(rows):
    return {
        f"w{i}": [Choice(f"f{j}", size, cost / 64) for j, (size, cost) in enumerate(row)]
        for i, row in enumerate(rows)
    }


def combinations(choices):
    for chosen in itertools.product(*choices.values()):
        yield sum(c.nbytes for c in chosen), sum(c.cost for c in chosen)


@settings(max_examples=150, deadline=None)
@given(WEIGHTS, st.floats(0, 1))
def test_no_combination_within_the_size_costs_less(rows, share):
    choices = problem(rows)
    every = list(combinations(choices))
    sizes = sorted(size for size, _ in every)
    limit = sizes[0] + share * (sizes[-1] - sizes[0])
    found = least_cost(choices, limit)
    assert found.nbytes <= limit
    assert found.cost == min(cost for size, cost in every if size <= limit)
    assert found.bound == pytest.approx(found.cost)
    assert found.nbytes == sum(choice.nbytes for choice in found.chosen.values())
    assert all(found.chosen[name] in given_ for name, given_ in choices.items())


@settings(max_examples=150, deadline=None)
@given(WEIGHTS, st.floats(0, 1))
def test_no_combination_within_the_cost_is_smaller(rows, share):
    choices = problem(rows)
    every = list(combinations(choices))
    costs = sorted(cost for _, cost in every)
    limit = costs[0] + share * (costs[-1] - costs[0])
    found = least_bytes(choices, limit)
    assert found.cost <= limit
    assert found.nbytes == min(size for size, cost in every if cost <= limit)


def model_of(layers, seed):
    """Sizes as a model has them, and costs that grow with the error and differ by layer."""
    draw = np.random.default_rng(seed)
    choices = {}
    for index in range(layers):
        for name, size in (("qkv", 3), ("o", 2), ("gate_up", 16), ("down", 8)):
            scale = size * draw.lognormal(0, 1)
            choices[f"{index}.{name}"] = [
                Choice(str(bits), int(size * (1 << 18) * bits / 8), float(scale * error * factor))
                for bits, error in ((4.02, 2.1), (4.125, 1.6), (4.25, 1.3), (4.5, 1), (8.03, 0.01))
                for factor in [draw.uniform(0.9, 1.1)]
            ]
    return choices


def test_a_large_problem_is_solved_as_well_as_by_an_integer_program():
    choices = model_of(12, seed=3)
    flat = [c for given_ in choices.values() for c in given_]
    most = sum(given_[-1].nbytes for given_ in choices.values())
    limit = 0.565 * most
    rows = np.zeros((len(choices) + 1, len(flat)))
    place = 0
    for row, given_ in enumerate(choices.values()):
        rows[row, place : place + len(given_)] = 1
        place += len(given_)
    rows[-1] = [c.nbytes / most for c in flat]
    ones = np.ones(len(choices))
    oracle = milp(
        np.array([c.cost for c in flat]),
        constraints=LinearConstraint(rows, [*ones, 0], [*ones, limit / most]),
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 1e-9},
    )
    assert oracle.success
    found = least_cost(choices, limit)
    assert found.cost == pytest.approx(oracle.fun, rel=1e-6)
    assert found.bound == pytest.approx(found.cost, rel=1e-9)


def test_states_that_are_given_up_show_as_a_gap():
    choices = model_of(8, seed=5)
    limit = 0.6 * sum(given_[-1].nbytes for given_ in choices.values())
    exact, short = least_cost(choices, limit), least_cost(choices, limit, state_limit=2)
    assert exact.bound == pytest.approx(exact.cost, rel=1e-9)
    assert short.bound <= exact.cost * (1 + 1e-9) <= short.cost * (1 + 2e-9)


def test_a_budget_that_cannot_be_met_says_the_least():
    choices = {"a": [Choice("x", 10, 1.0), Choice("y", 20, 0.5)], "b": [Choice("x", 7, 2.0)]}
    with pytest.raises(BudgetError) as size:
        least_cost(choices, 16)
    assert size.value.args[1] == 17
    with pytest.raises(BudgetError) as cost:
        least_bytes(choices, 2.4)
    assert cost.value.args[1] == 2.5


@pytest.mark.parametrize("solve", [least_cost, least_bytes])
def test_thousands_of_matrices_are_within_one_matrix_of_the_bound(solve):
    draw = np.random.default_rng(0)
    choices = {}
    for index in range(12_288):
        bytes_, worth = 1000 * (1 + draw.random()), 1e-5 * draw.random()
        choices[f"w{index}"] = [
            Choice(str(bits), int(bytes_ * bits), worth * 4.0**-bits) for bits in (2, 3, 4, 8)
        ]
    limit = 12_288 * 1500 * 4.4 if solve is least_cost else 12_288 * 5e-6 * 4.0**-3.6
    found = solve(choices, limit)
    value = found.cost if solve is least_cost else found.nbytes
    assert (found.nbytes if solve is least_cost else found.cost) <= limit
    most = max(
        abs(given[0].cost - given[-1].cost) if solve is least_cost else given[-1].nbytes
        for given in choices.values()
    )
    assert found.bound <= value <= found.bound + most
