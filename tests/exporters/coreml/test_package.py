"""Reading packages: what is in them, and what is wrong with them."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from device_harness.coreml_interpreter.interpreter import Interpreter
from device_harness.coreml_interpreter.limits import Limits
from device_harness.errors import DeviceError
from exporters.coreml.blob_file import BLOB_TYPES, BlobFile
from exporters.coreml.constants import Constant, read_constant
from exporters.coreml.package import open_package
from exporters.coreml.schema import messages
from exporters.errors import ExportError
from tests.oracles.small_package import BIAS, CODES, blob_file, quantized_linear

MODEL = Path("Data/com.apple.CoreML/model.mlmodel")
WEIGHTS = Path("Data/com.apple.CoreML/weights/weight.bin")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized_linear(tmp_path_factory.mktemp("package") / "small.mlpackage")


@pytest.fixture
def package(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "small.mlpackage"))


def test_what_a_package_says(original: Path) -> None:
    package = open_package(original)
    assert list(package.functions) == ["main"]
    interface = package.interface()
    assert [(each.name, each.shape) for each in interface.inputs] == [("x", (2, 8))]
    assert interface.default


def test_constants_are_what_was_stored(original: Path) -> None:
    package = open_package(original)
    found = {}
    for operation in package.operations():
        if operation.type == "const" and operation.outputs[0].name == "bias":
            found["bias"] = read_constant(package, operation.attributes["val"], "bias").codes()
        if operation.type.startswith("constexpr"):
            value = operation.inputs["data"].arguments[0].value
            found["data"] = read_constant(package, value, "data").codes()
    assert np.array_equal(found["bias"], BIAS)
    assert np.array_equal(found["data"], np.where(CODES > 7, CODES.astype(int) - 16, CODES))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6])
def test_packed_integers_as_apples_own_library_writes_them(bits: int, tmp_path: Path) -> None:
    from coremltools.libmilstoragepython import _BlobStorageWriter

    codes = np.random.default_rng(bits).integers(0, 1 << bits, 101).astype(np.uint8)
    path = tmp_path / "weight.bin"
    writer = _BlobStorageWriter(str(path))
    offset = getattr(writer, f"write_uint{bits}_data")(codes)
    del writer
    blob = BlobFile(path).read(offset)
    assert (blob.dtype, blob.elements) == (f"uint{bits}", 101)
    assert np.array_equal(Constant(blob.dtype, (101,), blob.data).codes(), codes)


def test_a_package_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="there is no Core ML model at"):
        open_package(tmp_path / "none.mlpackage")
    with pytest.raises(ExportError, match=r"is no Core ML package: it has no Manifest\.json"):
        open_package(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is no JSON text"),
        ("[" * 100_000, "is no JSON text"),
        ("[]", "does not say where the model is"),
        ("{}", "does not say where the model is"),
        ('{"rootModelIdentifier": "a", "itemInfoEntries": {"a": {"path": 3}}}', "does not say"),
    ],
)
def test_manifests(package: Path, text: str, words: str) -> None:
    (package / "Manifest.json").write_text(text)
    with pytest.raises(ExportError, match=words):
        open_package(package)


@pytest.mark.parametrize("path", ["../../secret", "/etc/passwd", "com.apple.CoreML/../../../x"])
def test_a_model_outside_its_package(package: Path, path: str) -> None:
    entries = {"rootModelIdentifier": "a", "itemInfoEntries": {"a": {"path": path}}}
    (package / "Manifest.json").write_text(json.dumps(entries))
    with pytest.raises(ExportError, match="is outside"):
        open_package(package)


def test_weights_outside_their_package(package: Path) -> None:
    opened = open_package(package)
    for name in ("@model_path/../../../x", "@model_path//etc/passwd"):
        with pytest.raises(ExportError, match="is outside"):
            opened.blob_file(name)
    with pytest.raises(ExportError, match="only files under @model_path/ are read"):
        opened.blob_file("/etc/passwd")


def test_no_protobuf(package: Path) -> None:
    (package / MODEL).write_bytes(b"\xff" * 40)
    with pytest.raises(ExportError, match="its protobuf cannot be parsed"):
        open_package(package)


def test_another_kind_of_model(package: Path) -> None:
    model = messages()["Model"](specificationVersion=4, neuralNetwork=b"")
    (package / MODEL).write_bytes(model.SerializeToString())
    with pytest.raises(ExportError, match="holds a neuralNetwork, not an ML program"):
        open_package(package)


def test_a_missing_function(package: Path) -> None:
    with pytest.raises(ExportError, match="has no function 'decode'; it has main"):
        open_package(package).function("decode")


def test_weight_files_that_were_cut_or_changed(tmp_path: Path) -> None:
    data, (offset,) = blob_file(("fp16", bytes(64), 0))
    path = tmp_path / "weight.bin"

    def refused(content: bytes, at: int, words: str) -> None:
        path.write_bytes(content)
        with pytest.raises(ExportError, match=words):
            BlobFile(path).read(at)

    refused(b"", offset, "has 0 bytes, less than the 64")
    refused(data[:40], offset, "has 40 bytes, less than the 64")
    refused(struct.pack("<II", 1, 1) + data[8:], offset, "of version 1; EdgeForge reads version 2")
    refused(data[:100], offset, "a constant is at offset 64")
    refused(data[:150], offset, "takes 64 bytes from 128, past the file's end at 150")
    refused(data, 10**9, "a constant is at offset 1000000000")
    refused(data, 128, "there is no constant at offset 128")
    unknown = data[:68] + struct.pack("<I", 99) + data[72:]
    refused(unknown, offset, "has the unknown element type 99")
    huge = data[:72] + struct.pack("<Q", 2**63) + data[80:]
    refused(huge, offset, "past the file's end")
    odd = data[:72] + struct.pack("<Q", 63) + data[80:]
    refused(odd, offset, "not a whole number of fp16 elements")


def test_a_weight_file_of_another_package(package: Path) -> None:
    other, _ = blob_file(*(("uint8", bytes(24), 0) for _ in range(3)))
    (package / WEIGHTS).write_bytes(other)
    with pytest.raises(ExportError, match=r"int4.*but the weight file holds uint8"):
        Interpreter(open_package(package)).bind()


def test_every_blob_type_has_its_own_number() -> None:
    assert len(set(BLOB_TYPES.values())) == len(BLOB_TYPES)


def is_repeated(field: Any) -> bool:
    """Whether a field is a list; versions of protobuf before 6.31 say it by a label alone."""
    if hasattr(field, "is_repeated"):
        return bool(field.is_repeated)
    return bool(field.label == field.LABEL_REPEATED)


def fields_of(message: Any) -> list[tuple[Any, Any]]:
    """Every field that is set, of a message and those within it."""
    found = []
    for field, value in message.ListFields():
        found.append((message, field))
        if field.type != field.TYPE_MESSAGE:
            continue
        if not is_repeated(field):
            found += fields_of(value)
        elif field.message_type.GetOptions().map_entry:
            for key in value:
                found += fields_of(value[key]) if hasattr(value[key], "ListFields") else []
        else:
            for each in value:
                found += fields_of(each)
    return found


def change(message: Any, field: Any, data: st.DataObject) -> None:
    """Gives a field another value, takes something out of it, or doubles it."""
    values = getattr(message, field.name)
    if field.type == field.TYPE_MESSAGE and is_repeated(field):
        if field.message_type.GetOptions().map_entry:
            key = data.draw(st.sampled_from(sorted(values)))
            if data.draw(st.booleans()):
                del values[key]
            else:
                values["x"].CopyFrom(values[key])
        elif data.draw(st.booleans()):
            del values[0]
        else:
            values.add().CopyFrom(values[len(values) - 1])
    elif field.type == field.TYPE_MESSAGE:
        message.ClearField(field.name)
    else:
        kinds: dict[int, tuple[object, ...]] = {
            field.TYPE_STRING: ("x", "y", "const", "relu", "linear", "while_loop", "weight", ""),
            field.TYPE_BYTES: (b"", b"\x01" * 7),
            field.TYPE_BOOL: (True, False),
        }
        number = (0, 1, 2, 5, 10, 11, 21, 23, 25, 64, 1 << 20)
        value = data.draw(st.sampled_from(kinds.get(field.type, number)))
        if is_repeated(field):
            values[0] = value
        else:
            setattr(message, field.name, value)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_programs_that_no_converter_writes_are_run_or_refused(original: Path, data: st.DataObject):
    package = open_package(original)
    for _ in range(data.draw(st.integers(1, 3))):
        found = fields_of(package.spec.mlProgram)
        message, field = found[data.draw(st.integers(0, len(found) - 1))]
        change(message, field, data)
    try:
        interpreter = Interpreter(package, limits=Limits(elements=1 << 20, iterations=10))
        interpreter.run({"x": np.zeros((2, 8))}, states=interpreter.make_states())
    except (ExportError, DeviceError) as error:
        assert str(error)


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_mutated_packages_are_read_or_refused(package: Path, original: Path, data: st.DataObject):
    """Bytes changed, cut or doubled anywhere: one of our own errors, or a result."""
    for file in (MODEL, WEIGHTS):
        content = bytearray((original / file).read_bytes())
        for _ in range(data.draw(st.integers(0, 3))):
            at = data.draw(st.integers(0, len(content) - 1))
            kind = data.draw(st.sampled_from(("byte", "large", "cut", "double")))
            if kind == "byte":
                content[at] = data.draw(st.integers(0, 255))
            elif kind == "large":
                content[at : at + 8] = b"\xff" * 7 + b"\x7f"
            elif kind == "cut" and at > 8:
                del content[at : at + data.draw(st.integers(1, 40))]
            else:
                content[at:at] = content[at : at + data.draw(st.integers(1, 40))]
        (package / file).write_bytes(content)
    try:
        opened = open_package(package)
        interpreter = Interpreter(opened, limits=Limits(elements=1 << 20, iterations=10))
        given_inputs = {
            name: np.zeros([dim or 1 for dim in kind.shape], np.float32)
            for name, kind in interpreter.inputs().items()
            if kind.elements < 1 << 20
        }
        interpreter.run(given_inputs, states=interpreter.make_states())
    except (ExportError, DeviceError) as error:
        assert str(error)


def altered(package: Path, change: Any) -> Path:
    model = messages()["Model"].FromString((package / MODEL).read_bytes())
    change(model)
    (package / MODEL).write_bytes(model.SerializeToString(deterministic=True))
    return package


def test_images_tell_their_layout_and_their_sizes(package: Path) -> None:
    def change(model: Any) -> None:
        (described,) = model.description.functions
        for name, number in (("r", 20), ("b", 30), ("g", 10), ("x", 77)):
            image = described.output.add(name=name).type.imageType
            image.width, image.height, image.colorSpace = 4, 3, number
        sizes = described.output[0].type.imageType.enumeratedSizes.sizes
        sizes.add(width=4, height=3)
        sizes.add(width=8, height=6)
        free = described.output[1].type.imageType.imageSizeRange
        free.heightRange.lowerBound, free.heightRange.upperBound = 1, 9
        free.widthRange.lowerBound, free.widthRange.upperBound = 2, -1

    told = [str(each) for each in open_package(altered(package, change)).interface().outputs]
    assert told == [
        "RGB image[3, 4], or [6, 8]",
        "BGR image[3, 4] of 1 to 9 x 2 to any",
        "grayscale image[3, 4]",
        "layout 77 image[3, 4]",
    ]


def test_the_default_shape_is_told_once(package: Path) -> None:
    def change(model: Any) -> None:
        array = model.description.functions[0].input[0].type.multiArrayType
        for shape in ((2, 8), (4, 8)):
            array.enumeratedShapes.shapes.add(shape=shape)

    (told,) = open_package(altered(package, change)).interface().inputs
    assert str(told) == "fp16[2, 8], or [4, 8]"
    assert told.shapes == ((2, 8), (4, 8))


@pytest.mark.parametrize("each", [1 << 31, (1 << 25) + 1])
def test_one_value_for_a_whole_tensor_has_a_bound(package: Path, each: int) -> None:
    """The bound holds for all constants together: two of half its size are too many as well."""
    opened = open_package(package)
    value = messages()["Value"]()
    value.type.tensorType.dataType = 10
    value.type.tensorType.dimensions.add().constant.size = each
    value.immediateValue.tensor.floats.values.append(0.5)
    with pytest.raises(ExportError, match="one value stand for"):
        for _ in range(2):
            read_constant(opened, value, "it")


def test_one_value_stands_for_a_tensor(package: Path) -> None:
    value = messages()["Value"]()
    value.type.tensorType.dataType = 10
    for size in (2, 3):
        value.type.tensorType.dimensions.add().constant.size = size
    value.immediateValue.tensor.floats.values.append(0.5)
    found = read_constant(open_package(package), value, "it")
    assert found.data.dtype == np.float16
    assert found.data.tolist() == [[0.5] * 3] * 2
