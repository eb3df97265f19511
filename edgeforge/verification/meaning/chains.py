"""Chains of steps in what an entry point computes: what stands between two products or sums."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from exporters.lifted import (
    Bias,
    Clamp,
    Columns,
    Last,
    LayerNorm,
    Norm,
    Rope,
    Scaled,
    Softcap,
    Unknown,
    Value,
)

Kind = TypeVar("Kind", bound=Value)
Step = Bias | Norm | LayerNorm | Scaled | Softcap | Clamp | Rope
"""What has one operand and works token by token."""


class NoDecoderError(ValueError):
    """What an entry point computes is not the decoder that EdgeForge lowers.

    Attributes:
        fact: the fact that is otherwise.
    """

    def __init__(self, message: str, fact: str = "structure") -> None:
        super().__init__(message)
        self.fact = fact


@dataclass(frozen=True)
class Chain:
    """A value, seen as steps that follow each other.

    Attributes:
        steps: the steps, from the last to the first.
        columns: the columns of ``source`` that they work on; None for all of them.
        source: what the first step works on: neither a step nor columns.
    """

    steps: tuple[Step, ...]
    columns: Columns | None
    source: Value

    def the(self, kind: type[Kind], what: str) -> Kind:
        """The source, which must be of a kind.

        Raises:
            NoDecoderError: it is of another.
        """
        if not isinstance(self.source, kind):
            raise other(self.source, what)
        return self.source

    def span(self, what: str) -> tuple[int, int]:
        """The first of the columns, and the one after the last.

        Raises:
            NoDecoderError: all columns are taken.
        """
        if self.columns is None:
            raise other(self.source, what)
        return self.columns.start, self.columns.stop


def chain(value: Value, *streams: Value) -> Chain:
    """Follows a value back over steps and columns.

    Args:
        value: the last value.
        streams: values at which to end although they may be steps themselves.
    """
    steps: list[Step] = []
    columns = None
    value = plain(value)
    ends = [plain(each) for each in streams]
    while value not in ends:
        if isinstance(value, Step):
            steps.append(value)
        elif isinstance(value, Columns) and columns is None:
            columns = value
        else:
            break
        value = plain(value.source)
    return Chain(tuple(steps), columns, value)


def plain(value: Value) -> Value:
    """The value of which the last token's row is selected; any other value itself."""
    while isinstance(value, Last):
        value = value.source
    return value


def expect(value: Value, kind: type[Kind], what: str) -> Kind:
    """The plain value, which must be of a kind.

    Raises:
        NoDecoderError: it is of another.
    """
    inner = plain(value)
    if not isinstance(inner, kind):
        raise other(inner, what)
    return inner


def other(value: Value, wanted: str) -> NoDecoderError:
    """The error of a value that stands where another should be."""
    return NoDecoderError(f"{described(plain(value))} stands where {wanted} should be")


def described(value: Value) -> str:
    """A value's name and kind, in words."""
    kind = value.kind if isinstance(value, Unknown) else type(value).__name__.lower()
    return f"{value.name or 'a value'} ({kind})"
