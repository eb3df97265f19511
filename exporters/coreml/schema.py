"""The protobuf messages of a Core ML model and its MIL program, made without coremltools.

Fields and their numbers are those of Apple's ``Model.proto``, ``FeatureTypes.proto`` and
``MIL.proto`` (specification version 9 and before). A line of `_MESSAGES` is a message. A field is
``number:name:type``, where ``[type]`` is repeated, ``{type}`` is a map from strings, and
``type@group`` is one field of a group of which at most one is set. Enumerations are ``int32``; the
tables below hold the values that EdgeForge uses. Kinds of models that are not ML programs are
``bytes`` here, because it is enough to know which kind a model is.

The messages live in a descriptor pool of their own, so that coremltools can be loaded in the same
process.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from google.protobuf.descriptor_pb2 import DescriptorProto, FileDescriptorProto

# MIL.DataType. A type's name states its width in bits, below a byte too.
DATA_TYPES: Final[dict[str, int]] = {
    "bool": 1,
    "string": 2,
    "fp16": 10,
    "fp32": 11,
    "fp64": 12,
    "bf16": 13,
    "int8": 21,
    "int16": 22,
    "int32": 23,
    "int64": 24,
    "int4": 25,
    "uint8": 31,
    "uint16": 32,
    "uint32": 33,
    "uint64": 34,
    "uint4": 35,
    "uint2": 36,
    "uint1": 37,
    "uint6": 38,
    "uint3": 39,
    "fp8e4m3fn": 40,
    "fp8e5m2": 41,
}
DATA_TYPE_NAMES: Final = {number: name for name, number in DATA_TYPES.items()}

# ArrayFeatureType.ArrayDataType, the element types of inputs and outputs.
ARRAY_TYPES: Final[dict[str, int]] = {
    "fp32": 65568,
    "fp64": 65600,
    "int32": 131104,
    "int8": 131080,
    "fp16": 65552,
}
ARRAY_TYPE_NAMES: Final = {number: name for name, number in ARRAY_TYPES.items()}

# ImageFeatureType.ColorSpace, the layouts of an image's pixels.
IMAGE_LAYOUTS: Final[dict[int, str]] = {
    10: "grayscale",
    20: "RGB",
    30: "BGR",
    40: "float16 grayscale",
}

_MESSAGES: Final = """
Program 1:version:int64 2:functions:{Function} 3:docString:string 4:attributes:{Value}
Function 1:inputs:[NamedValueType] 2:opset:string 3:block_specializations:{Block} \
4:attributes:{Value}
Block 1:inputs:[NamedValueType] 2:outputs:[string] 3:operations:[Operation] 4:attributes:{Value}
Binding 1:name:string@binding 2:value:Value@binding
Argument 1:arguments:[Binding]
Operation 1:type:string 2:inputs:{Argument} 3:outputs:[NamedValueType] 4:blocks:[Block] \
5:attributes:{Value}
NamedValueType 1:name:string 2:type:ValueType
ValueType 1:tensorType:TensorType@type 2:listType:ListType@type 3:tupleType:TupleType@type \
4:dictionaryType:DictionaryType@type 5:stateType:StateType@type
TensorType 1:dataType:int32 2:rank:int64 3:dimensions:[Dimension] 4:attributes:{Value}
TupleType 1:types:[ValueType]
ListType 1:type:ValueType 2:length:Dimension
DictionaryType 1:keyType:ValueType 2:valueType:ValueType
StateType 1:wrappedType:ValueType
ConstantDimension 1:size:uint64
UnknownDimension 1:variadic:bool
Dimension 1:constant:ConstantDimension@dimension 2:unknown:UnknownDimension@dimension
ImmediateValue 1:tensor:TensorValue@value 2:tuple:TupleValue@value 3:list:ListValue@value \
4:dictionary:DictionaryValue@value
BlobFileValue 1:fileName:string 2:offset:uint64
Value 1:docString:string 2:type:ValueType 3:immediateValue:ImmediateValue@value \
5:blobFileValue:BlobFileValue@value
Floats 1:values:[float]
Doubles 1:values:[double]
Ints 1:values:[int32]
LongInts 1:values:[int64]
Bools 1:values:[bool]
Strings 1:values:[string]
Bytes 1:values:bytes
TensorValue 1:floats:Floats@value 2:ints:Ints@value 3:bools:Bools@value 4:strings:Strings@value \
5:longInts:LongInts@value 6:doubles:Doubles@value 7:bytes:Bytes@value
TupleValue 1:values:[Value]
ListValue 1:values:[Value]
KeyValuePair 1:key:Value 2:value:Value
DictionaryValue 1:values:[KeyValuePair]
Empty
SizeRange 1:lowerBound:uint64 2:upperBound:int64
ImageSize 1:width:uint64 2:height:uint64
EnumeratedImageSizes 1:sizes:[ImageSize]
ImageSizeRange 1:widthRange:SizeRange 2:heightRange:SizeRange
ImageFeatureType 1:width:int64 2:height:int64 3:colorSpace:int32 \
21:enumeratedSizes:EnumeratedImageSizes@SizeFlexibility \
31:imageSizeRange:ImageSizeRange@SizeFlexibility
Shape 1:shape:[int64]
EnumeratedShapes 1:shapes:[Shape]
ShapeRange 1:sizeRanges:[SizeRange]
ArrayFeatureType 1:shape:[int64] 2:dataType:int32 \
21:enumeratedShapes:EnumeratedShapes@ShapeFlexibility 31:shapeRange:ShapeRange@ShapeFlexibility \
41:intDefaultValue:int32@defaultOptionalValue 51:floatDefaultValue:float@defaultOptionalValue \
61:doubleDefaultValue:double@defaultOptionalValue
StateFeatureType 1:arrayType:ArrayFeatureType@Type
FeatureType 1:int64Type:Empty@Type 2:doubleType:Empty@Type 3:stringType:Empty@Type \
4:imageType:ImageFeatureType@Type 5:multiArrayType:ArrayFeatureType@Type \
6:dictionaryType:bytes@Type 7:sequenceType:bytes@Type 8:stateType:StateFeatureType@Type \
1000:isOptional:bool
FeatureDescription 1:name:string 2:shortDescription:string 3:type:FeatureType
Metadata 1:shortDescription:string 2:versionString:string 3:author:string 4:license:string \
100:userDefined:{string}
FunctionDescription 1:name:string 2:input:[FeatureDescription] 3:output:[FeatureDescription] \
4:predictedFeatureName:string 5:predictedProbabilitiesName:string 6:state:[FeatureDescription]
ModelDescription 1:input:[FeatureDescription] 10:output:[FeatureDescription] \
11:predictedFeatureName:string 12:predictedProbabilitiesName:string 13:state:[FeatureDescription] \
20:functions:[FunctionDescription] 21:defaultFunctionName:string \
50:trainingInput:[FeatureDescription] 100:metadata:Metadata
Model 1:specificationVersion:int32 2:description:ModelDescription 10:isUpdatable:bool \
200:pipelineClassifier:bytes@Type 201:pipelineRegressor:bytes@Type 202:pipeline:bytes@Type \
300:glmRegressor:bytes@Type 301:supportVectorRegressor:bytes@Type \
302:treeEnsembleRegressor:bytes@Type 303:neuralNetworkRegressor:bytes@Type \
400:glmClassifier:bytes@Type 401:supportVectorClassifier:bytes@Type \
402:treeEnsembleClassifier:bytes@Type 403:neuralNetworkClassifier:bytes@Type \
404:kNearestNeighborsClassifier:bytes@Type 500:neuralNetwork:bytes@Type \
502:mlProgram:Program@Type 555:customModel:bytes@Type 556:linkedModel:bytes@Type \
3000:serializedModel:bytes@Type
"""
_PACKAGE: Final = "edgeforge.coreml"
_SCALARS: Final = {
    "double": 1,
    "float": 2,
    "int64": 3,
    "uint64": 4,
    "int32": 5,
    "bool": 8,
    "string": 9,
    "bytes": 12,
}
_MESSAGE, _OPTIONAL, _REPEATED = 11, 1, 3


@cache
def messages() -> dict[str, Any]:
    """Every message class by name; `google.protobuf` makes them from `_MESSAGES`."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(
        name="edgeforge/coreml.proto", package=_PACKAGE, syntax="proto3"
    )
    for line in _MESSAGES.strip().splitlines():
        _add_message(file, *line.split())
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        message.name: message_factory.GetMessageClass(
            pool.FindMessageTypeByName(f"{_PACKAGE}.{message.name}")
        )
        for message in file.message_type
    }


def new(name: str, **fields: object) -> Any:
    """Makes a message of the class of this name.

    >>> new("SizeRange", lowerBound=1, upperBound=-1).SerializeToString().hex()
    '080110ffffffffffffffffff01'
    """
    return messages()[name](**fields)


def _add_message(file: FileDescriptorProto, name: str, *fields: str) -> None:
    message = file.message_type.add(name=name)
    groups: list[str] = []
    for text in fields:
        number, field_name, kind = text.split(":")
        kind, _, group = kind.partition("@")
        field: Any = message.field.add(name=field_name, number=int(number), label=_OPTIONAL)
        if kind.startswith("{"):
            field.label, field.type = _REPEATED, _MESSAGE
            field.type_name = _map_entry(message, name, field_name, kind[1:-1])
            continue
        if kind.startswith("["):
            field.label, kind = _REPEATED, kind[1:-1]
        _set_type(field, kind)
        if group:
            if group not in groups:
                groups.append(group)
                message.oneof_decl.add(name=group)
            field.oneof_index = groups.index(group)


def _map_entry(message: DescriptorProto, owner: str, field_name: str, kind: str) -> str:
    """Adds the nested message that protobuf encodes a map as, and returns its type's name."""
    words = field_name.split("_")
    name = "".join(word[0].upper() + word[1:] for word in words) + "Entry"
    entry = message.nested_type.add(name=name)
    entry.options.map_entry = True
    _set_type(entry.field.add(name="key", number=1, label=_OPTIONAL), "string")
    _set_type(entry.field.add(name="value", number=2, label=_OPTIONAL), kind)
    return f".{_PACKAGE}.{owner}.{name}"


def _set_type(field: Any, kind: str) -> None:
    if kind in _SCALARS:
        field.type = _SCALARS[kind]
    else:
        field.type, field.type_name = _MESSAGE, f".{_PACKAGE}.{kind}"
