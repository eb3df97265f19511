"""Writes what an ``.mlpackage`` holds besides a program: descriptions, metadata, its manifest."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from exporters.coreml.emitter import Emitter
from exporters.coreml.function import Shape, Value
from exporters.coreml.names import MODEL_PATH, WEIGHTS_PATH
from exporters.coreml.schema import ARRAY_TYPES, messages

_AUTHOR: Final = "com.apple.CoreML"
_DATA: Final = "Data/"
# The identifiers mean nothing outside the package; fixed ones keep equal exports equal in bytes.
_NAMESPACE: Final = uuid.UUID("4f2b53d5-5f05-5d0a-9d0c-3b1a0e5c3a51")


@dataclass(frozen=True)
class Metadata:
    """The metadata that Xcode and apps show.

    Attributes:
        description: one sentence about the model.
        version: the model's version.
        author: who made the weights; empty when that is not known.
        licence: the weights' licence; empty when it is not known.
        user_defined: further texts, by key.
    """

    description: str
    version: str
    author: str
    licence: str
    user_defined: Mapping[str, str]


@dataclass(frozen=True)
class WrittenFunction:
    """A finished function and what its description adds.

    Attributes:
        emitter: the function.
        choices: the numbers of tokens that a call may take, where there are several.
        texts: a sentence for each input, output and state, by name.
    """

    emitter: Emitter
    choices: tuple[int, ...]
    texts: Mapping[str, str]


def model_message(functions: Sequence[WrittenFunction], version: int, metadata: Metadata) -> Any:
    """Builds the whole model, as a ``Model`` message.

    Args:
        functions: the functions, the default one first. A single function is described as the
            model itself, which every version of the specification knows.
        version: the version of the specification.
        metadata: the metadata that apps read.
    """
    model = messages()["Model"](specificationVersion=version)
    model.mlProgram.version = 1
    for function in functions:
        name = function.emitter.name
        model.mlProgram.functions[name].CopyFrom(function.emitter.message())
    description = model.description
    if len(functions) == 1:
        _describe(description, functions[0])
    else:
        description.defaultFunctionName = functions[0].emitter.name
        for function in functions:
            described = description.functions.add(name=function.emitter.name)
            _describe(described, function)
    made = description.metadata
    made.shortDescription, made.versionString = metadata.description, metadata.version
    made.author, made.license = metadata.author, metadata.licence
    for key, text in metadata.user_defined.items():
        made.userDefined[key] = text
    return model


def _describe(description: Any, function: WrittenFunction) -> None:
    emitter, texts = function.emitter, function.texts
    for value in emitter.inputs:
        feature = description.input.add(name=value.name, shortDescription=texts[value.name])
        _describe_array(feature.type.multiArrayType, value, function.choices)
    for value in emitter.outputs:
        feature = description.output.add(name=value.name, shortDescription=texts[value.name])
        _describe_array(feature.type.multiArrayType, value, ())
    for value in emitter.states:
        feature = description.state.add(name=value.name, shortDescription=texts[value.name])
        _describe_array(feature.type.stateType.arrayType, value, ())


def _describe_array(array: Any, value: Value, choices: tuple[int, ...]) -> None:
    def with_tokens(count: int) -> Shape:
        return tuple(count if size < 0 else size for size in value.shape)

    array.dataType = ARRAY_TYPES[value.dtype]
    if -1 not in value.shape:
        array.shape.extend(value.shape)
        return
    array.shape.extend(with_tokens(choices[0]))
    for count in choices:
        array.enumeratedShapes.shapes.add(shape=with_tokens(count))


def write_manifest(package: Path) -> None:
    """Writes the package's ``Manifest.json``, whose identifiers do not change."""
    model, weights = (str(uuid.uuid5(_NAMESPACE, path)) for path in (MODEL_PATH, WEIGHTS_PATH))
    contents = {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": {
            model: {
                "author": _AUTHOR,
                "description": "CoreML Model Specification",
                "name": Path(MODEL_PATH).name,
                "path": MODEL_PATH.removeprefix(_DATA),
            },
            weights: {
                "author": _AUTHOR,
                "description": "CoreML Model Weights",
                "name": "weights",
                "path": str(Path(WEIGHTS_PATH).parent).removeprefix(_DATA),
            },
        },
        "rootModelIdentifier": model,
    }
    text = json.dumps(contents, indent=4, sort_keys=True)
    (package / "Manifest.json").write_text(text + "\n", encoding="utf-8")
