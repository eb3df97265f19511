"""Opens a Core ML package and reads its functions, their inputs and outputs, and its metadata."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Final

from exporters.coreml.blob_file import BlobFile
from exporters.coreml.schema import ARRAY_TYPE_NAMES, DATA_TYPE_NAMES, IMAGE_LAYOUTS, new
from exporters.errors import ExportError
from quant.input_files import read_input
from quant.json_input import JsonError, parse_json

MANIFEST: Final = "Manifest.json"
MODEL_PATH: Final = "@model_path/"
LARGEST_SPEC: Final = 2**31 - 1  # what protobuf can parse
MOST_EXPANDED: Final = 1 << 26
_MOST_DIMENSIONS: Final = 64
_LARGEST_MANIFEST: Final = 1 << 24


@dataclass(frozen=True)
class TensorType:
    """The type of a value in a MIL program.

    Attributes:
        dtype: MIL's name of the element type, such as ``fp16``.
        shape: the dimensions; None for one that is not fixed.
    """

    dtype: str
    shape: tuple[int | None, ...]

    def __str__(self) -> str:
        dims = ", ".join("?" if dim is None else str(dim) for dim in self.shape)
        return f"{self.dtype}[{dims}]"

    @property
    def elements(self) -> int:
        """How many elements there are; dimensions that are not fixed count as one."""
        return math.prod(1 if dim is None else dim for dim in self.shape)


@dataclass(frozen=True)
class Feature:
    """An input, an output or a state, as the model's description states it for apps.

    Attributes:
        name: its name.
        kind: ``array``, ``image``, ``state`` or another of Core ML's kinds.
        dtype: an array's element type, such as ``fp16``; empty when there is none.
        shape: the default shape.
        shapes: all allowed shapes, when the description lists them.
        ranges: the smallest and the largest size of each dimension (None for no limit), when the
            description gives ranges.
        optional: whether a call may leave it out.
        layout: an image's colours and their order, such as ``BGR``; empty for all other kinds.
    """

    name: str
    kind: str
    dtype: str = ""
    shape: tuple[int, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()
    ranges: tuple[tuple[int, int | None], ...] = ()
    optional: bool = False
    layout: str = ""

    def __str__(self) -> str:
        what = f"{self.layout} image" if self.layout else self.dtype or self.kind
        text = f"{what}{list(self.shape) if self.shape else ''}"
        others = (str(list(shape)) for shape in self.shapes if shape != self.shape)
        text += ", or ".join(["", *others])
        if self.ranges:
            ends = (f"{low} to {'any' if high is None else high}" for low, high in self.ranges)
            text += f" of {' x '.join(ends)}"
        return text + (", optional" if self.optional else "")


@dataclass(frozen=True)
class Interface:
    """What one function takes and gives, according to the model's description.

    Attributes:
        name: the function's name.
        default: whether an app that names no function gets this one.
        inputs: the function's inputs.
        outputs: the function's outputs.
        states: the function's states.
    """

    name: str
    default: bool
    inputs: tuple[Feature, ...]
    outputs: tuple[Feature, ...]
    states: tuple[Feature, ...]


@dataclass
class Package:
    """A model whose program can be read.

    Attributes:
        path: the package or model file that was opened.
        root: the folder to which the names of weight files are relative.
        spec: the ``Model`` message.
        size: the size of the specification, in bytes.
    """

    path: Path
    root: Path
    spec: Any
    size: int
    _files: dict[str, BlobFile] = field(default_factory=dict)
    _expanded: int = 0

    @property
    def nbytes(self) -> int:
        """The size of the specification and of the weight files opened so far, in bytes."""
        return self.size + sum(file.size for file in self._files.values())

    def expand(self, elements: int, where: str) -> None:
        """Notes that one written value stands for so many elements of a constant.

        Raises:
            ExportError: all constants of the package together would have too many.
        """
        self._expanded += elements
        if self._expanded > MOST_EXPANDED:
            raise ExportError(
                f"{where} makes one value stand for {elements} elements; all constants of a "
                f"package that are written so may have {MOST_EXPANDED} together"
            )

    @property
    def functions(self) -> dict[str, Any]:
        """The program's ``Function`` messages by name."""
        return dict(sorted(self.spec.mlProgram.functions.items()))

    @property
    def default_function(self) -> str:
        """The name of the function that an app gets when it names none."""
        named = str(self.spec.description.defaultFunctionName)
        names = list(self.functions)
        return named or ("main" if "main" in names or len(names) != 1 else names[0])

    @property
    def metadata(self) -> dict[str, str]:
        """The package's metadata for its users: Core ML's own fields, then user-defined ones."""
        message = self.spec.description.metadata
        fields = {
            "description": message.shortDescription,
            "version": message.versionString,
            "author": message.author,
            "licence": message.license,
        }
        told = {name: str(value) for name, value in fields.items() if value}
        return {**told, **dict(sorted(message.userDefined.items()))}

    def function(self, name: str | None = None) -> Any:
        """Returns the ``Function`` message of this name, or the default function's.

        Raises:
            ExportError: there is no function of this name.
        """
        wanted = self.default_function if name is None else name
        if wanted not in self.functions:
            raise ExportError(
                f"{self.path} has no function {wanted!r}; it has {_listed(self.functions)}"
            )
        return self.functions[wanted]

    def interface(self, name: str | None = None) -> Interface:
        """What a function takes and gives, according to the model's description.

        Raises:
            ExportError: there is no function of this name.
        """
        wanted = self.default_function if name is None else name
        self.function(wanted)
        source = self.spec.description
        for described in source.functions:
            if described.name == wanted:
                source = described
        return Interface(
            wanted,
            wanted == self.default_function,
            tuple(_feature(message) for message in source.input),
            tuple(_feature(message) for message in source.output),
            tuple(_feature(message) for message in source.state),
        )

    def block(self, name: str | None = None) -> Any:
        """The ``Block`` that a function runs, which is the specialization for its opset.

        Raises:
            ExportError: there is no function of this name, or no block for its opset.
        """
        function = self.function(name)
        blocks = function.block_specializations
        if function.opset in blocks:
            return blocks[function.opset]
        if len(blocks) == 1:
            return next(iter(blocks.values()))
        raise ExportError(
            f"a function of {self.path} is written for opset {function.opset!r} but has blocks "
            f"only for {_listed(blocks)}"
        )

    def operations(self, name: str | None = None) -> Iterator[Any]:
        """Yields every ``Operation`` of a function; those of inner blocks follow their owner."""
        waiting = [self.block(name)]
        while waiting:
            for operation in waiting.pop().operations:
                yield operation
                waiting.extend(operation.blocks)

    def blob_file(self, file_name: str) -> BlobFile:
        """Opens the weight file that constants name, as in ``@model_path/weights/weight.bin``.

        Raises:
            ExportError: the file is outside the package, or cannot be read.
        """
        if file_name not in self._files:
            if not file_name.startswith(MODEL_PATH):
                raise ExportError(
                    f"{self.path} keeps weights in {file_name!r}; only files under {MODEL_PATH} "
                    f"are read"
                )
            path = _inside(self.root, file_name.removeprefix(MODEL_PATH), "weight file")
            self._files[file_name] = BlobFile(path)
        return self._files[file_name]


def open_package(path: Path) -> Package:
    """Opens an ``.mlpackage`` folder or a bare ``.mlmodel`` file.

    Raises:
        ExportError: there is no model, it cannot be parsed, or it is not an ML program.
    """
    if path.suffix == ".mlmodelc":
        raise ExportError(
            f"{path} is compiled for Apple's runtime: open the .mlpackage it came from"
        )
    model = _model_of_package(path) if path.is_dir() else path
    try:
        data = read_input(model, LARGEST_SPEC)
    except FileNotFoundError:
        raise ExportError(f"there is no Core ML model at {model}") from None
    except OSError as error:
        raise ExportError(f"{model} cannot be read: {error.strerror}") from error
    spec = new("Model")
    try:
        spec.ParseFromString(data)
    except Exception as error:  # protobuf's parsers have no common class of errors
        raise ExportError(
            f"{model} is no Core ML model: its protobuf cannot be parsed ({error})"
        ) from None
    kind = spec.WhichOneof("Type")
    if kind != "mlProgram":
        found = f"a {kind}" if kind else "no model at all"
        raise ExportError(
            f"{model} holds {found}, not an ML program: convert it again with "
            f'coremltools, convert_to="mlprogram"'
        )
    if not spec.mlProgram.functions:
        raise ExportError(f"{model} holds an ML program without functions")
    return Package(path, model.parent, spec, len(data))


def tensor_type(value_type: Any, where: str) -> TensorType:
    """Reads the tensor type of a ``ValueType`` message; for a state, the type that it wraps.

    Args:
        value_type: the message.
        where: the value that has this type, for the error.

    Raises:
        ExportError: the type is not a tensor's, or its element type is not known.
    """
    kind = value_type.WhichOneof("type")
    if kind == "stateType":
        return tensor_type(value_type.stateType.wrappedType, where)
    if kind != "tensorType":
        raise ExportError(
            f"{where} is a {kind or 'value without a type'}; only tensors can be read"
        )
    message = value_type.tensorType
    if message.dataType not in DATA_TYPE_NAMES:
        raise ExportError(
            f"{where} has the unknown element type {message.dataType}: it was written for a newer "
            f"Core ML, or the package was changed"
        )
    shape = tuple(
        int(dim.constant.size) if dim.WhichOneof("dimension") == "constant" else None
        for dim in message.dimensions
    )
    found = TensorType(DATA_TYPE_NAMES[message.dataType], shape)
    if len(shape) > _MOST_DIMENSIONS or found.elements >= 2**63:
        raise ExportError(
            f"{where} has {len(shape)} dimensions and more elements than memory could have: the "
            f"package was changed"
        )
    return found


def _model_of_package(path: Path) -> Path:
    manifest = path / MANIFEST
    try:
        entries: Any = parse_json(read_input(manifest, _LARGEST_MANIFEST))
        root = entries["rootModelIdentifier"]
        named = entries["itemInfoEntries"][root]["path"]
        if not isinstance(named, str):
            raise TypeError(named)
    except FileNotFoundError:
        raise ExportError(f"{path} is no Core ML package: it has no {MANIFEST}") from None
    except OSError as error:
        raise ExportError(f"{manifest} cannot be read: {error.strerror}") from error
    except JsonError as error:
        raise ExportError(f"{manifest} is no JSON text: it {error}") from None
    except (KeyError, TypeError):
        raise ExportError(f"{manifest} does not say where the model is: it was changed") from None
    return _inside(path / "Data", named, "model")


def _inside(folder: Path, named: str, what: str) -> Path:
    parts = PurePosixPath(named)
    try:
        path = (folder / named).resolve()
        outside = parts.is_absolute() or not path.is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError) as error:
        raise ExportError(f"the {what} {named!r} of {folder} cannot be found: {error}") from None
    if outside:
        raise ExportError(
            f"the {what} {named!r} is outside {folder}: a package holds all of its files, so this "
            f"one was changed"
        )
    return path


def _feature(message: Any) -> Feature:
    kind = str(message.type.WhichOneof("Type") or "value without a type")
    name, optional = str(message.name), bool(message.type.isOptional)
    if kind == "multiArrayType":
        return _array(name, "array", message.type.multiArrayType, optional)
    if kind == "stateType":
        return _array(name, "state", message.type.stateType.arrayType, optional)
    if kind == "imageType":
        return _image(name, message.type.imageType, optional)
    return Feature(name, kind.removesuffix("Type"), optional=optional)


def _image(name: str, image: Any, optional: bool) -> Feature:
    flexible = image.WhichOneof("SizeFlexibility")
    shapes: tuple[tuple[int, ...], ...] = ()
    ranges: tuple[tuple[int, int | None], ...] = ()
    if flexible == "enumeratedSizes":
        sizes = image.enumeratedSizes.sizes
        shapes = tuple((int(size.height), int(size.width)) for size in sizes)
    elif flexible == "imageSizeRange":
        ranges = _ranges((image.imageSizeRange.heightRange, image.imageSizeRange.widthRange))
    layout = IMAGE_LAYOUTS.get(image.colorSpace, f"layout {image.colorSpace}")
    shape = int(image.height), int(image.width)
    return Feature(name, "image", "", shape, shapes, ranges, optional, layout)


def _ranges(sizes: Iterable[Any]) -> tuple[tuple[int, int | None], ...]:
    return tuple(
        (int(each.lowerBound), None if each.upperBound < 0 else int(each.upperBound))
        for each in sizes
    )


def _array(name: str, kind: str, array: Any, optional: bool) -> Feature:
    dtype = ARRAY_TYPE_NAMES.get(array.dataType, f"type {array.dataType}")
    shape = tuple(int(dim) for dim in array.shape)
    flexible = array.WhichOneof("ShapeFlexibility")
    shapes: tuple[tuple[int, ...], ...] = ()
    ranges: tuple[tuple[int, int | None], ...] = ()
    if flexible == "enumeratedShapes":
        shapes = tuple(
            tuple(int(dim) for dim in each.shape) for each in array.enumeratedShapes.shapes
        )
    elif flexible == "shapeRange":
        ranges = _ranges(array.shapeRange.sizeRanges)
    return Feature(name, kind, dtype, shape, shapes, ranges, optional)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"
