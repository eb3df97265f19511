"""Finds out how long a block needs each value, and which values may share memory with a state.

Where no operation reads the old value of a state after the new one is written, the state is read
without a copy, and a slice of it is written in place. Copying a cache for each token would take
longer than everything else.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from device_harness.coreml_interpreter.registry import VIEWS

_WRITES: Final = {"write_state": ("input", "data"), "coreml_update_state": ("state", "value")}


@dataclass
class Sharing:
    """What may be freed, copied or written in place, by the operation's index in the block.

    Attributes:
        freed: the names of values that the operation is the last to read.
        copied: the reads of states whose result must be copied.
        in_place: the slice_update operations that may write into their argument.
    """

    freed: dict[int, list[str]] = field(default_factory=dict)
    copied: set[int] = field(default_factory=set)
    in_place: set[int] = field(default_factory=set)


def share(block: Any) -> Sharing:
    """Analyses a block, given as a ``Block`` message."""
    operations = list(block.operations)
    end = len(operations)
    last = {name: end for name in block.outputs}
    users: dict[str, list[int]] = {name: [end] for name in block.outputs}
    for index, operation in enumerate(operations):
        for name in _read(operation):
            users.setdefault(name, []).append(index)
            last[name] = max(last.get(name, -1), index)
    made = {
        output.name: index
        for index, operation in enumerate(operations)
        for output in operation.outputs
        if operation.type != "const"
    }
    sharing = Sharing()
    for name, index in last.items():
        if index < end and name in made:
            sharing.freed.setdefault(index, []).append(name)
    _share_states(operations, last, users, made, sharing)
    return sharing


def _share_states(
    operations: list[Any],
    last: dict[str, int],
    users: dict[str, list[int]],
    made: dict[str, int],
    sharing: Sharing,
) -> None:
    reach = _reach(operations, last)
    # By state: the index of each read and the name of its result, which lies in the state's memory.
    reads: dict[str, list[tuple[int, str]]] = {}
    writes: dict[str, list[int]] = {}
    for index, operation in enumerate(operations):
        if operation.type in ("read_state", "coreml_update_state") and operation.outputs:
            state = _argument(operation, "input" if operation.type == "read_state" else "state")
            reads.setdefault(state, []).append((index, operation.outputs[0].name))
        if operation.type in _WRITES:
            writes.setdefault(_argument(operation, _WRITES[operation.type][0]), []).append(index)
        for state in _inner_writes(operation):
            writes.setdefault(state, []).append(index)
    for state, places in writes.items():
        aliases = reads.get(state, [])
        moved = []
        for index in places:
            slice_at = _slice_behind(operations, index, users, made)
            if slice_at is not None and _alone(
                operations, slice_at, index, aliases, places, reach, users
            ):
                sharing.in_place.add(slice_at)
                moved.append(slice_at)
            else:
                moved.append(index)
        for at, name in aliases:
            later = [write for write, index in zip(moved, places, strict=True) if index > at]
            if later and reach.get(name, -1) > min(later):
                sharing.copied.add(at)


def _reach(operations: list[Any], last: dict[str, int]) -> dict[str, int]:
    """The index of the last operation that reads each value or a value that may be its view."""
    reach = dict(last)
    for operation in reversed(operations):
        if operation.type in VIEWS:
            furthest = max((reach.get(output.name, -1) for output in operation.outputs), default=-1)
            for name in _read(operation):
                reach[name] = max(reach.get(name, -1), furthest)
    return reach


def _slice_behind(
    operations: list[Any], write: int, users: dict[str, list[int]], made: dict[str, int]
) -> int | None:
    """The index of the slice_update whose result only this write reads; None if there is none."""
    operation = operations[write]
    if operation.type not in _WRITES:
        return None
    value = _argument(operation, _WRITES[operation.type][1])
    index = made.get(value)
    if index is None or operations[index].type != "slice_update" or users[value] != [write]:
        return None
    return index


def _alone(
    operations: list[Any],
    slice_at: int,
    write: int,
    aliases: list[tuple[int, str]],
    writes: list[int],
    reach: dict[str, int],
    users: dict[str, list[int]],
) -> bool:
    """Whether a slice may be written in place, and so before the write of the state itself."""
    source = _argument(operations[slice_at], "x")
    at = next((place for place, name in aliases if name == source), None)
    if at is None or any(at < other < write for other in writes):
        return False  # the slice changes another value than the state's present one
    if users[source].count(slice_at) != 1:
        return False  # the slice reads the state's memory for another argument too
    for place, name in aliases:
        allowed = slice_at if name == source else slice_at - 1
        if place < write and reach.get(name, -1) > allowed:
            return False
    return not any(slice_at < place < write for place, _ in aliases)


def _read(operation: Any) -> list[str]:
    """The names that an operation reads, with those that its inner blocks read."""
    names = [
        binding.name
        for argument in operation.inputs.values()
        for binding in argument.arguments
        if binding.WhichOneof("binding") == "name"
    ]
    for block in operation.blocks:
        for inner in block.operations:
            names += _read(inner)
        names += block.outputs
    return names


def _inner_writes(operation: Any) -> list[str]:
    found = []
    for block in operation.blocks:
        for inner in block.operations:
            if inner.type in _WRITES:
                found.append(_argument(inner, _WRITES[inner.type][0]))
            found += _inner_writes(inner)
    return found


def _argument(operation: Any, name: str) -> str:
    for binding in operation.inputs[name].arguments if name in operation.inputs else ():
        return str(binding.name)
    return ""
