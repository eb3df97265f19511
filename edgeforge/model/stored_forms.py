"""Finds which tensors a checkpoint holds as integers, or in another form than floats."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING

from edgeforge.errors import CheckpointError
from edgeforge.families.spec import ModelSpec, Piece

if TYPE_CHECKING:
    from edgeforge.checkpoint.checkpoint import Checkpoint
    from edgeforge.checkpoint.imported.decoded_tensor import DecodedTensor
    from edgeforge.checkpoint.imported.integer_tensor import IntegerTensor
    from edgeforge.checkpoint.imported.method import Method
    from edgeforge.model.adaptation import Adaptation
    from quant.formats.formats import IntFormat


def find_forms(
    checkpoint: Checkpoint, spec: ModelSpec, method: Method, adaptation: Adaptation
) -> tuple[dict[str, IntegerTensor], dict[str, DecodedTensor]]:
    """Returns the tensors held as integers, and those to be decoded, by their names as floats.

    Integers that are stacked into one weight must be of one kind: others are decoded, where the
    method allows it, and so are those that an adapter changes.

    Raises:
        CheckpointError: parts are missing or wrong, kinds are mixed, or no tensor is of the method.
    """
    from edgeforge.checkpoint.imported.integer_tensor import IntegerTensor
    from edgeforge.checkpoint.imported.method import DecodableMethod

    packed: dict[str, IntegerTensor] = {}
    decoded: dict[str, DecodedTensor] = {}
    for piece in _pieces(spec):
        if any(piece.tensor in held for held in (packed, decoded, adaptation.replaced)):
            continue
        found = method.find(checkpoint, piece.tensor, piece.tensor_shape)
        if isinstance(found, IntegerTensor) and piece.tensor in adaptation.changes:
            found = _changed(found, method, piece.tensor, adaptation)
        if isinstance(found, IntegerTensor):
            packed[piece.tensor] = found
        elif found is not None:
            decoded[piece.tensor] = found
    read = {piece.tensor for piece in _pieces(spec)}
    for integers in packed.values():
        _refuse_unread_bias(checkpoint, integers, read, spec.model_type)
    if not packed and not decoded and method.sign != "*":
        raise CheckpointError(
            f"config.json says that the checkpoint is quantized ({method.method}), but no tensor "
            f"in it is named {method.sign}: config.json and weights do not belong together"
        )
    for name, weight in spec.weights.items():
        kinds = {
            (packed[piece.tensor].bits, packed[piece.tensor].group_size)
            if piece.tensor in packed
            else None
            for piece in weight.pieces
        }
        if len(kinds) < 2:
            continue
        if not isinstance(method, DecodableMethod):
            held = [piece.tensor in packed for piece in weight.pieces]
            raise CheckpointError(
                f"the checkpoint holds {weight.pieces[held.index(True)].tensor} as integers and "
                f"{weight.pieces[held.index(False)].tensor} as floats; EdgeForge stacks both into "
                f"{name}, so both must be of one kind: give the original checkpoint"
            )
        for piece in weight.pieces:
            if piece.tensor in packed:
                decoded[piece.tensor] = method.as_floats(packed.pop(piece.tensor))
    return packed, decoded


def _refuse_unread_bias(
    checkpoint: Checkpoint, held: IntegerTensor, read: Collection[str], model_type: str
) -> None:
    """Refuses a bias beside integers that the model does not read; some tools write one of zeros.

    Raises:
        CheckpointError: it is not zero.
    """
    for name in held.tensors:
        if name.endswith(".bias") and name not in read and checkpoint.read(name).any():
            raise CheckpointError(
                f"the checkpoint holds {name}, which is not zero: a {model_type} model with this "
                f"config.json has no bias there"
            )


def _changed(
    found: IntegerTensor, method: Method, tensor: str, adaptation: Adaptation
) -> DecodedTensor:
    """Returns integers that an adapter changes as floats.

    Raises:
        CheckpointError: the method's integers stay integers.
    """
    from edgeforge.checkpoint.imported.method import DecodableMethod

    if not isinstance(method, DecodableMethod):
        raise CheckpointError(
            f"the checkpoint holds {tensor} as integers ({method.method}), and the adapter "
            f"{adaptation.changes[tensor][0].adapter.source} would change it: give the original "
            f"checkpoint with --adapter"
        )
    return method.as_floats(found)


def _pieces(spec: ModelSpec) -> Iterator[Piece]:
    for weight in spec.weights.values():
        yield from weight.pieces


def imported_formats(spec: ModelSpec, packed: Mapping[str, IntegerTensor]) -> dict[str, IntFormat]:
    """Returns, by weight, the format that stores all of its pieces exactly.

    Raises:
        CheckpointError: no format can.
    """
    from dataclasses import replace

    formats = {}
    for name, weight in spec.weights.items():
        found = [packed[piece.tensor].format() for piece in weight.pieces if piece.tensor in packed]
        if found:
            exact = all(format.scale_dtype == "bfloat16" for format in found)
            formats[name] = replace(
                found[0],
                symmetric=all(format.symmetric for format in found),
                scale_dtype="bfloat16" if exact else "float16",
            )
    return formats
