"""Traces a module once with torch.export, and finds the weights that can be quantized."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch import fx, nn
from torch.export.graph_signature import InputKind

from edgeforge.errors import UsageError
from edgeforge.modules.values import Arguments, Example, named_outputs, read_arguments, unique
from exporters.modules.traced import (
    PREFIX,
    Dims,
    ModuleValue,
    ModuleWeight,
    Role,
    TracedModule,
)
from exporters.vendor_output import quiet

aten = torch.ops.aten
# By operator: the role of the weight that it reads, and the operand that is the weight.
_READERS: Final[Mapping[Any, tuple[Role, int]]] = {
    aten.linear.default: ("linear", 1),
    aten.embedding.default: ("embedding", 0),
    aten.conv1d.default: ("conv", 1),
    aten.conv2d.default: ("conv", 1),
    aten.conv1d.padding: ("conv", 1),
    aten.conv2d.padding: ("conv", 1),
    aten.conv3d.default: ("conv", 1),
}
_ROLES: Final[tuple[Role, ...]] = ("conv", "linear", "embedding")
DynamicShapes = Mapping[str, Any] | Sequence[Any] | None


class _Flat(nn.Module):
    """Takes tensors and returns a tuple of tensors, around a module that takes and returns any."""

    def __init__(self, module: nn.Module, arguments: Arguments) -> None:
        super().__init__()
        self.module = module
        self._arguments = arguments

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Calls the module."""
        outputs = self._arguments.call(self.module, tensors)
        return tuple(tensor for _, tensor in named_outputs(outputs))


def trace(module: object, example: Example, dynamic_shapes: DynamicShapes = None) -> TracedModule:
    """Traces a module in its evaluation mode; its own mode is restored.

    Args:
        module: the module, float32 and on the CPU.
        example: inputs to trace with, as `edgeforge.modules.values.read_arguments` takes them.
        dynamic_shapes: by input, ``{axis: torch.export.Dim}``; None where all sizes are fixed.

    Raises:
        UsageError: the module or its inputs cannot be used, or its forward depends on data.
    """
    if not isinstance(module, nn.Module):
        raise UsageError(f"a {type(module).__name__} is no torch.nn.Module")
    _check_parameters(module)
    arguments = read_arguments(module, example)
    tensors = tuple(arguments.tensors.values())
    dims = _dims_of(arguments, dynamic_shapes)
    with _evaluating(module), torch.no_grad():
        names = _output_names(module, arguments)
        program = _export(_Flat(module, arguments), tensors, dims)
    # What no output needs is not lowered, and its weights are not quantized.
    program.graph.eliminate_dead_code()
    signature = program.graph_signature
    placed = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
    changed = _changed_buffer(program, placed)
    if changed:
        raise UsageError(
            f"the module's forward changes its buffer {changed}, and an artifact keeps nothing "
            f"from call to call: take the value as an input and return the new one"
        )
    inputs = [placed[each] for each in signature.user_inputs if isinstance(each, str)]
    symbols = _symbols(inputs, dims)
    given = tuple(
        _value(name, node.meta["val"], symbols)
        for name, node in zip(unique(list(arguments.tensors), ()), inputs, strict=True)
    )
    taken = [value.name for value in given]
    outputs = tuple(
        _value(name, result.meta["val"], symbols)
        for name, result in zip(
            unique(names, taken), _results(program.graph.output_node()), strict=True
        )
    )
    ranges = {
        dim.__name__: (max(dim.min, 1), None if dim.max > 2**31 else dim.max)
        for axes in dims
        for dim in axes.values()
    }
    weights = _weights(program, placed)
    return TracedModule(program, given, outputs, ranges, weights, tensors, tuple(dims))


def _results(output: fx.Node) -> Sequence[Any]:
    results = output.args[0]
    assert isinstance(results, Sequence)
    return results


def _check_parameters(module: nn.Module) -> None:
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_meta:
            raise UsageError(f"{name} has no values (it is on the meta device): load the weights")
        if tensor.device.type != "cpu":
            raise UsageError(f"{name} is on {tensor.device}: move the module to the CPU")
        if tensor.is_quantized or tensor.layout != torch.strided:
            raise UsageError(f"{name} is not a plain tensor: give the module in float32")
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            word = str(tensor.dtype).removeprefix("torch.")
            raise UsageError(f"{name} is {word}; modules are exported from float32: call .float()")


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Sets a module and all its parts to evaluation, and each back to its own mode afterwards."""
    modes = {each: each.training for each in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for each, mode in modes.items():
            each.training = mode


def _output_names(module: nn.Module, arguments: Arguments) -> list[str]:
    """Runs the module on its example inputs and returns the names of its outputs."""
    try:
        outputs = arguments.call(module, list(arguments.tensors.values()))
    except Exception as error:  # the user's own code may raise anything
        raise UsageError(
            f"the module fails on its example inputs{place_of(error)}: {_first_line(error)}"
        ) from error
    names = [name for name, _ in named_outputs(outputs)]
    if not names:
        raise UsageError("the module returns no tensor")
    return names


def _export(
    module: nn.Module, tensors: tuple[torch.Tensor, ...], dims: Sequence[Mapping[int, Any]]
) -> torch.export.ExportedProgram:
    shapes = (tuple(dict(axes) for axes in dims),)
    try:
        with quiet("torch.export", "this module", "onnx"):
            try:
                return torch.export.export(module, tensors, dynamic_shapes=shapes, strict=False)
            except Exception as error:  # torch.export's errors have no common class
                raise _refusal(error) from error
    except UsageError:
        raise
    except Exception as error:
        if isinstance(error.__cause__, UsageError):
            raise error.__cause__ from error.__cause__.__cause__
        raise


def _refusal(error: Exception) -> UsageError:
    """The message for a module that torch.export does not trace."""
    words, place = str(error), place_of(error)
    if (
        "ata-dependent" in words
        or "data dependent" in words
        or "GuardOnData" in type(error).__name__
    ):
        return UsageError(
            f"the module's forward depends on data{place}, which no trace can hold: write it with "
            f"torch.where or torch.cond, or decide it before the call"
        )
    if "onstraints violated" in words or "specialized" in words:
        reason = next((line for line in words.splitlines() if line.strip().startswith("-")), "")
        return UsageError(
            f"a dynamic dimension cannot be dynamic{place}:{reason or ' ' + _first_line(error)}"
        )
    return UsageError(f"torch.export cannot trace the module{place}: {_first_line(error)}")


def place_of(error: BaseException) -> str:
    """The last line of the user's own code that an error went through: `` at FILE:LINE (`code`)``.

    Lines of packages are shown only where no other line is there.
    """
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not _is_ours(frame.filename) and "/torch/" not in frame.filename.replace("\\", "/")
    ]
    own = [frame for frame in frames if "site-packages" not in frame.filename]
    for frame in reversed(own or frames):
        return f" at {frame.filename}:{frame.lineno} (`{frame.line}`)"
    return ""


def _is_ours(file: str) -> bool:
    root = Path(__file__).parents[1]
    rooms = (root, root.parent / "exporters", root.parent / "quant", root.parent / "device_harness")
    return any(Path(file).is_relative_to(room) for room in rooms)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _dims_of(arguments: Arguments, asked: DynamicShapes) -> list[dict[int, Any]]:
    """The dynamic dimensions of each input, by axis.

    Raises:
        UsageError: an input or an axis does not exist, or something is no `torch.export.Dim`.
    """
    names = list(arguments.tensors)
    if asked is None:
        return [{} for _ in names]
    if not isinstance(asked, Mapping):
        if len(asked) != len(names):
            raise UsageError(
                f"dynamic_shapes has {len(asked)} rows for {len(names)} tensors: {', '.join(names)}"
            )
        asked = dict(zip(names, asked, strict=True))
    strangers = [name for name in asked if name not in names]
    if strangers:
        raise UsageError(
            f"dynamic_shapes names {strangers[0]!r}, which is no input; inputs: {', '.join(names)}"
        )
    return [_axes(name, asked.get(name), arguments.tensors[name]) for name in names]


def _axes(name: str, asked: Any, tensor: torch.Tensor) -> dict[int, Any]:
    rows = dict(enumerate(asked)) if isinstance(asked, list | tuple) else dict(asked or {})
    found = {}
    for axis, dim in rows.items():
        if dim is None:
            continue
        if type(dim) is not torch.export.Dim:
            raise UsageError(
                f"dynamic_shapes gives {dim!r} for axis {axis} of {name}: give a torch.export.Dim, "
                f"or None for a fixed size"
            )
        if not -tensor.dim() <= axis < tensor.dim():
            raise UsageError(f"{name} has {tensor.dim()} axes; dynamic_shapes names axis {axis}")
        found[axis % tensor.dim()] = dim
    return found


def _symbols(inputs: Sequence[fx.Node], dims: Sequence[Mapping[int, Any]]) -> dict[Any, Any]:
    """The names of the dynamic dimensions by torch's symbols."""
    import sympy  # type: ignore[import-untyped]

    found = {}
    for node, axes in zip(inputs, dims, strict=True):
        for axis, dim in axes.items():
            size = node.meta["val"].shape[axis]
            if isinstance(size, torch.SymInt):
                found[size.node.expr] = sympy.Symbol(dim.__name__)
    return found


def _value(name: str, value: torch.Tensor, symbols: Mapping[Any, Any]) -> ModuleValue:
    dims: Dims = tuple(
        str(size.node.expr.subs(symbols)) if isinstance(size, torch.SymInt) else int(size)
        for size in value.shape
    )
    return ModuleValue(name, str(value.dtype).removeprefix("torch."), dims)


def _changed_buffer(program: torch.export.ExportedProgram, placed: Mapping[str, fx.Node]) -> str:
    """The name of a buffer that the module writes to; empty where it writes to none."""
    for name, target in program.graph_signature.inputs_to_buffers.items():
        for user in placed[name].users:
            schema = getattr(user.target, "_schema", None)
            if schema is not None and schema.is_mutable and user.args[0] is placed[name]:
                return str(target).removeprefix(PREFIX)
    return ""


def _weights(
    program: torch.export.ExportedProgram, placed: Mapping[str, fx.Node]
) -> dict[str, ModuleWeight]:
    """The float matrices, tables and kernels that an operator with a quantized form reads."""
    found = {}
    for spec in program.graph_signature.input_specs:
        if spec.kind != InputKind.PARAMETER or spec.target is None:
            continue
        node = placed[spec.arg.name]
        value = node.meta["val"]
        roles = {
            _READERS[user.target][0]
            for user in node.users
            if user.target in _READERS and user.args[_READERS[user.target][1]] is node
        }
        if roles and value.dtype == torch.float32 and value.dim() >= 2:
            name = spec.target.removeprefix(PREFIX)
            role = next(each for each in _ROLES if each in roles)
            found[name] = ModuleWeight(name, role, tuple(value.shape))
    return found
