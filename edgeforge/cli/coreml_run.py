"""``edgeforge coreml-run``: describes, runs and compares any Core ML package."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgeforge.arrays_file import Arrays, read_arrays
from edgeforge.errors import CheckFailed, UsageError
from edgeforge.output_folder.inputs import Input, refuse_inputs
from edgeforge.output_folder.whole_file import whole_file
from exporters.coreml.package import Feature, Package, open_package
from exporters.coreml.structure import weight_formats

if TYPE_CHECKING:
    from device_harness.coreml_interpreter.values import Precision


@dataclass(frozen=True)
class RunRequest:
    """What a user asks for.

    Attributes:
        package: an ``.mlpackage`` folder or an ``.mlmodel`` file.
        inputs: one ``.npz`` file per call, in order; without any, the package is only described.
        outputs: ``.npz`` files to write the outputs to: one per call, or one for the last call.
        functions: functions to call: one per call, or one for all calls; the package's default
            function when none is given.
        precision: ``fp16`` or ``fp32``.
        compare: an ``.npz`` file with which the last call's outputs are compared.
        tolerance: largest difference that passes, relative to the range of the values.
        iterations: largest number of iterations of all loops of a call; None for the interpreter's
            default.
        threads: number of PyTorch's threads; None leaves it as it is.
    """

    package: Path
    inputs: tuple[Path, ...] = ()
    outputs: tuple[Path, ...] = ()
    functions: tuple[str, ...] = ()
    precision: str = "fp16"
    compare: Path | None = None
    tolerance: float | None = None
    iterations: int | None = None
    threads: int | None = None


@dataclass(frozen=True)
class Difference:
    """How far an output is from the one with which it is compared.

    Attributes:
        name: the output's name.
        largest: the largest absolute difference of an element.
        relative: ``largest`` divided by the range of the other output's elements.
        rms: root of the mean squared difference.
        same_argmax: share of rows (along the last dimension) whose largest element is at the same
            place in both.
    """

    name: str
    largest: float
    relative: float
    rms: float
    same_argmax: float


def describe(package: Package) -> dict[str, Any]:
    """Returns functions, inputs, outputs, states, operations and weight formats, as for JSON."""
    from device_harness.coreml_interpreter.registry import OPS

    functions: dict[str, Any] = {}
    for name in package.functions:
        interface = package.interface(name)
        counts = Counter(str(operation.type) for operation in package.operations(name))
        functions[name] = {
            "default": interface.default,
            "inputs": {feature.name: _told(feature) for feature in interface.inputs},
            "outputs": {feature.name: _told(feature) for feature in interface.outputs},
            "states": {feature.name: _told(feature) for feature in interface.states},
            "operations": dict(counts.most_common()),
            "unknown_operations": sorted(kind for kind in counts if kind not in {*OPS, "const"}),
            "weights": {
                kind: tensors for kind, (tensors, _) in weight_formats(package, name).items()
            },
        }
    return {
        "package": str(package.path),
        "specification": int(package.spec.specificationVersion),
        "metadata": package.metadata,
        "functions": functions,
    }


def description_lines(described: Mapping[str, Any]) -> list[str]:
    """Returns what `describe` returns as lines of text for people."""
    lines = [f"{described['package']}: specification {described['specification']}"]
    lines += [f"{name}: {value}" for name, value in described["metadata"].items()]
    for name, function in described["functions"].items():
        lines.append("")
        lines.append(f"function {name}{' (default)' if function['default'] else ''}")
        for kind in ("inputs", "outputs", "states"):
            for feature, text in function[kind].items():
                lines.append(f"  {kind[:-1]:<6}  {feature}: {text}")
        for kind in ("weights", "operations"):
            counted = ", ".join(f"{count} {what}" for what, count in function[kind].items())
            lines.append(f"  {kind}: {counted or 'none'}")
        if function["unknown_operations"]:
            unknown = ", ".join(function["unknown_operations"])
            lines.append(f"  the interpreter does not know: {unknown}")
    return lines


def run(request: RunRequest, package: Package) -> Arrays:
    """Makes the calls one after the other, with the same states, and writes their outputs.

    Returns:
        The outputs of the last call.

    Raises:
        UsageError: a file is missing, the numbers of files and functions do not fit, or an output
            would replace what is read.
        DeviceError: an input does not fit, or an operation fails.
    """
    import torch

    from device_harness.coreml_interpreter.interpreter import Interpreter
    from device_harness.coreml_interpreter.limits import Limits

    _check_outputs(request)
    calls = _calls(request)
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    limits = Limits() if request.iterations is None else Limits(iterations=request.iterations)
    interpreter = Interpreter(package, _precision(request.precision), limits=limits)
    states: dict[str, Any] = {}
    found: Arrays = {}
    for inputs, outputs, function in calls:
        for name, state in interpreter.make_states(function).items():
            states.setdefault(name, state)
        found = interpreter.run(read_arrays(inputs), function, states)
        if outputs is not None:
            _write(outputs, found)
    return found


def differences(found: Arrays, other: Path) -> list[Difference]:
    """Compares outputs with those of a file, for all names that both have.

    Raises:
        UsageError: they share no name, or an output has another shape in the file.
    """
    wanted = read_arrays(other)
    shared = [name for name in found if name in wanted]
    if not shared:
        raise UsageError(
            f"{other} has none of the outputs {', '.join(found)}; it has {', '.join(wanted)}"
        )
    return [_difference(name, found[name], wanted[name], other) for name in shared]


def require_close(found: Sequence[Difference], tolerance: float | None) -> None:
    """Refuses outputs that differ by more than the tolerance.

    Raises:
        CheckFailed: the message names the output that differs most.
    """
    if tolerance is None:
        return
    worst = max(found, key=lambda each: -1.0 if each.relative <= tolerance else each.relative)
    if not worst.relative <= tolerance:  # written so that NaN fails too
        raise CheckFailed(
            f"the output {worst.name!r} differs by {worst.relative:.3g} of the range of its "
            f"values; {tolerance:g} is allowed"
        )


def summary(found: Arrays) -> dict[str, dict[str, object]]:
    """Returns dtype, shape and range of each output, and how many of its values are not finite."""
    return {
        name: {
            "dtype": str(value.dtype),
            "shape": list(value.shape),
            "least": float(value.min()) if value.size else None,
            "largest": float(value.max()) if value.size else None,
            "not_finite": int((~np.isfinite(value)).sum()),
        }
        for name, value in found.items()
    }


def report(request: RunRequest) -> tuple[dict[str, Any], list[str], list[Difference]]:
    """Describes the package, or runs it and compares its outputs, as a request says.

    Returns:
        The result as for JSON, its lines for people, and the differences if they were asked for.

    Raises:
        UsageError: the request's files are missing or do not fit.
        ExportError: the package cannot be read.
        DeviceError: an input does not fit, or an operation fails.
    """
    package = open_package(request.package)
    if not request.inputs:
        if request.outputs or request.compare:
            raise UsageError("there are no outputs without inputs: give --inputs FILE.npz")
        described = describe(package)
        return described, description_lines(described), []
    found = run(request, package)
    values = summary(found)
    lines = [
        f"{name}: {row['dtype']}{row['shape']}, {row['least']:.6g} to {row['largest']:.6g}"
        + (f", {row['not_finite']} values NaN or infinite" if row["not_finite"] else "")
        if row["least"] is not None
        else f"{name}: {row['dtype']}{row['shape']}, empty"
        for name, row in values.items()
    ]
    compared = [] if request.compare is None else differences(found, request.compare)
    lines += [
        f"{each.name} against {request.compare}: largest difference {each.largest:.3g} "
        f"({each.relative:.3g} of range), RMS {each.rms:.3g}, same largest element in "
        f"{each.same_argmax:.2%} of rows"
        for each in compared
    ]
    result = {"outputs": values, "differences": [asdict(each) for each in compared]}
    return result, lines, compared


def _check_outputs(request: RunRequest) -> None:
    """Refuses, before any call, to write over what is read, or over another call's outputs."""
    inputs = [
        Input("the package", request.package, whole=True),
        *(Input("the inputs", path) for path in request.inputs),
        *(Input("the file to compare with", path) for path in (request.compare,) if path),
    ]
    for number, path in enumerate(request.outputs):
        earlier = [Input("another call's --outputs", other) for other in request.outputs[:number]]
        refuse_inputs(path, [*inputs, *earlier], "--outputs")


def _calls(request: RunRequest) -> Iterator[tuple[Path, Path | None, str | None]]:
    count = len(request.inputs)
    if len(request.outputs) not in (0, 1, count):
        raise UsageError(
            f"there are {count} calls and {len(request.outputs)} output files: give one for each "
            f"call, or one for the last"
        )
    if len(request.functions) not in (0, 1, count):
        raise UsageError(
            f"there are {count} calls and {len(request.functions)} functions: give one for each "
            f"call, or one for all"
        )
    outputs: list[Path | None] = [None] * (count - len(request.outputs))
    outputs += request.outputs
    functions: list[str | None] = list(request.functions) or [None]
    functions = functions * count if len(functions) == 1 else functions
    return zip(request.inputs, outputs, functions, strict=True)


def _precision(name: str) -> Precision:
    from device_harness.coreml_interpreter.values import Precision

    known = [each.value for each in Precision]
    if name not in known:
        raise UsageError(f"there is no precision {name}; known: {', '.join(known)}")
    return Precision(name)


def _write(path: Path, arrays: Arrays) -> None:
    try:
        with whole_file(path) as stream:
            np.savez(stream, **arrays)  # type: ignore[arg-type]
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"there is no folder {path.parent} to write {path.name} to") from None
    except IsADirectoryError:
        raise UsageError(f"{path} is a folder: name a file to write outputs to") from None


def _difference(
    name: str, found: npt.NDArray[Any], wanted: npt.NDArray[Any], other: Path
) -> Difference:
    if found.shape != wanted.shape:
        raise UsageError(
            f"the output {name!r} has shape {list(found.shape)}; in {other} it has "
            f"{list(wanted.shape)}"
        )
    if not found.size:
        return Difference(name, 0.0, 0.0, 0.0, 1.0)
    one, two = found.astype(np.float64), wanted.astype(np.float64)
    apart = np.where(one == two, 0.0, np.abs(one - two))  # equal infinities would give NaN
    largest, extent = float(apart.max()), float(two.max() - two.min())
    if extent == 0:
        extent = float(np.abs(two).max()) or 1.0
    rows = (1, -1) if one.ndim == 0 else (-1, one.shape[-1])
    same = one.reshape(rows).argmax(-1) == two.reshape(rows).argmax(-1)
    relative = largest / extent if math.isfinite(extent) else (0.0 if largest == 0 else math.inf)
    return Difference(
        name, largest, relative, float(np.sqrt((apart**2).mean())), float(same.mean())
    )


def _told(feature: Feature) -> str:
    return str(feature)
