"""A model whose weights are rotated before they are quantized.

Linears on both sides of the residual stream, and of attention's values, take a rotation each
(`quant.program.rotation_places`), so that the program computes what it did. A head that is tied to
the embedding cannot take the scale of the norm before it, for the embedding would: either it
becomes a matrix of its own, or the scale becomes a matrix ``Q^T diag(g) Q`` between norm and head.
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
# Of a weight that must be rotated as a whole, this many elements at a time are in float64.
_BLOCK_WEIGHTS: Final = 1 << 22
# Rotated weights that are kept, for a store is filled from them row by row by several threads.
_KEPT: Final = 2


_ADDED: Final = {
    HEAD: "the head, which the checkpoint ties to the embedding, is a matrix of its own",
    NORM_MATRIX: "the last norm's scale is a matrix, so that the head stays tied to the embedding",
}


@dataclass(frozen=True)
class Rotated:
    """A rotated model and its program.

    Attributes:
        model: its spec and weights are of the rotated program.
        program: in the float dialect.
        record: of the rotation, as a manifest keeps it.
        added: the matrix that the checkpoint's own model does not have, if any.
    """

    model: Model
    program: Program
    record: RotationRecord
    added: str | None

    def notes(self, plan: QuantPlan) -> tuple[str, ...]:
        """What a user must know of it, one sentence each.

        Args:
            plan: of the rotated weights.
        """
        name = self.record.name
        notes = [
            f"weights were rotated before they were quantized ({name}: {ROTATIONS[name].about}); "
            f"relative errors are of the rotated weights"
        ]
        if self.added is not None:
            shape = self.model.spec.weights[self.added].shape
            nbytes = plan.weights[self.added].format.nbytes(*matrix_shape(shape))
            notes.append(f"{_ADDED[self.added]}: {nbytes:,} bytes, counted in the bits a weight")
        return tuple(notes)


def rotate(model: Model, name: str, context: int, seed: int = SEED) -> Rotated:
    """Rotates a model; nothing is read yet.

    Args:
        model: opened.
        name: of `edgeforge.model.rotations`.
        context: of the program to trace.
        seed: of the signs.

    Raises:
        UsageError: no such rotation, or a checkpoint that holds integers.
        QuantizationError: a program that has no place for it.
    """
    from edgeforge.model.trace import trace

    kind = find_rotation(name)
    if model.weights.imported:
        packing = model.weights.packing
        raise UsageError(
            f"--rotation {name} is not possible: the checkpoint holds "
            f"{next(iter(model.weights.imported))} as integers "
            f"({'quantized' if packing is None else packing.method}), which would have to be "
            f"quantized again: leave it out, or give the original checkpoint"
        )
    spec = _rotated_spec(model.spec, kind)
    program = trace(spec, context)
    places = residual_places(program) if kind.residual else None
    weights = RotatedWeights(
        model.weights, spec, places, value_places(program), f"{name}/{ROTATION_VERSION}/{seed}"
    )
    record = RotationRecord(name, ROTATION_VERSION, seed)
    added = next((weight for weight in spec.weights if weight not in model.spec.weights), None)
    return Rotated(replace(model, spec=spec, weights=weights), program, record, added)


def recorded_rotation(model: Model, record: RotationRecord, context: int) -> Rotated:
    """The rotated model that an artifact was made of.

    Args:
        model: the checkpoint's own.
        record: what the manifest keeps.
        context: of the artifact.

    Raises:
        UsageError: it was rotated by another version.
    """
    if record.version != ROTATION_VERSION:
        raise UsageError(
            f"the artifact's rotation has version {record.version!r}; this EdgeForge makes "
            f"{ROTATION_VERSION}: export the model again"
        )
    return rotate(model, record.name, context, record.seed)


def _rotated_spec(spec: ModelSpec, kind: RotationKind) -> ModelSpec:
    """The spec of the rotated program."""
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
        base: the checkpoint's.
        spec: of the rotated program.
        residual: where the residual stream is rotated; None where it is not.
        values: where values are.
        seed: decides the signs.
    """

    def __init__(
        self,
        base: CheckpointWeights,
        spec: ModelSpec,
        residual: ResidualPlaces | None,
        values: Sequence[ValuePlace],
        seed: str,
    ) -> None:
        super().__init__(base.checkpoint, spec)
        self._seed = seed
        self._residual = residual or ResidualPlaces("", {}, frozenset())
        self._stream = random_hadamard(spec.hidden_size, f"{seed}/stream")
        self._norms = frozenset(self._residual.readers.values())
        self._makers = {place.maker: place for place in values}
        self._readers = {place.reader: place for place in values}
        self._kept: dict[str, torch.Tensor] = {}
        self._lock = threading.Lock()

    def pieces(self, name: str) -> Sequence[tuple[str, int]]:
        """As for a checkpoint; a weight that no tensor holds is one piece of its own name."""
        weight = self.spec.weights[name]
        return super().pieces(name) if weight.pieces else ((name, weight.shape[0]),)

    def mapping_digest(self) -> str:
        """Digest of the map from program weights to checkpoint tensors, and of the rotation."""
        text = f"{super().mapping_digest()} {self._seed}"
        return hashlib.sha256(text.encode()).hexdigest()

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows of a rotated weight: ``float32[stop - start, columns]``; a vector is one row."""
        if name in self._residual.writers:
            return self._whole(name)[start:stop].clone()
        return self.exact_rows(name, start, stop).float()

    def float_rows(self, name: str, tokens: torch.Tensor) -> torch.Tensor:
        """Rows of an embedding as ``float32``: ``int64[b, t] -> [b, t, columns]``."""
        rows, where = torch.unique(tokens, return_inverse=True)
        read = torch.cat([self._read(name, row, row + 1) for row in rows.tolist()])
        return self._rotate_columns(name, read).float()[where]

    def _read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows that are not rotated yet.

        Raises:
            QuantizationError: one is not finite, which a rotation would spread.
        """
        weight = self.spec.weights[name]
        if not weight.pieces:
            return torch.eye(weight.shape[1], dtype=torch.float64)[start:stop]
        rows = super().read_rows(name, start, stop)
        if not bool(rows.isfinite().all()):
            cast_rows(rows, FLOAT32, name, first_row=start)  # says what it is, and where
        return rows

    def _rotate_columns(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """What a rotation makes of a weight's inputs, or of an embedding's outputs: float64."""
        residual, rotated = self._residual, rows.double()
        if name in residual.readers:
            norm = super().read_rows(residual.readers[name], 0, 1)
            rotated = rotated * norm.double()
        if name in residual.readers or name == residual.embedding:
            rotated = self._stream.rotate_columns(rotated)
        if name in self._readers:
            place = self._readers[name]
            heads = self._values(place).repeated(place.heads // place.kv_heads)
            rotated = heads.rotate_columns(rotated)
        return rotated

    def exact_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows before they are rounded to float32: float64, as `read_rows` gives them.

        Not of a weight that adds to the residual stream: see `exact_blocks`. Such rows are read one
        by one, but for whole heads of values.
        """
        if name in self._norms:
            return torch.ones(1, self.spec.weights[name].shape[0], dtype=torch.float64)
        place = self._makers.get(name)
        if place is None:
            return self._rotate_columns(name, self._read(name, start, stop))
        first, width = place.first_row, place.width
        last = first + place.kv_heads * width
        # Values' rows are mixed within a head: as much is read as holds whole ones.
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

    def exact_blocks(self, name: str) -> Iterator[torch.Tensor]:
        """Columns of a weight that adds to the residual stream, whose rows are mixed: float64.

        Together they are the whole weight before it is rounded to float32.
        """
        rows, columns = self.spec.weights[name].shape
        read = self._read(name, 0, rows)
        if name in self._readers or name in self._residual.readers:
            read = self._rotate_columns(name, read)
        step = max(1, _BLOCK_WEIGHTS // rows)
        for at in range(0, columns, step):
            yield self._stream.rotate_rows(read[:, at : at + step])

    def _whole(self, name: str) -> torch.Tensor:
        """A weight whose rows are mixed: float32."""
        with self._lock:  # other threads will want the same one, and memory holds no second
            if name not in self._kept:
                while len(self._kept) >= _KEPT:
                    del self._kept[next(iter(self._kept))]
                self._kept[name] = torch.cat(
                    [block.float() for block in self.exact_blocks(name)], 1
                )
            return self._kept[name]
