"""`CheckpointWeights`: program weights read, row by row, from where a checkpoint keeps them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from edgeforge.errors import CheckpointError
from edgeforge.families.assembly import EMBEDDING, HEAD
from edgeforge.spec import ModelSpec, Piece, WeightSpec

if TYPE_CHECKING:
    import torch

    from edgeforge.checkpoint import Checkpoint

_READABLE = ("bfloat16", "float16", "float32")

# Compared at a time, where files hold a head beside the embedding that it is tied to.
_COMPARED_WEIGHTS = 1 << 22


class CheckpointWeights:
    """Reads the weights of a spec from its checkpoint; safe from several threads.

    Args:
        checkpoint: where the tensors are.
        spec: which of them make up each weight.

    Raises:
        CheckpointError: a tensor is missing, unexpected, or of a wrong shape or dtype.
    """

    def __init__(self, checkpoint: Checkpoint, spec: ModelSpec) -> None:
        self.checkpoint, self.spec = checkpoint, spec
        _check_tensors(checkpoint, spec)
        _check_head(checkpoint, spec)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape by program weight name, in the program's order."""
        return {name: weight.shape for name, weight in self.spec.weights.items()}

    def roles(self) -> Mapping[str, str]:
        """Role by program weight name."""
        return {name: weight.role for name, weight in self.spec.weights.items()}

    def pieces(self, name: str) -> Sequence[tuple[str, int]]:
        """The checkpoint tensors a weight is stacked from, and their rows; a vector is one row."""
        weight = self.spec.weights[name]
        if len(weight.shape) == 1:
            return ((weight.pieces[0].tensor, 1),)
        return tuple((piece.tensor, piece.shape[0]) for piece in weight.pieces)

    def mapping_digest(self) -> str:
        """Digest of the map from program weights to checkpoint tensors."""
        rows = {
            name: [(piece.tensor, piece.shape) for piece in weight.pieces]
            for name, weight in self.spec.weights.items()
        }
        return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows of a weight in the checkpoint's dtype: ``[stop - start, columns]``.

        A vector is one row. Rows that span pieces of several dtypes come as float32.
        """
        import torch

        weight = self.spec.weights[name]
        if len(weight.shape) == 1:
            return self._piece(weight.pieces[0], 0, weight.shape[0]).reshape(1, -1)
        found = []
        begin = 0
        for piece in weight.pieces:
            end = begin + piece.shape[0]
            if start < end and stop > begin:
                found.append(self._piece(piece, max(start, begin) - begin, min(stop, end) - begin))
            begin = end
        if len(found) == 1:
            return found[0]
        # Of several dtypes it makes float32, bfloat16 beside float16 included.
        return torch.cat(found)

    def _piece(self, piece: Piece, start: int, stop: int) -> torch.Tensor:
        import torch

        rows = torch.from_numpy(self.checkpoint.read_rows(piece.tensor, start, stop))
        entry = self.checkpoint.tensors[piece.tensor]
        return rows.view(torch.bfloat16) if entry.dtype == "bfloat16" else rows

    def float_weight(self, name: str) -> torch.Tensor:
        """A whole weight as ``float32``, of the spec's shape."""
        weight: WeightSpec = self.spec.weights[name]
        rows = 1 if len(weight.shape) == 1 else weight.shape[0]
        return self.read_rows(name, 0, rows).float().reshape(weight.shape)

    def float_rows(self, name: str, tokens: torch.Tensor) -> torch.Tensor:
        """Rows of an embedding as ``float32``: ``int64[b, t] -> [b, t, columns]``."""
        import torch

        rows, where = torch.unique(tokens, return_inverse=True)
        read = [self.read_rows(name, row, row + 1) for row in rows.tolist()]
        return torch.cat(read).float()[where]


def _check_head(checkpoint: Checkpoint, spec: ModelSpec) -> None:
    """Refuses a tied model whose files hold a head other than the embedding."""
    if not spec.tied or HEAD not in checkpoint.tensors:
        return
    (embedding,) = spec.weights[EMBEDDING].pieces
    rows, columns = embedding.shape
    step = max(1, _COMPARED_WEIGHTS // columns)
    head, stored = checkpoint.tensors[HEAD], checkpoint.tensors[embedding.tensor]
    same = (head.shape, head.dtype) == (stored.shape, stored.dtype) and all(
        checkpoint.read_rows(HEAD, at, min(at + step, rows)).tobytes()
        == checkpoint.read_rows(embedding.tensor, at, min(at + step, rows)).tobytes()
        for at in range(0, rows, step)
    )
    if not same:
        raise CheckpointError(
            f"config.json ties the head to the embedding, but the checkpoint holds a {HEAD} that "
            f"differs from {embedding.tensor}: if that head is meant, let config.json say that it "
            f"is not tied"
        )


def _check_tensors(checkpoint: Checkpoint, spec: ModelSpec) -> None:
    wanted = {p.tensor: p for w in spec.weights.values() for p in w.pieces}
    missing = [name for name in wanted if name not in checkpoint.tensors]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"the checkpoint lacks {missing[0]}{more}, which its config.json "
            f"({spec.model_type}, {len(spec.layers)} layers) calls for"
        )
    extra = [
        name
        for name in checkpoint.tensors
        if name not in wanted and not any(fnmatchcase(name, known) for known in spec.ignored)
    ]
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise CheckpointError(
            f"the checkpoint holds {extra[0]}{more}, which a {spec.model_type} of this config.json "
            f"has no use for: the two do not belong together, or the model is of another kind"
        )
    for name, piece in wanted.items():
        entry = checkpoint.tensors[name]
        if entry.shape != piece.shape:
            raise CheckpointError(
                f"{name} has shape {list(entry.shape)}; config.json calls for {list(piece.shape)}"
            )
        if entry.dtype not in _READABLE:
            raise CheckpointError(
                f"{name} is {entry.dtype}; weights are read as {', '.join(_READABLE)}"
            )
