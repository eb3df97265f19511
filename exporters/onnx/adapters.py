"""Graphs that take adapters as inputs, and files of onnxruntime's adapter format."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from exporters.adapter_pair import no_product
from exporters.errors import ExportError
from exporters.onnx.model_file import load_graph
from exporters.replaced import replace_file

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

    from exporters.adapter_pair import Pair

SUFFIX: Final = ".onnx_adapter"
# The first version of onnxruntime's format; the model's own is not told apart.
_VERSION: Final = 1


@dataclass(frozen=True)
class _Product:
    """A product with a weight in a graph.

    Attributes:
        weight: the weight's name.
        source: the name of ``x``.
        node: the node whose first output is the whole product.
        shape: ``(in, out)``.
    """

    weight: str
    source: str
    node: NodeProto
    shape: tuple[int, int]


def input_names(weight: str) -> tuple[str, str]:
    """Returns the names of the inputs of a weight's two factors.

    >>> input_names("model.layers.0.mlp.down_proj.weight")
    ('model.layers.0.mlp.down_proj.lora_A', 'model.layers.0.mlp.down_proj.lora_B')
    """
    module = weight.removesuffix(".weight")
    return f"{module}.lora_A", f"{module}.lora_B"


def write_onnx_adapter(
    folder: Path, name: str, pairs: Mapping[str, Pair], weights: Collection[str]
) -> str:
    """Writes ``NAME.onnx_adapter``; see `exporters.adapters.write_adapter`."""
    import onnxruntime

    from exporters.onnx.target import graphs_of

    for path in graphs_of(folder):
        model = load_graph(path)
        if not any(given.name.endswith(".lora_A") for given in model.graph.input):
            add_inputs(model, weights)
            _replace(path, model)
        places = {given.name for given in model.graph.input}
        for weight in pairs:
            if input_names(weight)[0] not in places:
                raise no_product(path.name, weight)
    parameters = {
        place: onnxruntime.OrtValue.ortvalue_from_numpy(values)
        for weight, pair in pairs.items()
        for place, values in zip(input_names(weight), pair, strict=True)
    }
    form = onnxruntime.AdapterFormat()
    form.set_adapter_version(_VERSION)
    form.set_model_version(_VERSION)
    form.set_parameters(parameters)
    form.export_adapter(str(folder / f"{name}{SUFFIX}"))
    return f"{name}{SUFFIX}"


def add_inputs(model: ModelProto, weights: Collection[str]) -> None:
    """Adds two inputs to each product with one of the weights, which are empty by default.

    Given::

        %y = MatMulNBits(%x, codes, scale)

    Result, where the initializers ``A[in, 0]`` and ``B[0, out]`` are the inputs' defaults::

        %y_base = MatMulNBits(%x, codes, scale)
        %y = Add(%y_base, MatMul(MatMul(%x, A), B))
    """
    from onnx import TensorProto, helper

    products = {each.node.output[0]: each for each in _products(model) if each.weight in weights}
    nodes = []
    for node in list(model.graph.node):
        nodes.append(node)
        found = products.get(node.output[0])
        if found is None:
            continue
        whole = node.output[0]
        node.output[0] = f"{whole}_base"
        node.name = f"{node.op_type}:{node.output[0]}"  # the new sum takes the old name
        names, (rows, columns) = input_names(found.weight), found.shape
        rank = f"{names[0]}_rank"
        for name, kept, dims in (
            (names[0], [rows, rank], [rows, 0]),
            (names[1], [rank, columns], [0, columns]),
        ):
            model.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, kept))
            empty = helper.make_tensor(name, TensorProto.FLOAT, dims, b"", raw=True)
            model.graph.initializer.append(empty)
        low, change = f"{whole}_low", f"{whole}_change"
        for op, operands, result in (
            ("MatMul", [found.source, names[0]], low),
            ("MatMul", [low, names[1]], change),
            ("Add", [node.output[0], change], whole),
        ):
            nodes.append(helper.make_node(op, operands, [result], name=f"{op}:{result}"))
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _products(model: ModelProto) -> Iterator[_Product]:
    """The products with weights, as `exporters.onnx.quantized` emits them."""
    made = {name: node for node in model.graph.node for name in node.output}
    stored = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    for node in model.graph.node:
        attributes = {each.name: each.i for each in node.attribute}
        if node.op_type == "FusedMatMul" and attributes.get("transB") == 1:
            weight = node.input[1]
            shape = stored.get(weight) or stored.get(f"{weight}.stored")
            if shape is not None and len(shape) == 2:
                yield _Product(weight, node.input[0], node, (shape[1], shape[0]))
            continue
        whole, source = node, node.input[0] if node.input else ""
        if node.op_type == "Add" and source.endswith("_rounded"):
            # Some columns are multiplied apart: `x` is what the others were masked in.
            node = made.get(source, node)
            mask = made.get(node.input[0])
            source = node.input[0] if mask is None else mask.input[0]
            attributes = {each.name: each.i for each in node.attribute}
        elif node.output[0].endswith("_rounded"):
            continue
        if node.op_type == "MatMulNBits":
            weight = node.input[1].removesuffix(".blocks")
            yield _Product(weight, source, whole, (attributes["K"], attributes["N"]))


def _replace(path: Path, model: ModelProto) -> None:
    """Writes a graph anew beside itself first: its old file may be another artifact's, too."""
    import onnx

    try:
        onnx.checker.check_model(_without_weights(model))
    except onnx.checker.ValidationError as error:
        raise ExportError(f"onnx.checker refuses {path.name}: {error}") from error
    replace_file(path, model.SerializeToString(deterministic=True))


def _without_weights(model: ModelProto) -> ModelProto:
    """A graph for onnx.checker, with what lies in the weight file as inputs.

    The checker refuses a weight file of two names, and the old artifact's is the new one's, too.
    """
    import onnx
    from onnx import helper

    light = onnx.ModelProto()
    light.CopyFrom(model)
    for tensor in list(light.graph.initializer):
        if tensor.external_data:
            dims, kind = list(tensor.dims), tensor.data_type
            light.graph.input.append(helper.make_tensor_value_info(tensor.name, kind, dims))
            light.graph.initializer.remove(tensor)
    return light
