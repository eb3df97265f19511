"""Sequences that a model writes itself, for calibration without a text (as LLM-QAT, 2305.17888).

Each sequence begins with a random token, and each further token is drawn from what the model
expects. All sequences are written together, one token of each at a time: operators that work token
by token take them as if they were one text, and each sequence has states of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx

from edgeforge.model.checkpoint_weights import CheckpointWeights
from edgeforge.reference.walk import Walk
from quant.program import dialect
from quant.program.head import head_of
from quant.program.program import Program, node_argument

if TYPE_CHECKING:
    from edgeforge.model.model import Model

VERSION: Final = 1
"""Raised when other sequences are written than before."""

Sequences = tuple[tuple[int, ...], ...]
_Asked = tuple[tuple[int, ...], int, int, int]
# A plan, the weights and int8 caches each ask for the same sequences in one export.
_WRITTEN: Final[WeakKeyDictionary[CheckpointWeights, dict[_Asked, Sequences]]] = WeakKeyDictionary()

# Operators whose states each sequence has for itself, besides attention.
_MOVING: Final = dialect.STATEFUL - {dialect.ATTENTION}

Step = Callable[[Tensor, int], Tensor]
"""Takes tokens, ``int64[n]``, and the position of all; returns logits, ``float32[n, vocab]``."""


def write_sequences(
    model: Model,
    program: Program,
    head: Sequence[int],
    count: int,
    length: int,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, size: None,
) -> Sequences:
    """Returns sequences of tokens that the model itself finds likely.

    The model's weights are in memory meanwhile, in float32. An opened model writes the same ones
    only once.

    Args:
        model: the opened model.
        program: its program in the float dialect.
        head: the tokens that its tokenizer puts in front of a text.
        count: number of sequences.
        length: tokens of each, at most the program's context.
        seed: seed of all draws.
        progress: called with the number of tokens of each sequence that are there, and ``length``.
    """
    asked = (tuple(head), count, length, seed)
    known = _WRITTEN.setdefault(model.weights, {})
    if asked not in known:
        known[asked] = _written(model, program, asked, progress)
    return known[asked]


def _written(
    model: Model, program: Program, asked: _Asked, progress: Callable[[int, int], None]
) -> Sequences:
    head, count, length, seed = asked
    random = torch.Generator().manual_seed(seed)
    step = decoder(model.weights.float_walk(program), count, length)
    written = torch.empty(count, length, dtype=torch.int64)
    logits = None
    for position in range(length):
        if position < len(head):
            written[:, position] = head[position]
        elif logits is None:
            written[:, 0] = torch.randint(model.spec.vocab_size, (count,), generator=random)
        else:
            expected = logits[:, : model.spec.vocab_size].softmax(-1)
            written[:, position] = expected.multinomial(1, generator=random)[:, 0]
        progress(position + 1, length)
        if position + 1 < length:
            logits = step(written[:, position], position)
    return tuple(tuple(sequence) for sequence in written.tolist())


def decoder(walk: Walk, count: int, length: int) -> Step:
    """Returns a function that gives several sequences their next token's logits.

    Args:
        walk: a walk of a program in the float dialect.
        count: number of sequences.
        length: the most tokens of each.
    """
    run = {node: _step_of(walk, node, count, length) for node in walk.order}

    def step(tokens: Tensor, position: int) -> Tensor:
        values = walk.begin(tokens)
        for node in walk.order:
            values[node] = run[node](values, position)
            walk.forget(node, values)
        logits: Tensor = values[walk.program.output()][0]
        return logits

    return step


def _step_of(walk: Walk, node: fx.Node, count: int, length: int) -> Callable[[Any, int], Any]:
    """Returns a function of values, ``[1, count, ...]``, and the position of all tokens."""
    if node.target is dialect.ROPE:
        x, named = node_argument(node, 0), (node_argument(node, 1), node_argument(node, 2))
        tables = [walk.program.tables[walk.program.inputs[each.name].name] for each in named]

        def turn(values: Any, position: int) -> Tensor:
            each = values[x].transpose(0, 1)  # [count, 1, heads, width]
            turned: Tensor = dialect.ROPE(each, *tables, torch.tensor([position]))
            return turned.transpose(0, 1)

        return turn
    if node.target is dialect.ATTENTION:
        given, rest = [node_argument(node, at) for at in range(3)], node.args[6:]
        _, heads, _, width = node_argument(node, 3).meta["val"].shape
        caches = [torch.zeros(count, heads, length, width) for _ in range(2)]

        def attend(values: Any, position: int) -> Tensor:
            each = (values[part].transpose(0, 1) for part in given)
            found: Tensor = dialect.ATTENTION(*each, *caches, torch.tensor([position]), *rest)
            return found.transpose(0, 1)

        return attend
    if node.target in _MOVING:
        weights: dict[Any, Tensor] = dict(walk.weights_of(node))
        states = _states_of(walk.program, node, count)

        def move(values: Any, position: int) -> Tensor:
            given: list[Any] = []
            for each in node.args:
                if each in states:
                    given.append(states[each])
                elif each in weights:
                    given.append(weights[each])
                elif each in values:
                    given.append(values[each].transpose(0, 1))
                else:
                    given.append(None if each is None else torch.tensor([position]))
            assert callable(node.target)
            found: Tensor = node.target(*given)
            return found.transpose(0, 1)

        return move
    prepared = walk.prepare_head(node) if node is head_of(walk.program) else walk.prepare(node)
    return lambda values, position: prepared(values)


def _states_of(program: Program, node: fx.Node, count: int) -> dict[Any, Tensor]:
    """Returns an empty state for each sequence, by the input that stands for a text's."""
    found: dict[Any, Tensor] = {}
    for source in node.all_input_nodes:
        given = program.inputs.get(source.name)
        if given is not None and given.kind in ("recent", "memory"):
            found[source] = torch.zeros(count, *map(int, source.meta["val"].shape[1:]))
    return found
