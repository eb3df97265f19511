"""What a prefill's recurrence is said to hold, against the values of the emitted program."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from edgeforge.families.facts import facts_of
from exporters.coreml import names
from exporters.coreml.closed_form import closed_form
from exporters.coreml.package import Package, open_package, tensor_type
from exporters.coreml.target import CoremlTarget
from exporters.options import TargetOptions
from exporters.target import ModelFacts
from tests.exporters.coreml.vocabulary_model import CONTEXT, made
from tests.oracles.vocabulary import RECURRENT

BYTES = {"fp32": 4, "fp16": 2, "int32": 4, "bool": 1}
# The parts of names of what a recurrence makes, and of what all recurrences of a function share.
PARTS = ("_recurrence_", "tokens_", "token_")


def most_held(package: Package, function: str, tokens: int) -> int:
    """The most bytes that values of recurrences take at once, each from its making to its last use.

    A reshaped value takes the memory of what it was made of.
    """
    operations = list(package.operations(function))
    views: dict[str, str] = {}
    last: dict[str, int] = {}
    for index, operation in enumerate(operations):
        for argument in operation.inputs.values():
            for binding in argument.arguments:
                last[views.get(binding.name, binding.name)] = index
        if operation.type == "reshape":
            source = operation.inputs["x"].arguments[0].name
            views[operation.outputs[0].name] = views.get(source, source)
    held: dict[str, int] = {}
    most = 0
    for index, operation in enumerate(operations):
        if operation.type not in ("const", "reshape"):
            for output in operation.outputs:
                if any(part in output.name for part in PARTS):
                    kind = tensor_type(output.type, output.name)
                    size = math.prod(tokens if dim is None else dim for dim in kind.shape)
                    held[output.name] = BYTES[kind.dtype] * size
        most = max(most, sum(held.values()))
        held = {name: size for name, size in held.items() if last.get(name, index) > index}
    return most


@pytest.fixture(scope="module", params=["rwkv5", "rwkv6", "mamba", "delta-net"])
def case(request, tmp_path_factory):
    """A model of small weights, its package for chunks of 8 and 48 tokens, and its recurrence."""
    spec = RECURRENT[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    built = made(folder, spec, format="fp32", size=0.5, chunk="8,48")
    return spec, built.store.plan, open_package(built.folder / names.PACKAGE)


@pytest.mark.parametrize("tokens", [8, 48])
def test_the_count_is_what_the_program_holds(case, tokens):
    spec, _, package = case
    (size,) = facts_of(spec, CONTEXT).recurrences
    counted = 4 * (tokens * size.operands + closed_form(size, tokens))
    held = most_held(package, names.PREFILL, tokens)
    assert held <= counted <= 1.6 * held
    if tokens > 8:
        assert counted <= 1.15 * held
        assert held > 2 * 4 * tokens * size.operands  # most of it is no operand


def test_one_token_has_no_pairs(case):
    spec, _, package = case
    (size,) = facts_of(spec, CONTEXT).recurrences
    assert 0 < most_held(package, names.DECODE, 1) <= 4 * (size.operands + closed_form(size, 1))


def test_the_footprint_counts_it_for_the_largest_chunk(case):
    spec, plan, _ = case
    facts = facts_of(spec, CONTEXT)
    (size,) = facts.recurrences
    shapes = {name: weight.shape for name, weight in spec.weights.items()}

    def buffers(facts: ModelFacts, chunk: str) -> int:
        return CoremlTarget().footprint(plan, shapes, facts, TargetOptions(chunk=chunk)).buffers

    for chunk, tokens in (("8,48", 48), ("16", 16)):
        more = buffers(facts, chunk) - buffers(replace(facts, recurrences=()), chunk)
        assert more == 4 * (tokens * size.operands + closed_form(size, tokens))
