"""The ExecuTorch target of modules: its own exporter with XNNPACK's partitioner."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from exporters.errors import ExportError
from exporters.modules.target import LoweredModule, ModuleRequest
from exporters.modules.traced import TracedModule, require_largest_sizes, user_line
from quant.formats.formats import IntFormat

if TYPE_CHECKING:
    from torch import fx
    from torch.export import ExportedProgram

    from exporters.modules.integer_program import Parts
    from exporters.modules.traced import ModuleWeight
    from quant.formats.formats import WeightFormat

PROGRAM: Final = "model.pte"
_OWNER: Final = "ExecuTorch's exporter"
_LEAST_SCALE: Final = 1e-9
"""Of what is rounded to 8 bits: images of smaller values become zeros."""
ROUNDED: Final = (
    "products with quantized weights round each row of their inputs to 8 bits, and convolutions "
    "each image or sequence"
)


class ExecutorchModules:
    """Modules as ExecuTorch programs with XNNPACK."""

    name = "executorch"
    tolerance = 0.05

    def write(self, request: ModuleRequest, folder: Path) -> LoweredModule:
        """Lowers the program and writes the .pte."""
        import torch

        from exporters.modules.integer_program import (
            CONVOLUTIONS,
            EMBEDDING,
            LINEAR,
            integer_program,
        )
        from exporters.modules.places import write_places
        from exporters.vendor_output import quiet

        require_largest_sizes(request.traced, "ExecuTorch")
        _refuse_volumes(request.traced)
        floats = _floats(request)
        with quiet(_OWNER, "this module", "executorch"), torch.no_grad():
            import executorch.exir.passes._quant_patterns_and_replacements
            import executorch.kernels.quantized  # noqa: F401

            # ExecuTorch's and torch's own definitions of the `quantized_decomposed` operators.
            from torch.ao.quantization.fx._decomposed import quantized_decomposed_lib  # noqa: F401

            rounded = {operator: _convolution for operator in CONVOLUTIONS}
            readers = {LINEAR: _linear, EMBEDDING: _embedding, **rounded, None: _linear}
            program = integer_program(request, readers, floats)
            notes = _lower(program, folder / PROGRAM)
        taps = {
            name: prod(weight.shape[2:])
            for name, weight in request.traced.weights.items()
            if weight.role == "conv"
        }
        floats = write_places(folder / PROGRAM, folder, request.store, "xnnpack", floats, taps)
        kept = request.store is not None and len(floats) < len(request.store.plan.weights)
        return LoweredModule(PROGRAM, floats, (*((ROUNDED,) if kept else ()), *notes))

    def stored_digests(
        self, folder: Path, entry: str, formats: Mapping[str, WeightFormat]
    ) -> Mapping[str, str]:
        """Digests of the integers and scales that the program holds."""
        from exporters.modules.places import read_digests

        return read_digests(folder)


def _refuse_volumes(traced: TracedModule) -> None:
    """Refuses convolutions over three axes: a program with one is written, and fails when it runs.

    Raises:
        ExportError: shows the line.
    """
    import torch

    aten = torch.ops.aten
    convolutions = aten.conv3d, aten.conv_transpose3d, aten.convolution
    for node in traced.program.graph.nodes:
        packet = getattr(node.target, "overloadpacket", None)
        if packet in convolutions and node.args[1].meta["val"].dim() == 5:
            raise ExportError(
                f"ExecuTorch 1.4 has no kernel for a convolution over three "
                f"axes{user_line(node)}: leave executorch out of the targets"
            )


def _lower(program: ExportedProgram, file: Path) -> tuple[str, ...]:
    """Writes the program with XNNPACK where its partitioner takes the whole of it.

    The partitioner fails for some programs, such as PReLU on sequences that a convolution of
    images gives. Only products with quantized weights go to XNNPACK then, and nothing where there
    are none.

    Returns:
        What a user must know about the operators that XNNPACK does not compute.

    Raises:
        Exception: ExecuTorch's exporter fails for the program without XNNPACK, too.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import (
        XnnpackDynamicallyQuantizedPartitioner,
        XnnpackPartitioner,
    )
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    from exporters.modules.channels_last import layouts_kept
    from exporters.vendor_output import first_words

    def write(*partitioners: object) -> None:
        with layouts_kept():
            edge = to_edge_transform_and_lower(
                program,
                partitioner=list(partitioners),
                compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
            )
        edge.to_executorch().save(str(file))

    try:
        write(XnnpackPartitioner())
    except Exception as error:  # exporters' errors have no common class
        write(XnnpackDynamicallyQuantizedPartitioner())
        return (
            f"XNNPACK's partitioner failed ({first_words(error)}), so that all but products with "
            f"integers run in ExecuTorch's portable kernels, which are slower",
        )
    return ()


def _floats(request: ModuleRequest) -> dict[str, str]:
    """The quantized weights that XNNPACK's kernels cannot hold as integers, with the reason."""
    if request.store is None:
        return {}
    found = {}
    for name, given in request.store.plan.weights.items():
        format, weight = given.format, request.traced.weights[name]
        assert isinstance(format, IntFormat)
        reason = _refusal(weight, format, request)
        if reason:
            found[name] = reason
    return found


def _refusal(weight: ModuleWeight, format: IntFormat, request: ModuleRequest) -> str:
    if weight.role == "conv":
        return _refused_convolution(weight, request)
    if format.bits not in (4, 8):
        return f"XNNPACK has integers of 4 and 8 bits, not {format.name}"
    if format.bits == 8 and format.group_size is not None:
        return "XNNPACK has one scale a row at 8 bits"
    if format.bits == 4 and format.group_size is not None and format.group_size % 32:
        return "XNNPACK's groups are multiples of 32"
    return ""


def _linear(parts: Parts, graph: fx.Graph, user: fx.Node) -> fx.Node:
    """Rounds each row of the inputs to 8 bits, in the operators that XNNPACK's partitioner knows.

    Given::

        %y = aten::linear(%x, %w, %b)

    Result::

        %s, %z = choose_qparams_per_token_asymmetric(%x)
        %r = dequantize_per_token(quantize_per_token(%x, %s, %z), %s, %z)
        %y = aten::linear(%r, dequantize_per_channel(codes, scale), %b)
    """
    import operator

    import torch

    kernels: Any = torch.ops.quantized_decomposed
    source = user.args[0]
    asked = graph.call_function(
        kernels.choose_qparams_per_token_asymmetric.default, (source, torch.int8)
    )
    scale = graph.call_function(operator.getitem, (asked, 0))
    zero = graph.call_function(operator.getitem, (asked, 1))
    bounds = -128, 127, torch.int8
    narrow = graph.call_function(kernels.quantize_per_token.default, (source, scale, zero, *bounds))
    rounded = graph.call_function(
        kernels.dequantize_per_token.default, (narrow, scale, zero, *bounds, torch.float32)
    )
    user.args = (rounded, _matrix(parts, graph), *user.args[2:])
    return rounded


def _refused_convolution(weight: ModuleWeight, request: ModuleRequest) -> str:
    """Why XNNPACK cannot hold the integers of a kernel; empty if it can."""
    from exporters.modules.integer_program import CONVOLUTIONS
    from exporters.modules.traced import PREFIX

    program = request.traced.program
    names = {
        node
        for node, target in program.graph_signature.inputs_to_parameters.items()
        if target.removeprefix(PREFIX) == weight.name
    }
    for node in program.graph.find_nodes(op="placeholder"):
        if node.name in names and any(user.target not in CONVOLUTIONS for user in node.users):
            return "XNNPACK multiplies integers of convolutions of images and sequences alone"
    # Its exporter takes every such convolution for depthwise, one of a single group, too.
    if weight.shape[1] == 1:
        return (
            "XNNPACK's depthwise kernels, which it takes for one input channel a group, multiply "
            "integers only with activations whose range is fixed before they are known"
        )
    return ""


def _of_images(parts: Parts, graph: fx.Graph, user: fx.Node) -> fx.Node:
    """Makes a convolution one of a batch of images, the only ones that the partitioner knows.

    A sequence becomes an image of height 1, what has no batch dimension a batch of one, and a
    padding by name a number; where it adds one more behind than before, zeros are appended.

    Given::

        %y = aten::conv1d(%x, %w, %b, [s], [p], [d], groups)

    Result::

        %c = aten::conv2d(unsqueeze(%x, 2), %w, %b, [1, s], [0, p], [1, d], groups)
        %y = squeeze(%c, 2)
    """
    import torch

    aten: Any = torch.ops.aten
    shape = parts.weight.shape
    axes = len(shape) - 2
    defaults: Any = (None, [1] * axes, [0] * axes, [1] * axes, 1)
    arguments: Any = user.args
    source, kernel, *given = arguments
    settings: Any = (*given, *defaults[len(given) :])
    bias, stride, padding, dilation, groups = settings
    added = [0] if source.meta["val"].ndim < len(shape) else []
    if axes == 1:
        added.append(2)
    for dim in added:
        source = graph.call_function(aten.unsqueeze.default, (source, dim))
    taps = shape[2:]
    if padding == "valid":
        padding = [0] * axes
    elif padding == "same":
        around = [d * (tap - 1) for d, tap in zip(dilation, taps, strict=True)]
        padding = [both // 2 for both in around]
        if any(both % 2 for both in around):
            behind = [size for both in reversed(around) for size in (0, both % 2)]
            source = graph.call_function(aten.constant_pad_nd.default, (source, behind))
    along = [[1, *stride], [0, *padding], [1, *dilation]]
    made = graph.call_function(
        aten.conv2d.default, (source, kernel, bias, *(each[-2:] for each in along), groups)
    )
    last = made
    for dim in reversed(added):
        last = graph.call_function(aten.squeeze.dim, (last, dim))
    last.meta["val"] = user.meta["val"]
    user.replace_all_uses_with(last)
    graph.erase_node(user)
    return made


def _convolution(parts: Parts, graph: fx.Graph, user: fx.Node) -> fx.Node:
    """Rounds each image to 8 bits, in the operators that XNNPACK's partitioner knows.

    They round all images of a batch by one scale; XNNPACK, which computes them, rounds each image
    by its own.

    Given::

        %y = aten::conv2d(%x, %w, %b, ...)

    Result::

        %s, %z = choose_qparams(%x)
        %r = dequantize_per_tensor(quantize_per_tensor(%x, %s, %z), %s, %z)
        %y = aten::conv2d(%r, dequantize_per_channel(codes, scale), %b, ...)
    """
    import operator

    import torch

    kernels: Any = torch.ops.quantized_decomposed
    user = _of_images(parts, graph, user)
    source, bounds = user.args[0], (-128, 127, torch.int8)
    held = parts.scale()
    rows, channels, *taps = parts.weight.shape
    shape = rows, channels, *(1, *taps)[-2:]
    with graph.inserting_before(user):
        asked = graph.call_function(
            kernels.choose_qparams.tensor, (source, -128, 127, _LEAST_SCALE, torch.int8)
        )
        scale = graph.call_function(operator.getitem, (asked, 0))
        zero = graph.call_function(operator.getitem, (asked, 1))
        narrow = graph.call_function(
            kernels.quantize_per_tensor.tensor, (source, scale, zero, *bounds)
        )
        rounded = graph.call_function(
            kernels.dequantize_per_tensor.tensor, (narrow, scale, zero, *bounds)
        )
        kernel = graph.call_function(
            kernels.dequantize_per_channel.default,
            (
                parts.buffer(graph, "kernel", parts.codes().view(shape)),
                parts.buffer(graph, "scale", held[:, 0]),
                parts.buffer(graph, "zero", torch.zeros(len(held), dtype=torch.int64)),
                0,
                *bounds,
            ),
        )
    user.args = (rounded, kernel, *user.args[2:])
    return rounded


def _matrix(parts: Parts, graph: fx.Graph) -> fx.Node:
    import torch

    kernels: Any = torch.ops.quantized_decomposed
    half, scale = parts.format.implicit_zero_point, parts.scale()
    limits = -half, half - 1, torch.int8
    codes = parts.buffer(graph, "codes", parts.codes())
    if parts.format.group_size is None:
        column = parts.buffer(graph, "scale", scale[:, 0])
        zero = parts.buffer(graph, "zero", torch.zeros(len(scale), dtype=torch.int64))
        return graph.call_function(
            kernels.dequantize_per_channel.default, (codes, column, zero, 0, *limits)
        )
    blocks = parts.buffer(graph, "scale", scale)
    zeros = parts.buffer(graph, "zero", torch.zeros(scale.shape, dtype=torch.int32))
    return graph.call_function(
        kernels.dequantize_per_channel_group.default,
        (codes, blocks, zeros, *limits, parts.format.group_size, torch.float32),
    )


def _embedding(parts: Parts, graph: fx.Graph, user: fx.Node) -> fx.Node:
    """Looks rows up in the integers: two codes of 4 bits lie in a byte, the even column high."""
    import torch

    kernels: Any = torch.ops.quantized_decomposed
    half, codes = parts.format.implicit_zero_point, parts.codes()
    look_up = kernels.embedding_byte
    if parts.format.bits == 4:
        look_up = kernels.embedding_4bit
        shifted = (codes + half).to(torch.uint8)
        codes = shifted[:, 0::2] << 4 | shifted[:, 1::2]
    held = [
        parts.buffer(graph, "rows", codes),
        parts.buffer(graph, "row_scale", parts.scale()),
    ]
    made = graph.call_function(
        look_up.dtype,
        (*held, None, -half, half - 1, user.args[1]),
        {"dtype": torch.float32},
    )
    made.meta["val"] = user.meta["val"]
    user.replace_all_uses_with(made)
    graph.erase_node(user)
    return made
