"""One method of a .pte under construction: its values, its calls, and its memory plan."""

from __future__ import annotations

import json
import math
from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from exporters.executorch.flatbuffer import Record

ScalarType = Literal["uint8", "int8", "int64", "float16", "float32", "float64", "bool", "bfloat16"]
# ExecuTorch's number of each dtype, and the bytes of one element.
SCALAR_TYPES: Final[dict[ScalarType, tuple[int, int]]] = {
    "uint8": (0, 1),
    "int8": (1, 1),
    "int64": (4, 8),
    "float16": (5, 2),
    "float32": (6, 4),
    "float64": (7, 8),
    "bool": (11, 1),
    "bfloat16": (15, 2),
}
BACKEND: Final = "XnnpackBackend"
_ALIGNMENT = 64
_ARENA = 1  # the arena's memory id; id 0 is for constants
_STATIC, _BOUND = 0, 1
_IN_SEGMENT = 1
_EXTERNAL = 1
_FOREVER = 1 << 60  # a number of a call after every real one


@dataclass
class _Planned:
    """A tensor that gets a place in the arena.

    Attributes:
        value: the number of its value.
        fields: the fields of its table, which `MethodBuilder.plan` completes.
        nbytes: its size in bytes, at its largest shape.
        first: the number of the first call that uses it.
        last: the number of the last call that uses it.
        offset: its place in the arena, in bytes.
    """

    value: int
    fields: dict[str, object]
    nbytes: int
    first: int
    last: int
    offset: int = 0


class MethodBuilder:
    """Collects a method's values and calls; a number identifies each value.

    Args:
        name: the method's name.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._values: list[Record] = []
        self._scalars: dict[tuple[str, object], int] = {}
        self._operators: dict[tuple[str, str], int] = {}
        self._delegates: list[int] = []
        self._calls: list[Record] = []
        self._planned: dict[int, _Planned] = {}
        self._lists: dict[int, list[int]] = {}  # the tensors of each list
        self._views: dict[int, int] = {}  # the tensor whose memory each view has
        # Of each element: its tensor, its place there in bytes, and its own fields.
        self._elements: dict[int, tuple[int, int, dict[str, object]]] = {}
        self._inputs: list[int] = []
        self._outputs: list[int] = []

    def _value(self, kind: str, fields: dict[str, object]) -> int:
        self._values.append(Record("EValue", {"val": Record(kind, fields)}))
        return len(self._values) - 1

    def _scalar(self, kind: str, field: str, value: object) -> int:
        key = (kind, value)
        if key not in self._scalars:
            self._scalars[key] = self._value(kind, {field: value} if field else {})
        return self._scalars[key]

    def none(self) -> int:
        """The value of an absent optional argument."""
        return self._scalar("Null", "", None)

    def integer(self, value: int) -> int:
        """A constant integer."""
        return self._scalar("Int", "int_val", value)

    def boolean(self, value: bool) -> int:
        """A constant boolean."""
        return self._scalar("Bool", "bool_val", value)

    def double(self, value: float) -> int:
        """A constant floating-point number."""
        return self._scalar("Double", "double_val", value)

    def computed_integer(self) -> int:
        """An integer that a call writes."""
        return self._value("Int", {"int_val": 0})

    def computed_boolean(self) -> int:
        """A boolean that a call writes, for `jump` and `repeat`."""
        return self._value("Bool", {"bool_val": False})

    def tensors(self, values: Sequence[int]) -> int:
        """A list of tensors; a call with several results takes each of them, then their list."""
        made = self._value("TensorList", {"items": list(values)})
        self._lists[made] = list(values)
        return made

    def optional_tensors(self, values: Sequence[int | None]) -> int:
        """A list of tensors, some of which may be absent."""
        absent = -1
        items = [absent if value is None else value for value in values]
        made = self._value("OptionalTensorList", {"items": items})
        self._lists[made] = [value for value in values if value is not None]
        return made

    def integers(self, values: Sequence[int]) -> int:
        """A list of constant integers, of which the format states each as a value."""
        return self.computed_integers([self.integer(value) for value in values])

    def computed_integers(self, values: Sequence[int]) -> int:
        """A list of integers that are values of the method, constant ones or computed ones."""
        return self._value("IntList", {"items": list(values)})

    def constant(
        self, dtype: ScalarType, shape: Sequence[int], buffer: int | None, name: str | None = None
    ) -> int:
        """A constant tensor.

        Args:
            dtype: the element type.
            shape: the dimensions.
            buffer: the index among the file's constants; None for a tensor in the .ptd.
            name: the key that the file states for it, by which a .ptd's tensor is found.
        """
        fields = self._tensor_fields(dtype, shape, dynamic=False)
        fields["data_buffer_idx"] = buffer or 0
        if name is not None:
            where = {"location": _EXTERNAL} if buffer is None else {}
            fields["extra_tensor_info"] = Record(
                "ExtraTensorInfo", {"fully_qualified_name": name, **where}
            )
        return self._value("Tensor", fields)

    def tensor(self, dtype: ScalarType, shape: Sequence[int], *, dynamic: bool) -> int:
        """A tensor that calls write and read; a dynamic tensor's ``shape`` is its largest."""
        fields = self._tensor_fields(dtype, shape, dynamic)
        value = self._value("Tensor", fields)
        nbytes = math.prod(shape) * SCALAR_TYPES[dtype][1]
        now = len(self._calls)
        self._planned[value] = _Planned(value, fields, nbytes, now, now)
        return value

    def elements(self, of: int, dtype: ScalarType, count: int) -> list[int]:
        """Tensors ``[1]`` that are the elements of a static tensor: they share its memory.

        A call that reads an element reads its tensor, which `jump` accounts for.
        """
        made = []
        for index in range(count):
            fields = self._tensor_fields(dtype, [1], dynamic=False)
            value = self._value("Tensor", fields)
            self._elements[value] = of, index * SCALAR_TYPES[dtype][1], fields
            made.append(value)
        return made

    def view(self, source: int, dtype: ScalarType, shape: Sequence[int], dynamic: int) -> int:
        """Adds a call that gives a tensor another shape; both have the same memory.

        Args:
            source: the tensor.
            dtype: its element type.
            shape: the dimensions at their largest.
            dynamic: the index of the only dimension whose size varies from run to run.
        """
        made = self._value("Tensor", self._tensor_fields(dtype, shape, dynamic=True))
        dims = self.integers([-1 if axis == dynamic else dim for axis, dim in enumerate(shape)])
        self._views[made] = self._views.get(source, source)
        self.call("executorch_prim::et_view", "default", source, dims, made)
        return made

    def state(self, dtype: ScalarType, shape: Sequence[int]) -> int:
        """A tensor that keeps its content from run to run; the file holds no content for it."""
        value = self.tensor(dtype, shape, dynamic=False)
        self._planned[value].first, self._planned[value].last = -1, _FOREVER
        return value

    def input(self, dtype: ScalarType, shape: Sequence[int], *, dynamic: bool) -> int:
        """Declares the method's next input."""
        value = self.tensor(dtype, shape, dynamic=dynamic)
        self._inputs.append(value)
        self._planned[value].first = -1
        return value

    def output(self, value: int) -> None:
        """Makes a value the method's next output."""
        self._outputs.append(value)
        if value in self._planned:
            self._planned[value].last = _FOREVER

    @staticmethod
    def _tensor_fields(dtype: ScalarType, shape: Sequence[int], dynamic: bool) -> dict[str, object]:
        return {
            "scalar_type": SCALAR_TYPES[dtype][0],
            "sizes": list(shape),
            "dim_order": list(range(len(shape))),
            "shape_dynamism": _BOUND if dynamic else _STATIC,
        }

    def _use(self, arguments: Sequence[int]) -> None:
        now = len(self._calls)
        listed = [each for value in arguments for each in self._lists.get(value, ())]
        for value in (*arguments, *listed):
            held = self._planned.get(self._views.get(value, value))
            if held is not None:
                held.last = max(held.last, now)

    def call(self, operator: str, overload: str, *arguments: int, out: int | None = None) -> None:
        """Adds a call of a kernel.

        Args:
            operator: the operator's name, such as ``aten::add``.
            overload: the operator's overload name.
            arguments: the arguments' values.
            out: the result, which the format states twice: as an argument and as what the call
                returns; None for a kernel that writes to its arguments.
        """
        key = (operator, overload)
        index = self._operators.setdefault(key, len(self._operators))
        given = [*arguments, *([out, out] if out is not None else [])]
        self._use(given)
        call = Record("KernelCall", {"op_index": index, "args": given})
        self._calls.append(Record("Instruction", {"instr_args": call}))

    def delegate(self, segment: int, arguments: Sequence[int]) -> None:
        """Adds a call of a delegate.

        Args:
            segment: the number of the segment that holds the delegate's program.
            arguments: the delegate's inputs, then its outputs.
        """
        self._use(arguments)
        call = Record(
            "DelegateCall", {"delegate_index": len(self._delegates), "args": list(arguments)}
        )
        self._delegates.append(segment)
        self._calls.append(Record("Instruction", {"instr_args": call}))

    def jump(self, condition: int) -> Callable[[], None]:
        """Adds a jump past the calls that follow where a boolean is false.

        Calls within run or do not, so a tensor that is read after them must be written before.

        Args:
            condition: a tensor ``bool[1]``, one of `elements`, or a `computed_boolean`.

        Returns:
            What makes the next call the one that the jump leads to.
        """
        call = self._jump(condition, 0)

        def land() -> None:
            call["destination_instruction"] = len(self._calls)

        return land

    def repeat(self) -> Callable[[int], None]:
        """Begins calls that run again and again, at least once.

        Returns:
            What ends them; it takes a `computed_boolean` that they write, and they run again while
            it is false.
        """
        start = len(self._calls)

        def until(condition: int) -> None:
            # What the calls read and an earlier call wrote is needed until their last run.
            for tensor in self._planned.values():
                if tensor.first < start <= tensor.last:
                    tensor.last = max(tensor.last, len(self._calls))
            self._jump(condition, start)

        return until

    def _jump(self, condition: int, destination: int) -> dict[str, object]:
        within = self._elements.get(condition)
        self._use([condition] if within is None else [condition, within[0]])
        call: dict[str, object] = {
            "cond_value_index": condition,
            "destination_instruction": destination,
        }
        self._calls.append(Record("Instruction", {"instr_args": Record("JumpFalseCall", call)}))
        return call

    def plan(self) -> Record:
        """Plans the memory and returns the finished method as an ``ExecutionPlan``."""
        size = _place(list(self._planned.values()))
        for tensor in self._planned.values():
            tensor.fields["allocation_info"] = _allocation(tensor.offset)
        for of, offset, fields in self._elements.values():
            fields["allocation_info"] = _allocation(self._planned[of].offset + offset)
        leaf: dict[str, object] = {"type": None, "context": None, "children_spec": []}
        return Record(
            "ExecutionPlan",
            {
                "name": self.name,
                "container_meta_type": _containers(len(self._inputs), leaf),
                "values": self._values,
                "inputs": self._inputs,
                "outputs": self._outputs,
                "chains": [
                    Record("Chain", {"inputs": [], "outputs": [], "instructions": self._calls})
                ],
                "operators": [
                    Record("Operator", {"name": name, "overload": overload})
                    for name, overload in self._operators
                ],
                "delegates": [
                    Record(
                        "BackendDelegate",
                        {
                            "id": BACKEND,
                            "processed": Record(
                                "DelegateDataReference",
                                {"location": _IN_SEGMENT, "index": segment},
                            ),
                            "compile_specs": [],
                        },
                    )
                    for segment in self._delegates
                ],
                "non_const_buffer_sizes": [0, size] if self._planned else [0],
            },
        )


def _allocation(offset: int) -> Record:
    return Record(
        "AllocationDetails",
        {
            "memory_id": _ARENA,
            "memory_offset_low": offset & 0xFFFFFFFF,
            "memory_offset_high": offset >> 32,
        },
    )


def constant_method(name: str, value: int | bool | Sequence[int]) -> Record:
    """A method that returns constant numbers, by which runners ask about a model."""
    builder = MethodBuilder(name)
    if isinstance(value, bool):
        builder.output(builder.boolean(value))
    else:
        for number in [value] if isinstance(value, int) else value:
            builder.output(builder.integer(number))
    return builder.plan()


def _containers(inputs: int, leaf: dict[str, object]) -> Record:
    """How ExecuTorch's Python bindings nest inputs (a tuple) and outputs (a single tensor)."""

    def container(type: str, context: str, children: list[object]) -> dict[str, object]:
        return {"type": f"builtins.{type}", "context": context, "children_spec": children}

    tuple_of = container("tuple", "null", [leaf] * inputs)
    call = container("tuple", "null", [tuple_of, container("dict", "[]", [])])
    return Record(
        "ContainerMetadata",
        {
            "encoded_inp_str": json.dumps([1, call]) if inputs else "",
            "encoded_out_str": json.dumps([1, leaf]),
        },
    )


def _place(tensors: list[_Planned]) -> int:
    """Gives places that do not overlap to tensors that are in use at the same time.

    It places the largest tensor first, each at the lowest free offset (greedy by size, Pisarchyk &
    Lee 2020).

    Returns:
        The size of the arena, in bytes.
    """
    placed: list[_Planned] = []  # by their offsets
    size = 0
    for tensor in sorted(tensors, key=lambda t: -t.nbytes):
        offset = 0
        for other in placed:
            if other.last < tensor.first or tensor.last < other.first:
                continue
            if offset + tensor.nbytes <= other.offset:
                break
            offset = max(offset, _align(other.offset + other.nbytes))
        tensor.offset = offset
        insort(placed, tensor, key=lambda t: t.offset)
        size = max(size, _align(offset + tensor.nbytes))
    return size


def _align(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
