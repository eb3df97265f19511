"""What a .pte consists of: delegates, operators outside of them, weights and segments."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from exporters.damaged_files import one_sentence
from exporters.executorch.flatbuffer import Record
from exporters.executorch.reader import Pte
from exporters.executorch.tensors import FileTensor, file_tensors, graph_tensors
from exporters.structure import Cell, Section, count_elements


def structure_of(pte: Pte) -> tuple[Section, ...]:
    """Tables of every method's delegates and other operators, of the weights and the segments.

    Raises:
        ExportError: the program names data that the file does not hold.
    """
    with one_sentence(pte.file, "an ExecuTorch program"):
        return _delegates(pte), _operators(pte), _weights(file_tensors(pte)), _segments(pte)


def _methods(pte: Pte) -> Iterable[Record]:
    """The methods that compute; the others only return constants."""
    return (plan for plan in pte.program["execution_plan"] if plan["inputs"])


def _delegates(pte: Pte) -> Section:
    """The delegates of every method; equal ones share a row."""
    rows: Counter[tuple[str, str, Cell, str]] = Counter()
    sizes: Counter[tuple[str, str, Cell, str]] = Counter()
    for plan in _methods(pte):
        for delegate in plan["delegates"]:
            index, graph = delegate["processed"]["index"], None
            in_segment = delegate["processed"]["location"]
            if in_segment:
                graph = pte.delegates.get(index)
                size = pte.segments[index][1]
            else:
                size = len(pte.program["backend_delegate_data"][index]["storage"])
            nodes: Cell = "not read"
            weights = "not read"
            if graph is not None:
                nodes = len(graph["xnodes"])
                weights = _counted(tensor.format for tensor in graph_tensors(pte, graph))
            key = plan["name"], delegate["id"], nodes, weights
            rows[key] += 1
            sizes[key] += size
    columns = "method", "backend", "delegates", "operators in each", "weights in each", "bytes"
    found = (
        (method, backend, count, nodes, weights, sizes[method, backend, nodes, weights])
        for (method, backend, nodes, weights), count in rows.items()
    )
    return Section("Delegates", columns, tuple(found))


def _counted(names: Iterable[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in Counter(names).items()) or "none"


def _operators(pte: Pte) -> Section:
    rows: list[tuple[Cell, ...]] = []
    for plan in _methods(pte):
        calls: Counter[str] = Counter()
        for chain in plan["chains"]:
            for row in chain["instructions"]:
                call = row["instr_args"]
                if call.table == "KernelCall":
                    operator = plan["operators"][call["op_index"]]
                    calls[f"{operator['name']}.{operator['overload']}".rstrip(".")] += 1
        rows.extend((plan["name"], name, count) for name, count in sorted(calls.items()))
    return Section("Operators outside delegates", ("method", "operator", "calls"), tuple(rows))


def _weights(tensors: Iterable[FileTensor]) -> Section:
    counts: Counter[tuple[str, str]] = Counter()
    parameters: Counter[tuple[str, str]] = Counter()
    sizes: Counter[tuple[str, str]] = Counter()
    for tensor in tensors:
        key = tensor.reader, tensor.format
        counts[key] += 1
        parameters[key] += count_elements(tensor.shape)
        sizes[key] += tensor.nbytes
    return Section(
        "Weights as the file holds them",
        ("read by", "format", "tensors", "parameters", "bytes"),
        tuple((*key, counts[key], parameters[key], sizes[key]) for key in counts),
    )


def _segments(pte: Pte) -> Section:
    kinds: dict[int, str] = {}
    constants = pte.program["constant_segment"]
    if constants is not None and constants["offsets"]:
        kinds[constants["segment_index"]] = "constants of kernels"
    for row in pte.program["named_data"]:
        kinds[row["segment_index"]] = "weights of delegates"
    for plan in pte.program["execution_plan"]:
        for delegate in plan["delegates"]:
            if delegate["processed"]["location"]:
                kinds[delegate["processed"]["index"]] = "programs of delegates"
    rows: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for index, (_, size) in enumerate(pte.segments):
        kind = kinds.get(index, "others")
        rows[kind] += 1
        sizes[kind] += size
    if pte.weights is not None:
        apart = set(pte.weights.named.values())  # several keys may name the same bytes
        kind = f"weights in {pte.weights.file.name}"
        rows[kind], sizes[kind] = len(apart), sum(size for _, size in apart)
    found = tuple((kind, count, sizes[kind]) for kind, count in rows.items())
    return Section("Segments", ("what", "segments", "bytes"), found)
