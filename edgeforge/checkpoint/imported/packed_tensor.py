"""`PackedTensor`: the integers and scales of one linear layer of a quantized checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeforge.checkpoint.imported.integer_tensor import ALL, IntegerTensor
from edgeforge.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from edgeforge.checkpoint.checkpoint import Checkpoint
    from edgeforge.checkpoint.imported.packing import Packing


class PackedTensor(IntegerTensor):
    """A linear layer of ``rows`` outputs and ``columns`` inputs; safe from several threads.

    Args:
        checkpoint: the checkpoint that has the layer's tensors.
        module: the layer's name, without ``.weight``.
        packing: the checkpoint's layout of quantized layers.
        shape: rows and columns that the configuration calls for.

    Raises:
        CheckpointError: a part is missing or has another shape or dtype, or columns are not grouped
            in their order.
    """

    def __init__(
        self, checkpoint: Checkpoint, module: str, packing: Packing, shape: tuple[int, int]
    ) -> None:
        self.checkpoint, self.module, self.packing = checkpoint, module, packing
        rows, columns = shape
        words = 32 // packing.bits
        if columns % words or rows % words:
            raise CheckpointError(
                f"{module} has {rows} outputs and {columns} inputs; {packing.method} packs {words} "
                f"codes in a word, and EdgeForge reads full words only: both must be multiples of "
                f"{words}"
            )
        super().__init__(module, shape, packing.bits, packing.group_size)
        self._check_parts()
        self._check_order()

    @property
    def tensors(self) -> tuple[str, ...]:
        """The checkpoint's tensors that belong to this layer, its bias among them."""
        names = (*self.packing.parts(*self.shape), "bias")
        found = (f"{self.module}.{name}" for name in names)
        return tuple(name for name in found if name in self.checkpoint.tensors)

    @property
    def by_rows(self) -> bool:
        """As `IntegerTensor.by_rows`: words are unpacked for all rows."""
        return False

    def codes(self, rows: slice = ALL) -> torch.Tensor:
        """As `IntegerTensor.codes`."""
        return self.packing.codes(self._read(self.packing.codes_part))[rows]

    def scale(self, rows: slice = ALL) -> torch.Tensor:
        """As `IntegerTensor.scale`."""
        scale = self.packing.scale(self._read(self.packing.scale_part))
        bad = ~(scale.isfinite() & (scale > 0))
        if bool(bad.any()):
            value = float(scale[bad][0])
            raise CheckpointError(
                f"{self.module}.{self.packing.scale_part} holds {value:g}; scales must be finite "
                f"and above zero: the checkpoint is damaged"
            )
        return scale[rows]

    def zero_point(self, rows: slice = ALL) -> torch.Tensor | None:
        """As `IntegerTensor.zero_point`."""
        part = self.packing.zero_part
        if part not in self.packing.parts(*self.shape):
            return None
        try:
            points = self.packing.zero_point(self._read(part))
        except ValueError as error:
            raise CheckpointError(f"{self.module}.{part}: {error}") from error
        middle = 1 << (self.packing.bits - 1)
        return None if bool((points == middle).all()) else points[rows]

    def _read(self, part: str) -> torch.Tensor:
        import torch

        name = f"{self.module}.{part}"
        entry = self.checkpoint.tensors[name]
        if entry.dtype.startswith("int"):
            return torch.from_numpy(self.checkpoint.read_integers(name))
        values = torch.from_numpy(self.checkpoint.read(name))
        return values.view(torch.bfloat16) if entry.dtype == "bfloat16" else values

    def _check_parts(self) -> None:
        for part, wanted in self.packing.parts(*self.shape).items():
            name = f"{self.module}.{part}"
            entry = self.checkpoint.tensors.get(name)
            if entry is None:
                if wanted.required:
                    raise CheckpointError(
                        f"the checkpoint lacks {name}, which {self.packing.method} stores beside "
                        f"{self.module}.{self.packing.codes_part}"
                    )
                continue
            if entry.shape != wanted.shape or entry.dtype not in wanted.dtypes:
                raise CheckpointError(
                    f"{name} is {entry.dtype} {list(entry.shape)}; config.json calls for "
                    f"{' or '.join(wanted.dtypes)} {list(wanted.shape)}"
                )

    def _check_order(self) -> None:
        """Refuses a layer whose groups are not runs of neighbouring columns, in their order."""
        import torch

        name = f"{self.module}.{self.packing.index_part}"
        if name not in self.checkpoint.tensors:
            return
        index = self._read(self.packing.index_part)
        columns = self.shape[1]
        wanted = torch.arange(columns) // (self.packing.group_size or columns)
        if not torch.equal(index.long(), wanted):
            raise CheckpointError(
                f"{name} puts input columns into groups out of their order (desc_act true and "
                f"static_groups false), which no target can store: give a checkpoint made with "
                f"desc_act false or static_groups true, or the original one"
            )


@dataclass(frozen=True)
class PackedLayers:
    """The linear layers of a method whose layout is a `Packing`.

    Attributes:
        packing: the layout.
    """

    packing: Packing

    @property
    def method(self) -> str:
        """As `Method.method`."""
        return self.packing.method

    @property
    def sign(self) -> str:
        """As `Method.sign`."""
        return f"*.{self.packing.codes_part}"

    def find(
        self, checkpoint: Checkpoint, tensor: str, shape: tuple[int, ...]
    ) -> PackedTensor | None:
        """As `Method.find`."""
        module = tensor.removesuffix(".weight")
        if len(shape) == 1 or f"{module}.{self.packing.codes_part}" not in checkpoint.tensors:
            return None
        return PackedTensor(checkpoint, module, self.packing, (shape[0], shape[1]))

    def notes(self) -> tuple[str, ...]:
        """As `Method.notes`."""
        return ()
