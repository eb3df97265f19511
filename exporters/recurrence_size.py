"""`RecurrenceSize`: the dimensions of a recurrence, as far as its memory is concerned."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RecurrenceSize:
    """The dimensions of a layer's recurrence (`quant.program.recurrence_ops.recurrence`).

    Attributes:
        heads: heads of values, and so of the memory.
        key_heads: heads of queries and keys.
        key_width: width of a head's query and key, the memory's rows.
        value_width: width of a head's value, the memory's columns.
        by_row: whether each row of the memory has a decay of its own, as RWKV has it.
        replaces: whether a token replaces what its key finds, as the delta rule says.
    """

    heads: int
    key_heads: int
    key_width: int
    value_width: int
    by_row: bool = False
    replaces: bool = False

    @property
    def decays(self) -> int:
        """Log decays of one token."""
        return self.heads * (self.key_width if self.by_row else 1)

    @property
    def operands(self) -> int:
        """Numbers that are there for one token: what the recurrence takes, and its result."""
        keys = 2 * self.key_heads * self.key_width
        values = 2 * self.heads * self.value_width
        return keys + values + self.decays + (self.heads if self.replaces else 0)

    @property
    def memory(self) -> int:
        """Numbers of the memory."""
        return self.heads * self.key_width * self.value_width


def in_place(size: RecurrenceSize, tokens: int) -> int:
    """Counts what a loop over tokens holds besides operands and the memory itself: nothing."""
    return 0
