"""Lifts a method of a .pte: its delegates, and the kernels between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from exporters.errors import ExportError
from exporters.executorch.flatbuffer import Record
from exporters.executorch.lifted_capped import Seen
from exporters.executorch.lifted_graph import Delegate
from exporters.executorch.lifted_heads import SlotRows
from exporters.executorch.lifted_values import (
    NUMBERS,
    Files,
    Held,
    Table,
    Updated,
    numbers,
)
from exporters.executorch.method import BACKEND
from exporters.executorch.pte_file import is_weight
from exporters.lifted import (
    Constant,
    EntryPoint,
    Numbers,
    Tokens,
    Unknown,
    Value,
    are_numbers,
    at,
    probes_of,
)
from exporters.lifted_mixture import Combine

LAST_INDEX: Final = 2**63 - 1
_SCALARS: Final = {"Int": "int_val", "Bool": "bool_val", "Double": "double_val"}


Kernels = Mapping[str, Callable[["Method", str, list[int]], bool]]
"""By kernel: takes the method, the kernel's name and the arguments' numbers, and lifts the call;
whether it could."""


@dataclass(frozen=True)
class Guard:
    """Booleans on which jumps depend: for each expert whether any token chose it.

    Attributes:
        index: the number of the tensor that they are.
        made: the tensor's value; the booleans are others where it has another.
        experts: how many there are, a byte each.
        weights: each token's weight of each expert.
    """

    index: int
    made: Value
    experts: int
    weights: Value


@dataclass(frozen=True, eq=False)
class Begun(Value):
    """A memory as a call takes it: zeros where a text begins, else what the state holds.

    Attributes:
        ignored: for each probe, whether it is zeros.
    """

    ignored: tuple[bool, ...]


Loops = Callable[["Method", Sequence[Record]], str | None]
"""Lifts the calls of a loop; says what of them is otherwise than expected, None for nothing."""


class Method:
    """One method being lifted.

    Args:
        plan: its ``ExecutionPlan``.
        files: reads the program's constants.
        context: the declared context, tokens.
        kernels: what lifts each kernel's calls, by the kernel's name.
        loops: what lifts a loop.
    """

    def __init__(
        self, plan: Record, files: Files, context: int, kernels: Kernels, loops: Loops
    ) -> None:
        self.kernels, self.loops = kernels, loops
        self.plan, self.files, self.name = plan, files, str(plan["name"])
        self.records = [row["val"] for row in plan["values"]]
        self.limit = int(self.records[plan["inputs"][0]]["sizes"][1])
        self.probes = probes_of(context, tuple(dict.fromkeys((1, self.limit))))
        self.values: dict[int, Value] = {}
        self.caches: dict[int, Updated] = {}
        self.seen: Seen = {}
        self.capped: Seen = {}
        self.recents = self._recents()
        self.samples: dict[int, Value] = {}  # what sample logits stand for, by the value's id
        self.guards: Guard | None = None
        self.guard: tuple[Value, int] | None = None  # of the calls that a jump may leave out
        self.at_start: Numbers | None = None  # the same, of those that run where a text begins
        self.outside: list[str] = []
        self.delegates = 0

    def lift(self) -> EntryPoint:
        """Goes through the calls in order, those that a jump may leave out as well.

        Raises:
            ExportError: the method has other jumps than the lowering emits.
        """
        tokens, position = self.plan["inputs"]
        self.values[tokens] = Tokens("tokens")
        starts = tuple(np.array([probe.start], np.int64) for probe in self.probes)
        self.values[position] = Numbers("position", starts)
        land, within = -1, set[int]()
        calls = [row["instr_args"] for row in self.plan["chains"][0]["instructions"]]
        loops = {
            int(call["destination_instruction"]): place
            for place, call in enumerate(calls)
            if call.table == "JumpFalseCall" and call["destination_instruction"] <= place
        }
        end = 0  # of the last loop
        for place, call in enumerate(calls):
            if place == land:
                self._leave(within)
                land = -1
            if place in loops and land == -1:
                end = loops[place] + 1
                self._loop(place, calls[place:end])
            if place < end:
                continue
            if call.table == "JumpFalseCall" and land == -1:
                land, within = self._enter(call, place), set()
            elif call.table == "DelegateCall":
                within |= self._delegate(call)
            elif call.table == "KernelCall":
                operator = self.plan["operators"][call["op_index"]]
                self._kernel(str(operator["name"]), list(call["args"]))
                within.add(call["args"][-1])
            else:
                raise ExportError(f"{self.files.pte.file}: {self.name} has a {call.table}")
        if land != -1:
            raise ExportError(f"{self.files.pte.file}: {self.name} jumps past its last call")
        logits = self.value(self.plan["outputs"][0])
        return EntryPoint(self.name, logits, self.probes, tuple(self.outside))

    def _enter(self, call: Record, place: int) -> int:
        """Notes what a jump depends on; returns the place of the call that it leads to.

        Raises:
            ExportError: it leads back, or depends on something else than who chose an expert.
        """
        condition, land = call["cond_value_index"], int(call["destination_instruction"])
        record, of, started = self.records[condition], self.guards, self.value(condition)
        if record.table == "Bool" and isinstance(started, Numbers) and land > place + 1:
            self.at_start = started
            return land
        if of is not None and record.table == "Tensor" and list(record["sizes"]) == [1]:
            expert = self.offset(condition) - self.offset(of.index)
            same = self.values[of.index] is of.made
            if same and 0 <= expert < of.experts and land > place + 1:
                self.guard = of.weights, expert
                return land
        raise ExportError(
            f"{self.files.pte.file}: {self.name} has a jump at call {place} that leaves out "
            f"something else than an expert that no token chose or what begins a text"
        )

    def _loop(self, place: int, calls: Sequence[Record]) -> None:
        """Lifts the calls of a loop.

        Raises:
            ExportError: it is another loop than the lowering emits.
        """
        self.delegates += sum(call.table == "DelegateCall" for call in calls)
        wrong = self.loops(self, calls)
        if wrong is not None:
            where = f"{self.files.pte.file}: {self.name} has at call {place}"
            raise ExportError(f"{where} {wrong}")

    def _leave(self, within: set[int]) -> None:
        """Where a jump leads: what calls within wrote is not known.

        Experts' sums and slots are, and zeros.
        """
        self.guard = self.at_start = None
        for index in within:
            if not isinstance(self.values[index], Combine | SlotRows | Begun):
                name = f"{self.name}, value {index}, which a jump leaves out"
                self.values[index] = Unknown(name, "of some runs alone")

    def _recents(self) -> dict[int, tuple[str, int]]:
        """The states that get the last rows of a value, and how many, by the value's number.

        Convolutions read their state before a delegate, and it is written after.
        """
        read, found = set(), {}
        for kernel, arguments in self._calls():
            if kernel == "aten::where" and self.is_state(arguments[1]):
                read.add(arguments[1])
            if kernel == "aten::slice_copy" and arguments[-1] in read:
                axis, start, end, step = (self.value(index) for index in arguments[1:5])
                if all(isinstance(each, Constant) for each in (axis, start, end, step)):
                    bounds = [int(at(each, 0)) for each in (axis, start, end, step)]
                    if [bounds[0], *bounds[2:]] == [1, LAST_INDEX, 1]:
                        name = recent_name(self, arguments[-1])
                        found[arguments[0]] = name, -bounds[1]
        return found

    def _calls(self) -> Iterator[tuple[str, list[int]]]:
        for row in self.plan["chains"][0]["instructions"]:
            call = row["instr_args"]
            if call.table == "KernelCall":
                operator = self.plan["operators"][call["op_index"]]
                yield str(operator["name"]), list(call["args"])

    def is_state(self, index: int) -> bool:
        """Whether a value is a tensor of three dimensions that no call has written yet."""
        record = self.records[index]
        return (
            record.table == "Tensor" and len(record["sizes"]) == 3 and not record["data_buffer_idx"]
        )

    def value(self, index: int) -> Value:
        """A value by its number; constants are read when they are first asked for."""
        if index not in self.values:
            self.values[index] = self._given(index)
        return self.values[index]

    def constants(self, *indices: int) -> tuple[Any, ...] | None:
        """Numbers that are the same in every call, by the values' numbers; None where one is not.

        A kernel's axis must be one: a number that a call computes may be right in some calls only.
        """
        values = [self.value(index) for index in indices]
        found = [each.array for each in values if isinstance(each, Constant)]
        if len(found) < len(values) or any(array.ndim for array in found):
            return None
        return tuple(array.item() for array in found)

    def _given(self, index: int) -> Value:
        record, name = self.records[index], f"{self.name}, value {index}"
        if record.table in _SCALARS:
            return Constant(name, np.asarray(record[_SCALARS[record.table]]))
        if record.table != "Tensor":
            return Unknown(name, record.table)
        extra = record["extra_tensor_info"]
        key = str(extra["fully_qualified_name"] or "") if extra else ""
        if is_weight(key):
            return Table(key, key, record["scalar_type"], tuple(record["sizes"]))
        if record["data_buffer_idx"]:
            array = self.files.constant(record)
            return Unknown(key, "constant") if array is None else Constant(key, array)
        sizes = record["sizes"]
        if len(sizes) == 4:
            return Held(f"cache at byte {self.offset(index)} of the arena", sizes[1])
        return Unknown(name, "tensor without content")

    def offset(self, index: int) -> int:
        """Where a tensor is in the arena, in bytes."""
        at = self.records[index]["allocation_info"]
        return (at["memory_offset_high"] << 32 | at["memory_offset_low"]) if at else index

    def has_memory(self, index: int) -> bool:
        """Whether a value has a place of its own in the arena: not a number, nor a view."""
        record = self.records[index]
        return record.table == "Tensor" and record["allocation_info"] is not None

    def sizes(self, index: int) -> tuple[int, ...]:
        """A tensor's largest shape."""
        record = self.records[index]
        return tuple(record["sizes"]) if record.table == "Tensor" else ()

    def _delegate(self, call: Record) -> set[int]:
        """Lifts a delegate's call; returns the numbers of the values that it writes."""
        number, arguments = call["delegate_index"], list(call["args"])
        graph = self.graph_of(call)
        self.delegates += 1
        if graph is None:
            backend = self.plan["delegates"][number]["id"]
            self.outside.append(f"the delegate {number} of the backend {backend}")
            return set()
        inputs = len(graph["input_ids"])
        name = f"{self.name}, delegate {number}"
        given = [self.value(index) for index in arguments[:inputs]]
        outputs = arguments[inputs:]
        written = {
            inputs + place: self.recents[index][0]
            for place, index in enumerate(outputs)
            if index in self.recents
        }
        found = Delegate(graph, self.files, name, written, self.capped).run(given)
        for index, value in zip(outputs, found, strict=True):
            self.values[index] = value
        return set(outputs)

    def graph_of(self, call: Record) -> Record | None:
        """The graph of a delegate's call; None for one of another backend."""
        delegate = self.plan["delegates"][call["delegate_index"]]
        if delegate["id"] != BACKEND:
            return None
        graph: Record | None = self.files.pte.delegates.get(delegate["processed"]["index"])
        return graph

    def _kernel(self, kernel: str, arguments: list[int]) -> None:
        handler = self.kernels.get(kernel)
        if handler is not None and handler(self, kernel, arguments):
            return
        if kernel in NUMBERS:
            result = arguments[-1]
            count = _OPERANDS[kernel]
            given = tuple(self.value(index) for index in arguments[:count])
            if are_numbers(given):
                made = numbers(f"{self.name}, value {result}", kernel, given, len(self.probes))
                self.values[result] = made
                return
        if handler is None and kernel not in NUMBERS:
            self.outside.append(f"{kernel} outside of the delegates")
        self.values[arguments[-1]] = Unknown(
            f"{self.name}, value {arguments[-1]}",
            kernel,
            tuple(self.value(index) for index in arguments[:-1] if index in self.values),
        )


_OPERANDS: Final = {
    "executorch_prim::add": 2,
    "executorch_prim::eq": 2,
    "executorch_prim::mul": 2,
    "executorch_prim::sub": 2,
    "executorch_prim::sym_max": 2,
    "aten::sub": 3,
    "aten::ge": 2,
    "aten::gt": 2,
    "aten::lt": 2,
    "aten::logical_and": 2,
    "aten::where": 3,
    "aten::_local_scalar_dense": 1,
    "aten::slice_copy": 5,
}


def recent_name(method: Method, index: int) -> str:
    """The name of a state of recent tokens."""
    return f"recent tokens at byte {method.offset(index)} of the arena"


def stated_by(plans: list[Any]) -> dict[str, tuple[int, ...]]:
    """What methods without inputs return, by their names."""
    found = {}
    for plan in plans:
        if plan["inputs"]:
            continue
        values = [plan["values"][index]["val"] for index in plan["outputs"]]
        if all(value.table in _SCALARS for value in values):
            found[str(plan["name"])] = tuple(int(value[_SCALARS[value.table]]) for value in values)
    return found
