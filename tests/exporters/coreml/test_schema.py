"""The messages are Apple's: field by field against the classes that coremltools ships."""

from __future__ import annotations

from typing import Any

import pytest

from exporters.coreml import schema

ENUM = 14
# Ours by name, theirs where it is another.
THEIRS = {
    "Binding": "Argument.Binding",
    "ConstantDimension": "Dimension.ConstantDimension",
    "UnknownDimension": "Dimension.UnknownDimension",
    "ImmediateValue": "Value.ImmediateValue",
    "BlobFileValue": "Value.BlobFileValue",
    "KeyValuePair": "DictionaryValue.KeyValuePair",
    "Shape": "ArrayFeatureType.Shape",
    "EnumeratedShapes": "ArrayFeatureType.EnumeratedShapes",
    "ShapeRange": "ArrayFeatureType.ShapeRange",
    "ImageSize": "ImageFeatureType.ImageSize",
    "EnumeratedImageSizes": "ImageFeatureType.EnumeratedImageSizes",
    "ImageSizeRange": "ImageFeatureType.ImageSizeRange",
    **{
        name: f"TensorValue.Repeated{name}"
        for name in ("Floats", "Doubles", "Ints", "LongInts", "Bools", "Strings", "Bytes")
    },
}


@pytest.fixture(scope="module")
def apple():
    from coremltools.proto import FeatureTypes_pb2, MIL_pb2, Model_pb2

    return [file.DESCRIPTOR for file in (MIL_pb2, FeatureTypes_pb2, Model_pb2)]


def find(files, path):
    head, *rest = path.split(".")
    named = [f.message_types_by_name[head] for f in files if head in f.message_types_by_name]
    # Old versions of protobuf list a message in every file that imports its file publicly, too.
    assert len({each.full_name for each in named}) == 1
    found = named[0]
    for name in rest:
        found = found.nested_types_by_name[name]
    return found


def is_repeated(field: Any) -> bool:
    """Whether a field is a list; versions of protobuf before 6.31 say it by a label alone."""
    if hasattr(field, "is_repeated"):
        return bool(field.is_repeated)
    return bool(field.label == field.LABEL_REPEATED)


NAMES = list(schema.messages())


@pytest.mark.parametrize("name", [name for name in NAMES if name != "Empty"])
def test_fields_are_those_of_coremltools(apple, name):
    ours = schema.messages()[name].DESCRIPTOR
    theirs = find(apple, THEIRS.get(name, name))
    by_number = {field.number: field for field in theirs.fields}
    for field in ours.fields:
        other = by_number[field.number]
        assert field.name == other.name
        assert is_repeated(field) == is_repeated(other)
        assert (field.containing_oneof is None) == (other.containing_oneof is None)
        if field.type == 12 and other.type == 11:
            continue  # a kind that is only told apart, not read
        assert field.type == (5 if other.type == ENUM else other.type)
        if field.message_type is not None:
            assert field.message_type.GetOptions().map_entry == (
                other.message_type.GetOptions().map_entry
            )
    if name != "Model":  # of which only what is used is here
        assert {f.number for f in ours.fields} == set(by_number)


def test_enumerations_are_those_of_coremltools(apple):
    mil = apple[0]
    theirs = {v.number for v in mil.enum_types_by_name["DataType"].values}
    assert set(schema.DATA_TYPES.values()) == theirs - {0}
    names = {v.number: v.name for v in mil.enum_types_by_name["DataType"].values}
    short = {"fp": "FLOAT", "bf": "BFLOAT"}
    for name, number in schema.DATA_TYPES.items():
        assert names[number] == (short.get(name[:2], name[:2]) + name[2:]).upper()
    arrays = find(apple, "ArrayFeatureType").enum_types_by_name["ArrayDataType"]
    wanted = {"FLOAT32": "fp32", "DOUBLE": "fp64", "INT32": "int32", "INT8": "int8"}
    wanted["FLOAT16"] = "fp16"
    for value in arrays.values:
        if value.number:
            assert schema.ARRAY_TYPES[wanted[value.name]] == value.number
    layouts = find(apple, "ImageFeatureType").enum_types_by_name["ColorSpace"].values
    words = {"INVALID_COLOR_SPACE": None, "GRAYSCALE_FLOAT16": "float16 grayscale"}
    for value in layouts:
        told = schema.IMAGE_LAYOUTS.get(value.number)
        wanted_words = words.get(value.name, value.name)
        assert (told or "").lower() == (wanted_words or "").lower()


def test_what_coremltools_wrote_is_read_and_written_alike():
    from coremltools.proto import Model_pb2

    theirs = Model_pb2.Model()
    theirs.specificationVersion = 9
    theirs.description.metadata.userDefined["a"] = "b"
    function = theirs.mlProgram.functions["main"]
    operation = function.block_specializations["CoreML9"].operations.add()
    operation.type = "const"
    value = operation.attributes["val"]
    value.type.tensorType.dataType = 11
    value.immediateValue.tensor.floats.values.extend([1.5, -2.0])
    data = theirs.SerializeToString(deterministic=True)
    ours = schema.messages()["Model"].FromString(data)
    read = ours.mlProgram.functions["main"].block_specializations["CoreML9"].operations[0]
    assert list(read.attributes["val"].immediateValue.tensor.floats.values) == [1.5, -2.0]
    assert ours.SerializeToString(deterministic=True) == data
