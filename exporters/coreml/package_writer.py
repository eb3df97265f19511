"""The files of an ``.mlpackage`` around a program: descriptions, metadata, table of contents."""

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
# Identifiers within a package have no meaning beyond it; fixed ones keep exports identical.
_NAMESPACE: Final = uuid.UUID("4f2b53d5-5f05-5d0a-9d0c-3b1a0e5c3a51")


@dataclass(frozen=True)
class Metadata:
    """What Xcode and apps show of a package.

    Attributes:
        description: a sentence.
        version: of the model.
        author: who made the weights; empty when that is not known.
        licence: of the weights; likewise.
        user_defined: whatever else, by key.
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
        choices: the numbers of tokens a call may take, where there are several.
        texts: a sentence by input, output or state.
    """

    emitter: Emitter
    choices: tuple[int, ...]
    texts: Mapping[str, str]


def model_message(functions: Sequence[WrittenFunction], version: int, metadata: Metadata) -> Any:
    """The whole model.

    Args:
        functions: the first is the default one. A single one is described as the model itself,
            which every version of the specification knows.
        version: of the specification.
        metadata: what apps read.
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
    """Writes the package's table of contents, whose identifiers do not change."""
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
