"""What layers carry from call to call, and what a call's position means to each kind.

A program's states are inputs that its operators change (`quant.program.state_ops`). Every runtime
keeps them for its caller, and sessions of `device_harness` treat each kind by its rules here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from quant.program.program import Program

StateKind = Literal["cache", "recent", "memory"]
"""``cache``: keys or values, a row for each position. A call at position p writes its rows from p
on and reads no row after them. So a smaller position takes tokens back, and nothing is ever reset.

``recent``: the last few tokens' inputs of a convolution, or of a token's shift. A call at position
0 ignores what it holds; a call at any other position must follow the call that wrote it. So tokens
cannot be taken back: the text must begin again, or the state must have been copied before.

``memory``: the matrices of a recurrence, of a fixed size however long the text is. What a call's
position means to it is the same as for ``recent``. A recurrence adds to it at every token, so it is
kept in float32, or in two numbers of 16 bits that add up to as much."""


@dataclass(frozen=True)
class State:
    """One state of a program.

    Attributes:
        name: its name, ``model.layers.N.` and so on.
        kind: what it holds.
        shape: ``[1, kv_heads, context, head_dim]`` for a cache; ``[1, columns, tokens]`` for
            recent tokens; ``[1, heads, key_width, value_width]`` for a memory. In float programs
            the dtype is float32; a target may keep another one.
    """

    name: str
    kind: StateKind
    shape: tuple[int, ...]

    @property
    def can_rewind(self) -> bool:
        """Whether tokens can be taken back by calling again with a smaller position."""
        return self.kind == "cache"


def states_of(program: Program) -> Iterator[State]:
    """The states of a program, in the order of its inputs."""
    for node in program.graph.nodes:
        if node.op == "placeholder":
            given = program.inputs[node.name]
            if given.kind == "cache" or given.kind == "recent" or given.kind == "memory":
                yield State(given.name, given.kind, tuple(map(int, node.meta["val"].shape)))
