"""A model whose weights are rotated before they are quantized.

The linears that write the residual stream are rotated, and those that read it are rotated back; so
are the linears that make and read attention's values (`quant.program.rotation_places`). The program
therefore computes the same function as before. The scale of a norm moves into the linear that reads
the norm. A head that is tied to the embedding cannot take the scale of the norm before it, because
the embedding would take it too: either the head becomes a matrix of its own, or the scale becomes a
matrix ``Q^T diag(g) Q`` between norm and head.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import torch

from edgeforge.errors import UsageError
from edgeforge.families.assembly import EMBEDDING, HEAD, NORM_MATRIX
from edgeforge.families.spec import ModelSpec, WeightSpec
from edgeforge.model.checkpoint_weights import CheckpointWeights
from edgeforge.model.model import Model
from edgeforge.model.rotations import ROTATIONS, RotationKind, find_rotation
from exporters.manifest_records import RotationRecord
from quant.plans.plan import FLOAT32, QuantPlan, matrix_shape
from quant.program.rotation_places import ResidualPlaces, ValuePlace, residual_places, value_places
from quant.quantizers.hadamard import ROTATION_VERSION, Rotation, random_hadamard
from quant.store.fill import cast_rows

if TYPE_CHECKING:
    from quant.program.program import Program

SEED: Final = 0
# Elements that are in float64 at a time, of a weight that must be rotated as a whole.
_BLOCK_WEIGHTS: Final = 1 << 22
# Whole rotated weights that stay in memory while several threads read their rows.
_KEPT: Final = 2


_ADDED: Final = {
    HEAD: "the head, which the checkpoint ties to the embedding, is a matrix of its own",
    NORM_MATRIX: "the last norm's scale is a matrix, so that the head stays tied to the embedding",
}


@dataclass(frozen=True)
class Rotated:
    """A rotated model and its program.

    Attributes:
        model: the model with the spec and the weights of the rotated program.
        program: the rotated program, in the float dialect.
        record: the rotation, as a manifest records it.
        added: name of the matrix that the checkpoint's own model does not have; None if there is
            none.
    """

    model: Model
    program: Program
    record: RotationRecord
    added: str | None

    def notes(self, plan: QuantPlan) -> tuple[str, ...]:
        """Returns what a user must know about the rotation, one sentence each.

        Args:
            plan: the plan of the rotated weights.
        """
        name = self.record.name
        notes = [
            f"weights were rotated before they were quantized ({name}: {ROTATIONS[name].about}); "
            f"relative errors are those of the rotated weights"
        ]
        if self.added is not None:
            shape = self.model.spec.weights[self.added].shape
            nbytes = plan.weights[self.added].format.nbytes(*matrix_shape(shape))
            notes.append(f"{_ADDED[self.added]}: {nbytes:,} bytes, counted in the bits a weight")
        return tuple(notes)


def rotate(model: Model, name: str, context: int, seed: int = SEED) -> Rotated:
    """Rotates a model; its weights are read and rotated only when a later stage asks for them.

    Args:
        model: the opened model.
        name: a name from `edgeforge.model.rotations`.
        context: declared context of the program to trace, tokens.
        seed: seed of the rotation's random signs.

    Raises:
        UsageError: there is no such rotation, or the checkpoint holds integers.
        QuantizationError: the program has no place for the rotation.
    """
    from edgeforge.model.trace import trace

    kind = find_rotation(name)
    if model.weights.imported:
        method = model.weights.method
        raise UsageError(
            f"--rotation {name} is not possible: the checkpoint holds "
            f"{next(iter(model.weights.imported))} as integers "
            f"({'quantized' if method is None else method.method}), which would have to be "
            f"quantized again: leave the option out, or give the original checkpoint"
        )
    spec = rotated_spec(model.spec, kind)
    program = trace(spec, context)
    places = residual_places(program) if kind.residual else None
    weights = RotatedWeights(
        model.weights, spec, places, value_places(program), f"{name}/{ROTATION_VERSION}/{seed}"
    )
    record = RotationRecord(name, ROTATION_VERSION, seed)
    added = next((weight for weight in spec.weights if weight not in model.spec.weights), None)
    return Rotated(replace(model, spec=spec, weights=weights), program, record, added)


def recorded_rotation(model: Model, record: RotationRecord, context: int) -> Rotated:
    """Returns the rotated model from which an artifact was made.

    Args:
        model: the checkpoint's own model.
        record: the rotation that the manifest records.
        context: the artifact's declared context, tokens.

    Raises:
        UsageError: another version of the rotation made the artifact.
    """
    if record.version != ROTATION_VERSION:
        raise UsageError(
            f"the artifact's rotation has version {record.version!r}; this EdgeForge makes version "
            f"{ROTATION_VERSION}: export the model again"
        )
    return rotate(model, record.name, context, record.seed)


def rotated_spec(spec: ModelSpec, kind: RotationKind) -> ModelSpec:
    """Returns the spec of the rotated program."""
    if not kind.residual or not spec.tied:
        return spec
    embedding = spec.weights[EMBEDDING]
    if kind.untied:
        head = WeightSpec(embedding.shape, embedding.pieces, "head")
        return replace(spec, tied=False, weights={**spec.weights, HEAD: head})
    matrix = WeightSpec((spec.hidden_size, spec.hidden_size), (), "norm")
    weights = {**spec.weights, NORM_MATRIX: matrix}
    return replace(spec, norm_matrix=True, weights=weights)


class RotatedWeights(CheckpointWeights):
    """Weights of a checkpoint, rotated as they are read; safe from several threads.

    Args:
        base: the checkpoint's weights.
        spec: the spec of the rotated program.
        residual: the weights on both sides of the residual stream; None where it is not rotated.
        values: the weights on both sides of each layer's values.
        seed: text that decides the rotation's random signs.
    """

    def __init__(
        self,
        base: CheckpointWeights,
        spec: ModelSpec,
        residual: ResidualPlaces | None,
        values: Sequence[ValuePlace],
        seed: str,
    ) -> None:
        super().__init__(base.checkpoint, spec, base.method, base.adaptation)
        self._seed = seed
        self._residual = residual or ResidualPlaces("", {}, frozenset())
        self._stream = random_hadamard(spec.hidden_size, f"{seed}/stream")
        self._norms = frozenset(self._residual.readers.values())
        self._makers = {place.maker: place for place in values}
        self._readers = {reader: place for place in values for reader in place.readers}
        self._biases = {place.bias: place for place in values if place.bias is not None}
        self._kept: dict[str, torch.Tensor] = {}
        self._lock = threading.Lock()

    def pieces(self, name: str) -> Sequence[tuple[str, int]]:
        """Returns a checkpoint's pieces; a weight without tensors is one piece with its name."""
        weight = self.spec.weights[name]
        return super().pieces(name) if weight.pieces else ((name, weight.shape[0]),)

    def mapping_digest(self) -> str:
        """Returns a digest of the map from weights to tensors, and of the rotation."""
        text = f"{super().mapping_digest()} {self._seed}"
        return hashlib.sha256(text.encode()).hexdigest()

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Returns rows of a rotated weight: ``float32[stop - start, columns]``; 1 for a vector."""
        if name in self._residual.writers:
            return self._whole(name)[start:stop].clone()
        return self.exact_rows(name, start, stop).float()

    def float_rows(self, name: str, tokens: torch.Tensor) -> torch.Tensor:
        """Returns rows of an embedding as ``float32``: ``int64[b, t] -> [b, t, columns]``."""
        rows, where = torch.unique(tokens, return_inverse=True)
        read = torch.cat([self._read(name, row, row + 1) for row in rows.tolist()])
        return self._rotate_columns(name, read).float()[where]

    def _read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Returns rows before they are rotated.

        Raises:
            QuantizationError: an element is not finite; a rotation would spread it.
        """
        weight = self.spec.weights[name]
        if not weight.pieces:
            return torch.eye(weight.shape[1], dtype=torch.float64)[start:stop]
        rows = super().read_rows(name, start, stop)
        if not bool(rows.isfinite().all()):
            cast_rows(rows, FLOAT32, name, first_row=start)  # raises, with the element's place
        return rows

    def _rotate_columns(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Rotates a weight's input columns, or an embedding's output columns; returns float64."""
        residual, rotated = self._residual, rows.double()
        if name in residual.readers:
            norm = super().read_rows(residual.readers[name], 0, 1)
            rotated = rotated * norm.double()
        # A bias is one row, which the rotation of its linear's rows turns as if it were columns.
        if name in residual.readers or name in residual.biases or name == residual.embedding:
            rotated = self._stream.rotate_columns(rotated)
        if name in self._biases:
            place = self._biases[name]
            first, last = place.first_row, place.first_row + place.kv_heads * place.width
            rotated[:, first:last] = self._values(place).rotate_columns(rotated[:, first:last])
        if name in self._readers:
            place = self._readers[name]
            heads = self._values(place).repeated(place.heads // place.kv_heads)
            rotated = heads.rotate_columns(rotated)
        return rotated

    def exact_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Returns the rows of `read_rows` as float64, before they are rounded to float32.

        Rows of values are mixed within a head, so whole heads of them are read. The rows of a
        weight that adds to the residual stream are all mixed, so all of it is read.
        """
        if name in self._norms:
            return torch.ones(1, self.spec.weights[name].shape[0], dtype=torch.float64)
        if name in self._residual.writers:
            return torch.cat(list(self._blocks(name)), 1)[start:stop]
        place = self._makers.get(name)
        if place is None:
            return self._rotate_columns(name, self._read(name, start, stop))
        first, width = place.first_row, place.width
        last = first + place.kv_heads * width
        # Rows of values are mixed within a head, so the range is widened to whole heads.
        begin = start if not first <= start < last else start - (start - first) % width
        end = stop if not first < stop <= last else stop + (first - stop) % width
        rows = self._rotate_columns(name, self._read(name, begin, end))
        low, high = max(begin, first), min(end, last)
        if low < high:
            values = self._values(place).part(low - first, high - first)
            rows[low - begin : high - begin] = values.rotate_rows(rows[low - begin : high - begin])
        return rows[start - begin : stop - begin]

    def _values(self, place: ValuePlace) -> Rotation:
        return random_hadamard(place.width, f"{self._seed}/{place.maker}", place.kv_heads)

    def _blocks(self, name: str) -> Iterator[torch.Tensor]:
        """Yields blocks of columns, in float64, of a weight that adds to the residual stream.

        A rotation mixes all rows of such a weight, but no two of its columns. The blocks together
        are the whole weight before it is rounded to float32.
        """
        rows, columns = self.spec.weights[name].shape
        read = self._read(name, 0, rows)
        if name in self._readers or name in self._residual.readers:
            read = self._rotate_columns(name, read)
        step = max(1, _BLOCK_WEIGHTS // rows)
        for at in range(0, columns, step):
            yield self._stream.rotate_rows(read[:, at : at + step])

    def _whole(self, name: str) -> torch.Tensor:
        """Returns a whole weight that adds to the residual stream, in float32."""
        with self._lock:  # other threads want the same weight; memory may not hold it twice
            if name not in self._kept:
                while len(self._kept) >= _KEPT:
                    del self._kept[next(iter(self._kept))]
                self._kept[name] = torch.cat([block.float() for block in self._blocks(name)], 1)
            return self._kept[name]
