"""`Activations`: every block's values between stretches, in memory up to a bound, else on disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from torch import Tensor, fx

from edgeforge.reference.walk import Values


@dataclass(frozen=True)
class _Spilled:
    """A float32 tensor in a file of its own."""

    file: Path
    shape: tuple[int, ...]

    def load(self) -> Tensor:
        return torch.from_numpy(np.fromfile(self.file, np.float32)).view(self.shape)


class Activations:
    """Blocks' values between stretches; several threads may use it, each with its own block.

    Args:
        blocks: each block's values at the beginning.
        folder: folder for tensors over ``bound``.
        bound: bytes of tensors that stay in memory.
    """

    def __init__(self, blocks: Sequence[Values], folder: Path, bound: int) -> None:
        self._blocks: list[Values] = list(blocks)
        self._folder, self._bound, self._held = folder, bound, 0
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._blocks)

    def take(self, index: int) -> Values:
        """Removes and returns a block's values; the caller changes them and puts them back."""
        kept, self._blocks[index] = self._blocks[index], {}
        values: Values = {}
        for node, value in kept.items():
            if isinstance(value, _Spilled):
                values[node] = value.load()
                value.file.unlink()
                continue
            values[node] = value
            if _counts(value):
                with self._lock:
                    self._held -= value.nbytes
        return values

    def put(self, index: int, values: Values) -> None:
        """Stores a block's values; tensors over the bound go to disk."""
        kept: Values = {}
        for node, value in values.items():
            if not _counts(value):
                kept[node] = value
                continue
            # A view would keep the whole tensor that it is a view of in memory.
            whole = value.untyped_storage().nbytes() == value.nbytes
            own = value.contiguous() if whole else value.clone()
            with self._lock:
                fits = self._held + own.nbytes <= self._bound
                self._held += own.nbytes if fits else 0
            kept[node] = own if fits else self._spill(f"{index}-{node.name}", own)
        self._blocks[index] = kept

    def tensor(self, index: int, node: fx.Node) -> Tensor:
        """Returns a block's value of one node, which stays stored."""
        value = self._blocks[index][node]
        found = value.load() if isinstance(value, _Spilled) else value
        assert isinstance(found, Tensor)
        return found

    def tensors(self, node: fx.Node) -> Iterator[Tensor]:
        """Returns every block's value of one node, in order."""
        return (self.tensor(index, node) for index in range(len(self)))

    def numbers(self, index: int) -> dict[str, int]:
        """Returns a block's integers by node name."""
        return {n.name: v for n, v in self._blocks[index].items() if isinstance(v, int)}

    def _spill(self, name: str, value: Tensor) -> _Spilled:
        file = self._folder / f"{name}.bin"
        value.numpy().tofile(file)
        return _Spilled(file, tuple(value.shape))


def _counts(value: object) -> bool:
    """Returns whether a value counts against the bound: activations do, tokens and sizes do not."""
    return isinstance(value, Tensor) and value.dtype == torch.float32
