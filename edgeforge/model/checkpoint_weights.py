"""`CheckpointWeights`: reads program weights by rows from the tensors of a checkpoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from edgeforge.errors import CheckpointError
from edgeforge.families.assembly import EMBEDDING, HEAD
from edgeforge.families.spec import ModelSpec, Piece, WeightSpec
from edgeforge.model.adaptation import Adaptation
from edgeforge.model.foreign_tensors import explain
from edgeforge.model.stored_forms import find_forms, imported_formats
from edgeforge.model.stored_names import named_as_stored

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from edgeforge.checkpoint.checkpoint import Checkpoint
    from edgeforge.checkpoint.imported.decoded_tensor import DecodedTensor
    from edgeforge.checkpoint.imported.integer_tensor import IntegerTensor
    from edgeforge.checkpoint.imported.method import Method
    from edgeforge.checkpoint.tensor_entry import TensorEntry
    from edgeforge.reference.walk import Walk
    from quant.formats.formats import FloatName, IntFormat, WeightFormat
    from quant.program.program import Program
    from quant.quantizers.rtn import QuantizedRows

_READABLE = ("bfloat16", "float16", "float32")

# Elements that `_check_head` compares at a time.
COMPARED_WEIGHTS = 1 << 22


class CheckpointWeights:
    """Reads the weights of a spec from its checkpoint; safe from several threads.

    Args:
        checkpoint: the checkpoint that has the tensors.
        spec: the model's spec, which says of which tensors each weight is made; where the files
            have other names for them, the attribute ``spec`` has those.
        method: how the checkpoint holds matrices that are no plain floats; None when all are.
        adaptation: how adapters change the checkpoint's tensors; the spec is then the changed
            model's, with the names that the checkpoint's tensors have.

    Attributes:
        imported: the weights that the checkpoint holds as integers, each with the format that
            stores it exactly.

    Raises:
        CheckpointError: a tensor is missing or unexpected, or has a wrong shape or dtype.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: ModelSpec,
        method: Method | None = None,
        adaptation: Adaptation | None = None,
    ) -> None:
        if adaptation is None:
            spec = named_as_stored(spec, checkpoint.tensors)
        self.checkpoint, self.spec, self.method = checkpoint, spec, method
        self.adaptation = adaptation or Adaptation()
        replaced = {name: each.entry for name, each in self.adaptation.replaced.items()}
        self._tensors: Mapping[str, TensorEntry] = {**checkpoint.tensors, **replaced}
        self._packed: dict[str, IntegerTensor] = {}
        self._decoded: dict[str, DecodedTensor] = {}
        if method is not None:
            self._packed, self._decoded = find_forms(checkpoint, spec, method, self.adaptation)
        _check_tensors(self._tensors, spec, {**self._packed, **self._decoded})
        _check_head(checkpoint, spec)
        self.imported: Mapping[str, IntFormat] = imported_formats(spec, self._packed)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Returns each weight's shape by program name, in the program's order."""
        return {name: weight.shape for name, weight in self.spec.weights.items()}

    def roles(self) -> Mapping[str, str]:
        """Returns each weight's role by program name."""
        return {name: weight.role for name, weight in self.spec.weights.items()}

    def pieces(self, name: str) -> Sequence[tuple[str, int]]:
        """Returns the tensors that make up a weight, each with its rows; a vector is one row."""
        weight = self.spec.weights[name]
        if len(weight.shape) == 1:
            return tuple(
                (piece.tensor, int(not index)) for index, piece in enumerate(weight.pieces)
            )
        if weight.transposed:
            return ((weight.pieces[0].tensor, weight.shape[0]),)
        return tuple((piece.tensor, piece.shape[0]) for piece in weight.pieces)

    def mapping_digest(self) -> str:
        """Returns a digest of the map from program weights to checkpoint tensors."""
        rows: dict[str, object] = {
            name: [(piece.tensor, piece.shape, piece.first) for piece in weight.pieces]
            for name, weight in self.spec.weights.items()
        }
        added = {name: each.added for name, each in self.spec.weights.items() if each.added}
        if added:
            rows["added"] = added
        changed = {
            name: (each.form, each.transposed)
            for name, each in self.spec.weights.items()
            if each.form != "plain" or each.transposed
        }
        if changed:
            rows["changed"] = changed
        if self.method is not None:
            rows["method"] = repr(self.method)
        if self.adaptation.adapters:
            rows["adapters"] = self.adaptation.digest_rows()
        return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()

    def stored_formats(self) -> dict[str, WeightFormat]:
        """Returns the format of each weight that stores it exactly as the checkpoint has it.

        One that an adapter changes has the format that it would have without.
        """
        from quant.formats.formats import FloatFormat

        formats: dict[str, WeightFormat] = {}
        for name, weight in self.spec.weights.items():
            if name in self.imported:
                formats[name] = self.imported[name]
                continue
            dtypes = {self._dtype(piece.tensor) for piece in weight.pieces}
            if weight.added or weight.form != "plain":
                dtypes.add("float32")
            formats[name] = FloatFormat(_float_name(dtypes))
        return formats

    def forms(self) -> dict[str, str]:
        """Returns what each weight was quantized to before, such as ``Q4_K``; others are absent."""
        found: dict[str, str] = {}
        for name, weight in self.spec.weights.items():
            held = [
                (self._packed.get(p.tensor) or self._decoded.get(p.tensor)) for p in weight.pieces
            ]
            forms = dict.fromkeys(each.form for each in held if each is not None and each.form)
            if forms:
                found[name] = "/".join(forms)
        return found

    def decoding_notes(self) -> tuple[str, ...]:
        """Returns what a user must know about integers that were read as floats or changed."""
        return () if self.method is None else self.method.notes()

    def _dtype(self, tensor: str) -> str:
        decoded = self._decoded.get(tensor)
        if decoded is None:
            return self._tensors[tensor].dtype
        # What was decoded from few bits needs no more than float16 holds.
        return "float16" if decoded.form is not None else decoded.dtype

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Returns rows of a weight in the checkpoint's dtype: ``[stop - start, columns]``.

        A vector is one row. Rows from pieces of different dtypes, values that are changed as they
        are read, and rows that an adapter changes are returned as float32.
        """
        import torch

        weight = self.spec.weights[name]
        if len(weight.shape) == 1:
            parts = [self._piece(piece, 0, piece.shape[0]) for piece in weight.pieces]
            row = (torch.cat(parts) if len(parts) > 1 else parts[0]).reshape(1, -1)
            return _changed(weight, row)
        if weight.transposed:
            (piece,) = weight.pieces
            whole = self._piece(piece, 0, piece.shape[0])
            return _changed(weight, whole.T[start:stop].contiguous())
        found = []
        begin = 0
        for piece in weight.pieces:
            end = begin + piece.shape[0]
            if start < end and stop > begin:
                found.append(self._piece(piece, max(start, begin) - begin, min(stop, end) - begin))
            begin = end
        # `torch.cat` promotes different dtypes to float32, also bfloat16 with float16.
        rows = found[0] if len(found) == 1 else torch.cat(found)
        return _changed(weight, rows.reshape(len(rows), -1))

    def imported_by_rows(self, name: str) -> bool:
        """Returns whether some rows of an imported weight are read for less than all of them."""
        return all(self._packed[piece.tensor].by_rows for piece in self.spec.weights[name].pieces)

    def imported_rows(self, name: str, start: int, stop: int, format: IntFormat) -> QuantizedRows:
        """Returns rows of an imported weight in the layout of `quant.formats.formats`.

        Args:
            name: a weight in `imported`.
            start: the first row in the weight.
            stop: the row after the last one; all rows are of one piece.
            format: the weight's format in `imported`, or the same format with bfloat16 scales; the
                scales are then rounded.

        Returns:
            The parts; squared error and norm are computed only where scales were rounded, else they
            are zero.
        """
        from edgeforge.checkpoint.imported.integer_tensor import import_rows

        begin = 0
        for piece in self.spec.weights[name].pieces:
            if begin <= start and stop <= begin + piece.shape[0]:
                rows = slice(piece.first + start - begin, piece.first + stop - begin)
                return import_rows(self._packed[piece.tensor], format, rows)
            begin += piece.shape[0]
        raise IndexError(f"rows {start} to {stop} of {name} are not of one of its pieces")

    def _piece(self, piece: Piece, start: int, stop: int) -> torch.Tensor:
        start, stop = piece.first + start, piece.first + stop
        rows = self._stored_rows(piece, start, stop)
        return self.adaptation.merged(piece.tensor, rows, start)

    def _stored_rows(self, piece: Piece, start: int, stop: int) -> torch.Tensor:
        """Returns rows of a tensor as its file has them."""
        import torch

        if piece.tensor in self._packed:
            return self._packed[piece.tensor].dequantize(slice(start, stop))
        if piece.tensor in self._decoded:
            return self._decoded[piece.tensor].read(start, stop)
        axes = 2 if piece.matrices else 1
        given = self.adaptation.replaced.get(piece.tensor)
        source = self.checkpoint if given is None else given.tensors
        stored = piece.tensor if given is None else given.stored
        rows = torch.from_numpy(source.read_rows(stored, start, stop, axes=axes))
        if rows.ndim > 2:  # a convolution's [columns, 1, width]
            rows = rows.flatten(1)
        entry = self._tensors[piece.tensor]
        return rows.view(torch.bfloat16) if entry.dtype == "bfloat16" else rows

    def float_weight(self, name: str) -> torch.Tensor:
        """Returns a whole weight as ``float32`` in the spec's shape."""
        weight: WeightSpec = self.spec.weights[name]
        rows = 1 if len(weight.shape) == 1 else weight.shape[0]
        return self.read_rows(name, 0, rows).float().reshape(weight.shape)

    def float_walk(self, program: Program) -> Walk:
        """Returns a walk of the float program with these weights."""
        from edgeforge.reference.walk import Walk

        return Walk(program, lambda given: self.float_weight(given.name), self.float_rows)

    def float_rows(self, name: str, tokens: torch.Tensor) -> torch.Tensor:
        """Returns rows of an embedding as ``float32``: ``int64[b, t] -> [b, t, columns]``."""
        import torch

        rows, where = torch.unique(tokens, return_inverse=True)
        # Rows that follow each other are read at once.
        ends = [*((rows[1:] - rows[:-1]) != 1).nonzero().flatten().tolist(), len(rows) - 1]
        starts = [0, *(end + 1 for end in ends[:-1])]
        read = [
            self.read_rows(name, int(rows[start]), int(rows[end]) + 1)
            for start, end in zip(starts, ends, strict=True)
        ]
        return torch.cat(read).float()[where]


def _changed(weight: WeightSpec, rows: torch.Tensor) -> torch.Tensor:
    """Returns a weight's values as the program has them, of the checkpoint's."""
    if weight.form == "negative_exponential":
        rows = -rows.float().exp()
    elif weight.form == "complement":
        rows = 1 - rows.float()
    return rows.float() + weight.added if weight.added else rows


def _check_head(checkpoint: Checkpoint, spec: ModelSpec) -> None:
    """Refuses a tied model whose files hold a head that differs from the embedding."""
    if not spec.tied or HEAD not in checkpoint.tensors:
        return
    (embedding,) = spec.weights[EMBEDDING].pieces
    if embedding.tensor != HEAD and not _are_equal(checkpoint, HEAD, embedding.tensor):
        raise CheckpointError(
            f"config.json ties the head to the embedding, but the checkpoint holds a {HEAD} that "
            f"differs from {embedding.tensor}: if the model is to use that head, change "
            f"config.json so that it is not tied"
        )


def _are_equal(checkpoint: Checkpoint, one: str, other: str) -> bool:
    """Whether two matrices hold the same numbers; their dtypes may differ."""
    first, second = checkpoint.tensors[one], checkpoint.tensors[other]
    if first.shape != second.shape:
        return False
    rows, columns = first.shape
    step = max(1, COMPARED_WEIGHTS // columns)
    pairs = (
        [checkpoint.read_rows(name, at, min(at + step, rows)) for name in (one, other)]
        for at in range(0, rows, step)
    )
    if first.dtype == second.dtype:
        return all(a.tobytes() == b.tobytes() for a, b in pairs)
    import torch

    def exact(rows: NDArray[np.generic], entry: TensorEntry) -> torch.Tensor:
        read = torch.from_numpy(rows)
        return (read.view(torch.bfloat16) if entry.dtype == "bfloat16" else read).float()

    return all(torch.equal(exact(a, first), exact(b, second)) for a, b in pairs)


def _float_name(dtypes: set[str]) -> FloatName:
    """Returns the dtype that stores tensors of all these dtypes exactly."""
    match sorted(dtypes):
        case ["bfloat16"]:
            return "bfloat16"
        case ["float16"]:
            return "float16"
        case _:
            return "float32"


def _check_tensors(
    tensors: Mapping[str, TensorEntry],
    spec: ModelSpec,
    found: Mapping[str, IntegerTensor | DecodedTensor],
) -> None:
    wanted = {p.tensor: p for w in spec.weights.values() for p in w.pieces if p.tensor not in found}
    parts = {name for tensor in found.values() for name in tensor.tensors}
    missing = [name for name in wanted if name not in tensors]
    extra = [
        name
        for name in tensors
        if name not in wanted
        and name not in parts
        and not any(fnmatchcase(name, known) for known in spec.ignored)
    ]
    if missing or extra:
        known = explain({n: e for n, e in tensors.items() if n not in parts})
        if known is not None:
            raise CheckpointError(f"the checkpoint {known}")
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"the checkpoint lacks {missing[0]}{more}, which its config.json "
            f"({spec.model_type}, {len(spec.layers)} layers) calls for"
        )
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise CheckpointError(
            f"the checkpoint holds {extra[0]}{more}, which a {spec.model_type} model with this "
            f"config.json does not have: config.json and weights do not belong together, or the "
            f"model is of another kind"
        )
    for name, piece in wanted.items():
        entry = tensors[name]
        if entry.shape != piece.tensor_shape:
            raise CheckpointError(
                f"{name} has shape {list(entry.shape)}; config.json calls for "
                f"{list(piece.tensor_shape)}"
            )
        if entry.dtype not in _READABLE:
            raise CheckpointError(
                f"{name} is {entry.dtype}; EdgeForge reads weights in {', '.join(_READABLE)}"
            )
