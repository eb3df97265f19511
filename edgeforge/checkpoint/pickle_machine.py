"""Interprets a pickle's opcodes on inert data, without importing or calling anything.

The machine builds dicts, lists, tuples, numbers, texts and descriptions of tensors. It refuses
anything else that a pickle asks for, and names it.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass

from edgeforge.checkpoint.tensor_entry import MAX_DIMENSIONS

MAX_PICKLE_OPCODES = 1_000_000

_STORAGES: dict[str, tuple[str, int]] = {  # torch's storage class: dtype, bytes per element
    "FloatStorage": ("float32", 4),
    "HalfStorage": ("float16", 2),
    "BFloat16Storage": ("bfloat16", 2),
    "DoubleStorage": ("float64", 8),
    "LongStorage": ("int64", 8),
    "IntStorage": ("int32", 4),
    "ShortStorage": ("int16", 2),
    "CharStorage": ("int8", 1),
    "ByteStorage": ("uint8", 1),
    "BoolStorage": ("bool", 1),
    "ComplexFloatStorage": ("complex64", 8),
    "ComplexDoubleStorage": ("complex128", 16),
}


@dataclass(frozen=True, slots=True)
class _Global:
    name: str


@dataclass(frozen=True, slots=True)
class Storage:
    """A flat array in the zip member ``data/<key>``; ``itemsize`` in bytes."""

    dtype: str
    itemsize: int
    key: str
    elements: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A view of a storage; ``offset`` and ``stride`` count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Mark:
    pass


class Unsound(Exception):
    """The pickle is damaged, or asks for something that a table of tensors does not need."""


def interpret(pickle: bytes) -> object:
    """Run a pickle's opcodes on inert data and return the top of the stack at STOP.

    Raises:
        Unsound: The pickle is damaged, or uses an opcode or a function that may run code.
    """
    stack: list[object] = []
    memo: dict[int, object] = {}
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(pickle)):
            if count > MAX_PICKLE_OPCODES:
                raise Unsound(f"its pickle has more than {MAX_PICKLE_OPCODES} opcodes")
            if opcode.name == "STOP":
                return stack[-1]
            step = _STEPS.get(opcode.name)
            if step is None:
                raise Unsound(
                    f"its pickle uses the opcode {opcode.name}, which no table of tensors needs "
                    "and which may run code; ask for a safetensors file"
                )
            step(stack, memo, argument)
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise Unsound(f"its pickle is damaged ({type(error).__name__}: {error})") from None
    raise Unsound("its pickle has no end")


_Step = Callable[[list[object], dict[int, object], object], None]


def _push(stack: list[object], memo: dict[int, object], argument: object) -> None:
    stack.append(argument)


def _constant(make: Callable[[], object]) -> _Step:
    def step(stack: list[object], memo: dict[int, object], argument: object) -> None:
        stack.append(make())

    return step


def _ignore(stack: list[object], memo: dict[int, object], argument: object) -> None:
    pass


def _put(stack: list[object], memo: dict[int, object], argument: object) -> None:
    memo[_integer(argument)] = stack[-1]


def _memoize(stack: list[object], memo: dict[int, object], argument: object) -> None:
    memo[len(memo)] = stack[-1]


def _get(stack: list[object], memo: dict[int, object], argument: object) -> None:
    stack.append(memo[_integer(argument)])


def _since_mark(stack: list[object]) -> list[object]:
    items: list[object] = []
    while not isinstance(item := stack.pop(), _Mark):
        items.append(item)
    items.reverse()
    return items


def _tuple_of(length: int) -> _Step:
    def step(stack: list[object], memo: dict[int, object], argument: object) -> None:
        items = [stack.pop() for _ in range(length)]
        stack.append(tuple(reversed(items)))

    return step


def _tuple(stack: list[object], memo: dict[int, object], argument: object) -> None:
    items = _since_mark(stack)
    stack.append(tuple(items))


def _append(stack: list[object], memo: dict[int, object], argument: object) -> None:
    item = stack.pop()
    _list(stack[-1]).append(item)


def _appends(stack: list[object], memo: dict[int, object], argument: object) -> None:
    items = _since_mark(stack)
    _list(stack[-1]).extend(items)


def _set_item(stack: list[object], memo: dict[int, object], argument: object) -> None:
    value, key = stack.pop(), stack.pop()
    _dict(stack[-1])[_key(key)] = value


def _set_items(stack: list[object], memo: dict[int, object], argument: object) -> None:
    items = _since_mark(stack)
    target = _dict(stack[-1])
    for key, value in zip(items[::2], items[1::2], strict=True):
        target[_key(key)] = value


def _global(stack: list[object], memo: dict[int, object], argument: object) -> None:
    stack.append(_Global(str(argument)))


def _stack_global(stack: list[object], memo: dict[int, object], argument: object) -> None:
    name, module = stack.pop(), stack.pop()
    stack.append(_Global(f"{_text(module)} {_text(name)}"))


def _persistent(stack: list[object], memo: dict[int, object], argument: object) -> None:
    match stack.pop():
        case ("storage", _Global(name), str(key), str(_), int(elements)):
            module, _, kind = name.rpartition(" ")
            if module not in ("torch", "torch.storage") or kind not in _STORAGES:
                raise Unsound(f"it holds a storage of the unknown kind {name[:80]!r}")
            dtype, itemsize = _STORAGES[kind]
            stack.append(Storage(dtype, itemsize, key, _count(elements)))
        case _:
            raise Unsound("its pickle refers to something that is not a tensor's storage")


def _reduce(stack: list[object], memo: dict[int, object], argument: object) -> None:
    arguments, function = stack.pop(), stack.pop()
    match function, arguments:
        case _Global("collections OrderedDict"), ():
            stack.append({})
        case _Global("torch._utils _rebuild_parameter"), (StoredTensor() as tensor, *_):
            stack.append(tensor)
        case _Global("torch._utils _rebuild_tensor_v2"), (
            Storage() as storage,
            int(offset),
            tuple(shape),
            tuple(stride),
            *_,
        ):
            sizes, steps = tuple(map(_count, shape)), tuple(map(_count, stride))
            if len(sizes) != len(steps) or len(sizes) > MAX_DIMENSIONS:
                raise Unsound(f"a tensor has {len(sizes)} dimensions but {len(steps)} strides")
            stack.append(StoredTensor(storage, _count(offset), sizes, steps))
        case _Global(name), _:
            raise Unsound(
                f"its pickle asks to call {name.replace(' ', '.')[:120]!r} when loaded, which may "
                "run code; only plain tensors are read: ask for a safetensors file"
            )
        case _:
            raise Unsound("its pickle asks to call something that is not a function")


def _build(stack: list[object], memo: dict[int, object], argument: object) -> None:
    # A state dict has its version table as an attribute, which is not needed and is dropped.
    stack.pop()
    _dict(stack[-1])


def _list(value: object) -> list[object]:
    if not isinstance(value, list):
        raise Unsound("its pickle appends to an object that is not a list")
    return value


def _dict(value: object) -> dict[str | int, object]:
    if not isinstance(value, dict):
        raise Unsound("its pickle sets items of an object that is not a dict")
    return value


def _key(value: object) -> str | int:
    # Other types are refused, because hashing a deeply nested tuple would exhaust the C stack.
    if not isinstance(value, str | int):
        raise Unsound(f"its pickle has a dict key of type {type(value).__name__}")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise Unsound("its pickle names a global by an object that is not text")
    return value


def _integer(value: object) -> int:
    if not isinstance(value, int):
        raise Unsound("its pickle uses an object that is not an integer as one")
    return value


def _count(value: object) -> int:
    number = _integer(value)
    if isinstance(value, bool) or not 0 <= number < 2**63:
        raise Unsound(f"a tensor has the size, stride or offset {str(value)[:40]}")
    return number


_STEPS: dict[str, _Step] = {
    "PROTO": _ignore,
    "FRAME": _ignore,
    "MARK": _constant(_Mark),
    "NONE": _constant(lambda: None),
    "NEWTRUE": _constant(lambda: True),
    "NEWFALSE": _constant(lambda: False),
    "EMPTY_DICT": _constant(dict),
    "EMPTY_LIST": _constant(list),
    "EMPTY_TUPLE": _constant(tuple),
    "BININT": _push,
    "BININT1": _push,
    "BININT2": _push,
    "LONG1": _push,
    "BINFLOAT": _push,
    "BINUNICODE": _push,
    "SHORT_BINUNICODE": _push,
    "BINPUT": _put,
    "LONG_BINPUT": _put,
    "MEMOIZE": _memoize,
    "BINGET": _get,
    "LONG_BINGET": _get,
    "TUPLE": _tuple,
    "TUPLE1": _tuple_of(1),
    "TUPLE2": _tuple_of(2),
    "TUPLE3": _tuple_of(3),
    "APPEND": _append,
    "APPENDS": _appends,
    "SETITEM": _set_item,
    "SETITEMS": _set_items,
    "GLOBAL": _global,
    "STACK_GLOBAL": _stack_global,
    "BINPERSID": _persistent,
    "REDUCE": _reduce,
    "BUILD": _build,
}
