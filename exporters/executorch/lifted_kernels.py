"""What each kernel of a method computes, in the vocabulary of `exporters.lifted`."""

from __future__ import annotations

from typing import Final

import numpy as np

from exporters.executorch.blobs import WIDE
from exporters.executorch.lifted_method import LAST_INDEX, Kernels, Method, recent_name
from exporters.executorch.lifted_mixtures import MIXTURE_KERNELS
from exporters.executorch.lifted_recurrence import RECURRENCE_KERNELS
from exporters.executorch.lifted_routes import Sampled, sampled_kernel, weights_of
from exporters.executorch.lifted_slots import SLOT_KERNELS
from exporters.executorch.lifted_values import (
    Held,
    Joined,
    LastRows,
    Recalled,
    Repeated,
    Table,
    TableRows,
    Updated,
)
from exporters.executorch.method import SCALAR_TYPES
from exporters.executorch.pte_file import HEAD_ROWS, ROW_SCALE, ROWS, WIDE_ROW_SCALE
from exporters.lifted import (
    NO_NEW_ROWS,
    Array,
    Attention,
    Cache,
    Constant,
    Embedding,
    Last,
    Numbers,
    StoredFormat,
    StoredWeight,
    Tokens,
    Unknown,
    Value,
    are_numbers,
    at,
)

_FLOATS: Final = {
    SCALAR_TYPES["float32"][0]: "fp32",
    SCALAR_TYPES["float16"][0]: "fp16",
    SCALAR_TYPES["bfloat16"][0]: "bf16",
}
_ROUND: Final = "rounded to 8 bits"
_EMBEDDING: Final = "quantized_decomposed::embedding_"


def _count(method: Method, kernel: str, arguments: list[int]) -> bool:
    value, axis, result = method.value(arguments[0]), *arguments[1:3]
    if not isinstance(value, Tokens | Last) or method.constants(axis) != (1,):
        return False
    most = value.positions if isinstance(value, Last) else method.limit
    counts = tuple(np.asarray(min(probe.count, most)) for probe in method.probes)
    method.values[result] = Numbers("tokens of a call", counts)
    return True


def _slice(method: Method, kernel: str, arguments: list[int]) -> bool:
    source, result = method.value(arguments[0]), arguments[-1]
    bounds = tuple(method.value(index) for index in arguments[1:5])
    along = method.constants(arguments[1], arguments[4])
    if not are_numbers(bounds) or along is None:
        return False
    name, steps = f"{method.name}, value {result}", range(len(method.probes))
    axis, step = along
    spans = [(int(at(bounds[1], i)), int(at(bounds[2], i))) for i in steps]
    if isinstance(source, Updated) and (axis, step) == (1, 1):
        first = tuple(span[0] for span in spans)
        tokens = tuple(end - start for start, end in spans)
        method.values[result] = Updated(name, source.old, source.new, source.rows, first, tokens)
        return True
    if isinstance(source, Constant) and source.name.startswith("rope_"):
        if (axis, step) != (0, 1):
            return False
        rows = tuple(tuple(range(*span)) for span in spans)
        method.values[result] = TableRows(name, source.array, rows)
        return True
    if isinstance(source, Numbers) and (axis, step) == (0, 1) and spans[0][0] < 0:
        if set(spans) != {(spans[0][0], LAST_INDEX)}:
            return False
        arrays = tuple(array[spans[0][0] :] for array in source.arrays)
        method.values[result] = LastRows(name, arrays, source, -spans[0][0])
        return True
    if isinstance(source, Constant | Numbers):
        return False
    if isinstance(source, Joined):
        # The state that `Joined.written` names takes its rows.
        own = method.recents.get(arguments[0])
        return own is not None and own[1] == source.before.tokens
    if (axis, step) == (1, 1) and spans[0][0] < 0 and set(spans) == {(spans[0][0], LAST_INDEX)}:
        method.values[result] = Last(name, weights_of(method, arguments[0]), -spans[0][0])
        return True
    return False


def _lookup(method: Method, kernel: str, arguments: list[int]) -> bool:
    """Rows of an integer table."""
    codes, scale, tokens = (method.value(arguments[index]) for index in (0, 1, 5))
    if not (isinstance(codes, Table) and isinstance(scale, Table) and isinstance(tokens, Tokens)):
        return False
    name, _, part = codes.key.partition(" ")
    scale_of, _, scale_part = scale.key.partition(" ")
    if scale_of != name or scale_part not in (ROW_SCALE, WIDE_ROW_SCALE):
        return False
    bits = 4 if kernel.endswith("4bit") else 8
    groups = scale.shape[1] if len(scale.shape) > 1 else 1
    weight = StoredWeight(name, StoredFormat("int", bits, groups))
    found: Value = Embedding(f"{method.name}, value {arguments[-1]}", weight)
    if part == HEAD_ROWS and bits == 4:
        found = Unknown(found.name, "exchanged pairs", (found,))
    elif part not in (ROWS, HEAD_ROWS):
        return False
    method.values[arguments[-1]] = found
    return True


def _rows(method: Method, kernel: str, arguments: list[int]) -> bool:
    """Rows of a float table."""
    table, tokens = method.value(arguments[0]), method.value(arguments[1])
    if not isinstance(table, Table) or not isinstance(tokens, Tokens):
        return False
    name, _, part = table.key.partition(" ")
    kind = "bf16" if part == WIDE else _FLOATS.get(table.scalar_type, "")
    weight = StoredWeight(name, StoredFormat(kind))
    method.values[arguments[-1]] = Embedding(f"{method.name}, value {arguments[-1]}", weight)
    return True


def _update(method: Method, kernel: str, arguments: list[int]) -> bool:
    new, cache, start = (method.value(index) for index in arguments[:3])
    if not isinstance(start, Numbers):
        return False
    old = cache.old if isinstance(cache, Updated) else cache
    if not isinstance(old, Held):
        return False
    starts = [int(array) for array in start.arrays]
    rows = tuple(
        tuple(range(first, first + probe.count))
        for first, probe in zip(starts, method.probes, strict=True)
    )
    # The rounded parts of int8 keys or values are three tensors with three caches.
    source = new.operands[0] if isinstance(new, Unknown) and new.kind == _ROUND else new
    none = tuple(0 for _ in method.probes)
    ends = tuple(row[-1] + 1 for row in rows)
    method.values[arguments[1]] = Updated(old.name, old, source, rows, none, ends)
    return True


def _attention(method: Method, kernel: str, arguments: list[int]) -> bool:
    name = f"{method.name}, value {arguments[-1]}"
    query, keys, values, start, mask, _, _, scale = (method.value(index) for index in arguments[:8])
    if isinstance(query, Unknown) and query.kind == _ROUND:
        query = query.operands[0]
    if not (isinstance(keys, Updated) and isinstance(values, Updated)):
        method.values[arguments[-1]] = Unknown(name, NO_NEW_ROWS, (query, keys, values))
        return True
    causal = method.constants(arguments[6])
    if not (isinstance(start, Numbers) and isinstance(scale, Constant)) or causal is None:
        return False
    # Where keys and values are slices of their caches, both must begin at the same token.
    if keys.first != values.first:
        return False
    visible = _visible(method, keys, start, mask, *causal)
    if visible is None:
        return False
    of_query, of_key = method.sizes(arguments[0]), method.sizes(arguments[1])
    if len(of_query) != 4 or len(of_key) != 4:
        return False
    heads = of_query[2], of_key[2], of_query[3]
    caches = [
        Cache(each.old.name, each.old.name, each.old.length, each.rows) for each in (keys, values)
    ]
    method.values[arguments[-1]] = Attention(
        name,
        query,
        keys.new,
        values.new,
        heads,
        float(scale.array),
        caches[0],
        caches[1],
        visible,
    )
    return True


def _visible(
    method: Method, keys: Updated, start: Numbers, mask: Value, causal: bool
) -> tuple[Array, ...] | None:
    """Which tokens of the whole cache each new token sees, for each probe."""
    key = id(start), id(mask), int(causal), *keys.first
    if key in method.seen:
        return method.seen[key]
    found = []
    for i, probe in enumerate(method.probes):
        first, own = keys.first[i], int(at(start, i))
        seen = np.zeros((probe.count, probe.start + probe.count), bool)
        width = max(0, seen.shape[1] - first)
        places = np.arange(width)[None]
        if isinstance(mask, Numbers):
            shown = at(mask, i) > -1.0
            if causal or shown.shape[0] != probe.count or shown.shape[1] < width:
                return None
            seen[:, first:] = shown[:, :width]
        elif causal:
            seen[:, first:] = places <= own + np.arange(probe.count)[:, None]
        else:
            seen[:, first:] = True
        found.append(seen)
    method.seen[key] = tuple(found)
    return method.seen[key]


def _choose(method: Method, kernel: str, arguments: list[int]) -> bool:
    """The steps and zero points of int8 caches: part of the rounding of a value."""
    source, scale, zero_point = (arguments[index] for index in (0, 2, 3))
    for result in (scale, zero_point):
        name = f"{method.name}, value {result}"
        method.values[result] = Unknown(name, _ROUND, (method.value(source),))
    return True


def _quantize(method: Method, kernel: str, arguments: list[int]) -> bool:
    name, source = f"{method.name}, value {arguments[-1]}", method.value(arguments[0])
    scale = method.value(arguments[1])
    if not (isinstance(scale, Unknown) and scale.kind == _ROUND and scale.operands[0] is source):
        return False
    method.values[arguments[-1]] = Unknown(name, _ROUND, (source,))
    return True


def _dequantize(method: Method, kernel: str, arguments: list[int]) -> bool:
    """The tokens of an int8 cache as floats: those of its codes, with their own grid."""
    parts = [method.value(index) for index in arguments[:3]]
    codes = parts[0]
    for part in parts:
        if not (isinstance(part, Updated) and isinstance(codes, Updated)):
            return False
        if (part.new, part.rows, part.first) != (codes.new, codes.rows, codes.first):
            return False
    method.values[arguments[-1]] = codes
    return True


def _copy(method: Method, kernel: str, arguments: list[int]) -> bool:
    method.values[arguments[-1]] = method.value(arguments[0])
    return True


def _recall(method: Method, kernel: str, arguments: list[int]) -> bool:
    """The tokens of a state, or zeros: ``where(begun, state, 0)``.

    A ``where`` may also be a step of a choice of experts.
    """
    begun, nothing = method.value(arguments[0]), method.value(arguments[2])
    if isinstance(begun, Sampled):
        return sampled_kernel(method, kernel, arguments)
    if not (isinstance(begun, Numbers) and isinstance(nothing, Constant)):
        return False
    if not method.is_state(arguments[1]) or arguments[1] in method.values or nothing.array.any():
        return False
    ignored = tuple(not bool(array.all()) for array in begun.arrays)
    name = f"{method.name}, value {arguments[-1]}"
    tokens = method.sizes(arguments[1])[1]
    state = recent_name(method, arguments[1])
    method.values[arguments[-1]] = Recalled(name, state, ignored, tokens)
    return True


def _repeat(method: Method, kernel: str, arguments: list[int]) -> bool:
    """A mask several times, one below the other."""
    record, axis = method.records[arguments[0]], method.constants(arguments[1])
    if record.table != "TensorList" or axis != (0,):
        return False
    items = list(record["items"])
    mask = method.value(items[0])
    if not isinstance(mask, Numbers) or len(set(items)) != 1:
        return False
    arrays = tuple(np.concatenate([array] * len(items)) for array in mask.arrays)
    name = f"{method.name}, value {arguments[-1]}"
    method.values[arguments[-1]] = Repeated(name, arrays, mask, len(items))
    return True


KERNELS: Final[Kernels] = {
    **MIXTURE_KERNELS,
    **RECURRENCE_KERNELS,
    **SLOT_KERNELS,
    "aten::sym_size": _count,
    "aten::slice_copy": _slice,
    "aten::embedding": _rows,
    f"{_EMBEDDING}4bit": _lookup,
    f"{_EMBEDDING}byte": _lookup,
    "llama::update_cache": _update,
    "llama::custom_sdpa": _attention,
    "llama::custom_quantized_sdpa": _attention,
    "quantized_decomposed::choose_qparams_per_token_asymmetric": _choose,
    "quantized_decomposed::quantize_per_token": _quantize,
    "quantized_decomposed::dequantize_per_token": _dequantize,
    "aten::_to_copy": _copy,
    "aten::where": _recall,
    "aten::cat": _repeat,
}
