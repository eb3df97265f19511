"""Methods of a program that run it with an adapter, over the same weights.

Each method is written once more for each adapter, as ``forward_NAME`` and so on. Its delegates name
the base's weights, which the file holds once, and the adapter's factors, which are appended to the
.pte. The base's own methods stay as they are.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from exporters.adapter_entries import require_free, with_adapter
from exporters.adapter_pair import no_product
from exporters.damaged_files import one_sentence
from exporters.errors import ExportError
from exporters.executorch.backends import XNNPACK
from exporters.executorch.flatbuffer import Record
from exporters.executorch.method import BACKEND
from exporters.executorch.pte_file import is_weight, rewrite
from exporters.executorch.reader import Pte, read_pte
from exporters.executorch.xnnpack_graph import (
    QDINT8,
    encode_graph,
    named_constant,
    tensor_record,
)

if TYPE_CHECKING:
    from exporters.adapter_pair import Pair

MODEL: Final = "model.pte"
METHODS: Final = ("forward", "draft", "logits_all")
# How keys begin of the values of columns that are multiplied apart, and of the mask of the others.
_OF_COLUMNS: Final = "float values of "
_OTHER_COLUMNS: Final = "other columns of "
_NO_BIAS: Final = 0xFFFFFFFF


def factor_key(adapter: str, factor: str, weight: str) -> str:
    """The key under which a program holds an adapter's factor of a weight.

    >>> factor_key("style", "A", "lm_head.weight")
    'adapter style: lora_A of lm_head.weight'
    """
    return f"adapter {adapter}: lora_{factor} of {weight}"


def check_options(options: Mapping[str, object]) -> None:
    """Refuses options of an artifact that takes no adapters.

    Raises:
        ExportError: another exporter writes it.
    """
    if options.get("lowering") == "stock" or options.get("backend") not in (None, XNNPACK):
        raise ExportError(
            "--adapter-mode separate is not written for programs of ExecuTorch's own exporter: "
            "leave out --lowering stock and --backend, or leave --adapter-mode out, and the "
            "adapter is merged into the weights"
        )


def write_executorch_adapter(folder: Path, name: str, pairs: Mapping[str, Pair]) -> str:
    """Adds the methods of an adapter; see `exporters.adapters.write_adapter`."""
    file = folder / MODEL
    pte = read_pte(file)
    with one_sentence(file, "an ExecuTorch program"):
        plans = list(pte.program["execution_plan"])
        base = [plan for plan in plans if plan["name"] in METHODS]
        taken = {str(plan["name"]) for plan in plans}
        require_free([str(plan["name"]) for plan in base], name, taken, MODEL)
        added = _Added(pte, name, pairs)
        plans += [added.method(plan) for plan in base]
        fields = {
            **pte.program.fields,
            "execution_plan": plans,
            "named_data": [*pte.program["named_data"], *added.named()],
        }
        beside = file.with_name(f".{file.name}.partial")
        rewrite(file, replace(pte.program, fields=fields), added.blobs, beside)
    os.replace(beside, file)  # the old file may be another artifact's, too
    return MODEL


class _Added:
    """What an adapter adds to a program.

    Args:
        pte: the program.
        adapter: the adapter's name.
        pairs: what it adds, by the weight's name.

    Attributes:
        blobs: the new segments, behind those that are there.
    """

    def __init__(self, pte: Pte, adapter: str, pairs: Mapping[str, Pair]) -> None:
        self._pte, self._adapter, self._pairs = pte, adapter, pairs
        self.blobs: list[bytes] = []
        self._segments: dict[int, int] = {}  # of changed delegates, by the base's segment
        self._keys: dict[str, int] = {}
        self._found: dict[int, set[str]] = {}

    def named(self) -> list[Record]:
        """The records of the factors' keys."""
        return [
            Record("NamedData", {"key": key, "segment_index": segment})
            for key, segment in self._keys.items()
        ]

    def method(self, plan: Record) -> Record:
        """A method that does what another does, with the adapter.

        Raises:
            ExportError: it has no product with a weight that the adapter changes.
        """
        delegates, found = [], set[str]()
        for delegate in plan["delegates"]:
            place = delegate["processed"]
            if delegate["id"] == BACKEND:
                index = self._delegate(place["index"])
                found |= self._found[place["index"]]
                place = replace(place, fields={**place.fields, "index": index})
            fields = {**delegate.fields, "processed": place}
            delegates.append(replace(delegate, fields=fields))
        missing = self._pairs.keys() - found
        if missing:
            raise no_product(f"{MODEL}'s method {plan['name']}", min(missing))
        name = with_adapter(str(plan["name"]), self._adapter)
        return replace(plan, fields={**plan.fields, "name": name, "delegates": delegates})

    def _delegate(self, segment: int) -> int:
        """The segment of a delegate with the adapter; the base's own where nothing changes."""
        if segment not in self._segments:
            graph, found = self._graph(self._pte.delegates[segment])
            self._found[segment] = found
            self._segments[segment] = self._append(encode_graph(graph)) if found else segment
        return self._segments[segment]

    def _append(self, data: bytes) -> int:
        self.blobs.append(data)
        return len(self._pte.segments) + len(self.blobs) - 1

    def _graph(self, graph: Record) -> tuple[Record, set[str]]:
        """A delegate's graph with the adapter, and the weights whose products it changes.

        Given::

            y = fully_connected(x, W, b)

        Result, where ``A[rank, in]`` and ``B[out, rank]`` are constants::

            y_base = fully_connected(x, W, b)
            y_low = fully_connected(x, A)
            y_change = fully_connected(y_low, B)
            y = add(y_base, y_change)
        """
        products = {
            number: product
            for number, product in _products(graph).items()
            if product.weight in self._pairs
        }
        values, data = list(graph["xvalues"]), list(graph["constant_data"])
        dims = {_tensor(row)["id_out"]: list(_tensor(row)["dims"]) for row in values}
        nodes: list[Record] = []

        def value(shape: list[int], constant: int = 0) -> int:
            number = len(values)
            values.append(tensor_record(number, shape, constant))
            return number

        def factor(name: str, weight: str, array: Any) -> int:
            key, array = factor_key(self._adapter, name, weight), np.ascontiguousarray(array)
            if key not in self._keys:
                self._keys[key] = self._append(array.astype(np.float32).tobytes())
            data.append(named_constant(key, 4 * array.size))
            return value(list(array.shape), len(data) - 1)

        for row in graph["xnodes"]:
            node = row["xnode_union"]
            whole = node["output_id"]
            product = products.get(whole)
            if product is None:
                nodes.append(row)
                continue
            assert product.source is not None
            down, up = self._pairs[product.weight]
            base = value(dims[whole])
            low = value([*dims[product.source][:-1], down.shape[1]])
            change = value(dims[whole])
            nodes.append(_with(row, xnode_union=_with(node, output_id=base)))
            nodes.append(_multiplied(product.source, factor("A", product.weight, down.T), low))
            nodes.append(_multiplied(low, factor("B", product.weight, up.T), change))
            added = {"input1_id": base, "input2_id": change, "output_id": whole, "flags": 0}
            nodes.append(_node(Record("XNNAdd", added)))
        changed = _with(graph, xnodes=nodes, xvalues=values, constant_data=data)
        return changed, {product.weight for product in products.values()}


@dataclass(frozen=True)
class _Product:
    """A product with a weight, or with some of its columns, in a delegate.

    Attributes:
        weight: the weight's name.
        source: the number of ``x``; None where only some columns of it are multiplied.
    """

    weight: str
    source: int | None


def _products(graph: Record) -> dict[int, _Product]:
    """The products with weights, by the number of the whole product.

    A product may consist of several, as `exporters.executorch.xnnpack_graph` emits them: with each
    group of columns, or with columns that stay float32 apart.
    """
    keys: dict[int, str] = {}
    rounded: set[int] = set()
    for row in graph["xvalues"]:
        tensor = _tensor(row)
        if tensor["constant_buffer_idx"]:
            entry = graph["constant_data"][tensor["constant_buffer_idx"]]
            keys[tensor["id_out"]] = str(entry["named_key"])
        if tensor["datatype"] == QDINT8:
            rounded.add(tensor["id_out"])
    made: dict[int, Record] = {}
    found: dict[int, _Product] = {}
    for row in graph["xnodes"]:
        node = row["xnode_union"]
        result = node["output_id"]
        made[result] = node
        if node.table == "XNNConvert" and node["input_id"] in keys:
            keys[result] = keys[node["input_id"]]
        elif node.table == "XNNFullyConnected":
            weight, _, part = keys.get(node["filter_id"], "").partition(" ")
            if keys.get(node["filter_id"], "").startswith(_OF_COLUMNS):
                weight = keys[node["filter_id"]].removeprefix(_OF_COLUMNS)
                found[result] = _Product(weight, None)
            elif is_weight(weight):
                source = node["input1_id"]
                if source in rounded:
                    source = made[source]["input_id"]
                if part.startswith("codes "):  # of one group of columns
                    source = made[source]["input_id"]
                found[result] = _Product(weight, _unmasked(made, keys, source))
        elif node.table == "XNNAdd":
            pair = node["input1_id"], node["input2_id"]
            terms = [found[number] for number in pair if number in found]
            if len(terms) == 2 and terms[0].weight == terms[1].weight:
                found[result] = terms[0] if terms[1].source is None else terms[1]
                del found[pair[0]], found[pair[1]]
    return {number: product for number, product in found.items() if product.source is not None}


def _unmasked(made: Mapping[int, Record], keys: Mapping[int, str], number: int) -> int:
    """The number of the activations of which some columns are masked out, if they are."""
    node = made.get(number)
    if node is None or node.table != "XNNMultiply":
        return number
    masked = keys.get(node["input2_id"], "").startswith(_OTHER_COLUMNS)
    return int(node["input1_id"]) if masked else number


def _tensor(row: Record) -> Record:
    union: Record = row["xvalue_union"]
    if union.table == "XNNQuantizedTensorValue":
        inner: Record = union["tensor_value"]
        return inner
    return union


def _with(record: Record, **fields: object) -> Record:
    return replace(record, fields={**record.fields, **fields})


def _multiplied(source: int, filter: int, result: int) -> Record:
    """A node that multiplies by a constant."""
    fields = {"input1_id": source, "filter_id": filter, "bias_id": _NO_BIAS, "output_id": result}
    return _node(Record("XNNFullyConnected", {**fields, "flags": 0}))


def _node(union: Record) -> Record:
    return Record("XNode", {"xnode_union": union, "debug_handle": 0})
