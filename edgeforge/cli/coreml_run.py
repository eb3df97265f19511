"""``edgeforge coreml-run``: anybody's Core ML package, described, run and compared."""

from __future__ import annotations

import math
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgeforge.errors import CheckFailed, UsageError
from exporters.coreml.package import Feature, Package, open_package
from exporters.coreml.structure import weight_formats

if TYPE_CHECKING:
    from device_harness.coreml_interpreter.values import Precision

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class RunRequest:
    """What a user asks for.

    Attributes:
        package: an ``.mlpackage`` folder or an ``.mlmodel`` file.
        inputs: one ``.npz`` file a call, in order; none only describes the package.
        outputs: where the outputs go, one ``.npz`` file a call.
        functions: one a call, or one for all; the package's default one when none is given.
        precision: ``fp16`` or ``fp32``.
        compare: an ``.npz`` file to hold the last call's outputs against.
        tolerance: largest difference that passes, relative to the range of the values.
        iterations: of a loop, at most.
        threads: of PyTorch; None leaves its own number.
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
    """How far an output is from the one it is held against.

    Attributes:
        name: of the output.
        largest: difference of any element.
        relative: that over the range of the other's elements.
        rms: root of the mean of squared differences.
        same_argmax: share of rows of the last dimension whose largest element is at the same place.
    """

    name: str
    largest: float
    relative: float
    rms: float
    same_argmax: float


def describe(package: Package) -> dict[str, Any]:
    """Functions, inputs, outputs, states, operations and weight formats, for machines."""
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
    """The same for people."""
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
    """Makes the calls one after the other, over the same states, and writes what they give.

    Returns:
        Outputs of the last call.

    Raises:
        UsageError: files that are not there, or as many of them as do not go together.
        DeviceError: an input does not fit, or an operation fails.
    """
    import torch

    from device_harness.coreml_interpreter.interpreter import Interpreter
    from device_harness.coreml_interpreter.limits import Limits

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
        found = interpreter.run(_read(inputs), function, states)
        if outputs is not None:
            _write(outputs, found)
    return found


def differences(found: Arrays, other: Path) -> list[Difference]:
    """Holds outputs against those of a file, by the names that both have.

    Raises:
        UsageError: they share no name, or an output has another shape there.
    """
    wanted = _read(other)
    shared = [name for name in found if name in wanted]
    if not shared:
        raise UsageError(
            f"{other} has none of the outputs {', '.join(found)}; it has {', '.join(wanted)}"
        )
    return [_difference(name, found[name], wanted[name], other) for name in shared]


def require_close(found: Sequence[Difference], tolerance: float | None) -> None:
    """Refuses outputs that are further apart than allowed.

    Raises:
        CheckFailed: names the furthest one.
    """
    if tolerance is None:
        return
    worst = max(found, key=lambda each: -1.0 if each.relative <= tolerance else each.relative)
    if not worst.relative <= tolerance:  # not a number is no agreement either
        raise CheckFailed(
            f"the output {worst.name!r} differs by {worst.relative:.3g} of the range of its "
            f"values; {tolerance:g} is allowed"
        )


def summary(found: Arrays) -> dict[str, dict[str, object]]:
    """Type, shape and range of each output."""
    return {
        name: {
            "dtype": str(value.dtype),
            "shape": list(value.shape),
            "least": float(value.min()) if value.size else None,
            "largest": float(value.max()) if value.size else None,
        }
        for name, value in found.items()
    }


def report(request: RunRequest) -> tuple[dict[str, Any], list[str], list[Difference]]:
    """Does what a request says.

    Returns:
        The result for machines, its lines for people, and the differences asked for.
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
        raise UsageError(f"there is no precision {name}; there is {' and '.join(known)}")
    return Precision(name)


def _read(path: Path) -> Arrays:
    try:
        with np.load(path, allow_pickle=False) as archive:
            if not hasattr(archive, "files"):
                raise UsageError(f"{path} is one array; save it by name with numpy.savez")
            return {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        raise UsageError(f"there is no file {path}") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{path} is no .npz file of numbers: {error}") from error


def _write(path: Path, arrays: Arrays) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as stream:
            np.savez(stream, **arrays)  # type: ignore[arg-type]
        partial.replace(path)
    except FileNotFoundError:
        raise UsageError(f"there is no folder {path.parent} to write {path.name} to") from None
    finally:
        partial.unlink(missing_ok=True)


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
    apart = np.where(one == two, 0.0, np.abs(one - two))  # infinities agree with themselves
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
