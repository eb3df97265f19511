"""`IntegerTensor`: a matrix that a checkpoint holds as integers, scales and zero points."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from edgeforge.checkpoint.imported.packing import Bits
from edgeforge.errors import CheckpointError
from quant.formats.formats import IntFormat, ScaleName

if TYPE_CHECKING:
    import torch

    from quant.quantizers.rtn import QuantizedRows

ALL = slice(None)


class IntegerTensor(ABC):
    """A matrix of ``rows`` outputs and ``columns`` inputs; safe from several threads.

    Args:
        name: its name in messages.
        shape: rows and columns.
        bits: bits of a code.
        group_size: input columns that share a scale; None for one group per row.
    """

    def __init__(
        self, name: str, shape: tuple[int, int], bits: Bits, group_size: int | None
    ) -> None:
        self.name, self.shape, self.bits, self.group_size = name, shape, bits, group_size
        if group_size is not None and shape[1] % group_size:
            raise CheckpointError(
                f"{name} has {shape[1]} inputs, not a multiple of group_size {group_size}"
            )

    @property
    def form(self) -> str:
        """What it is stored as, in the words of its format."""
        return f"{self.bits}-bit integers"

    @property
    def by_rows(self) -> bool:
        """Whether some rows are read for less than all of them."""
        return True

    @property
    @abstractmethod
    def tensors(self) -> tuple[str, ...]:
        """The checkpoint's tensors that belong to this matrix."""

    @abstractmethod
    def codes(self, rows: slice = ALL) -> torch.Tensor:
        """Returns ``uint8[rows, columns * bits / 8]`` in the layout of `IntFormat.layout`."""

    @abstractmethod
    def scale(self, rows: slice = ALL) -> torch.Tensor:
        """Returns the scales, ``[rows, groups]`` in the checkpoint's dtype.

        Raises:
            CheckpointError: a scale is not a finite number above zero.
        """

    @abstractmethod
    def zero_point(self, rows: slice = ALL) -> torch.Tensor | None:
        """Returns ``uint8[rows, groups]``, unpacked; None when all are the middle of the range.

        Raises:
            CheckpointError: zero points contradict the configuration, or are ambiguous.
        """

    def format(self) -> IntFormat:
        """Returns the narrowest format that stores this matrix exactly.

        Raises:
            CheckpointError: neither bfloat16 nor float16 can store the scales exactly.
        """
        symmetric = self.zero_point() is None
        return IntFormat(self.bits, self.group_size, symmetric, self._scale_name())

    def dequantize(self, rows: slice = ALL) -> torch.Tensor:
        """Returns the exact weights that the checkpoint represents, ``float32[rows, columns]``."""
        steps = self.steps(rows)
        return (steps * self.scale(rows).float().unsqueeze(-1)).reshape(-1, self.shape[1])

    def steps(self, rows: slice = ALL) -> torch.Tensor:
        """Returns codes minus zero points, ``float32[rows, groups, columns of a group]``."""
        from quant.formats.packing import unpack_codes

        columns = self.shape[1]
        fmt = IntFormat(self.bits, self.group_size)
        packed = self.codes(rows)
        codes = unpack_codes(packed, fmt, columns).reshape(len(packed), fmt.groups(columns), -1)
        points = self.zero_point(rows)
        return codes.float() - (
            fmt.implicit_zero_point if points is None else points.unsqueeze(-1).float()
        )

    def change(self, rows: slice, scale: torch.Tensor) -> tuple[float, float]:
        """Returns the squared error of the integers with other scales, and the squared norm.

        Both are zero where nothing changes.

        Args:
            rows: which rows.
            scale: the scales that are stored, ``[rows, groups]``.
        """
        exact = self.scale(rows)
        change = scale.double() - exact.double()
        if not bool(change.any()):
            return 0.0, 0.0
        sums = self.steps(rows).square().sum(-1).double()
        return (
            float((sums * change.square()).sum()),
            float((sums * exact.double().square()).sum()),
        )

    def _scale_name(self) -> ScaleName:
        import torch

        scale = self.scale()
        if torch.equal(scale.bfloat16().float(), scale.float()):
            return "bfloat16"
        if torch.equal(scale.half().float(), scale.float()):
            return "float16"
        raise CheckpointError(
            f"{self.name} has scales that neither bfloat16 nor float16 can store exactly: save "
            f"the checkpoint with float16 scales"
        )


def import_rows(tensor: IntegerTensor, format: IntFormat, rows: slice) -> QuantizedRows:
    """Returns codes, scales and zero points of some rows, as `quant.formats.formats` lays them out.

    The scales are the checkpoint's where ``format`` can store them exactly, else they are rounded.

    Args:
        tensor: the matrix.
        format: the format to store. It may have zero points although the layer's are all the
            middle of the range, because layers that are stacked into one weight share its format.
        rows: the rows to return.

    Returns:
        The parts; squared error and norm are computed only where something was rounded, else they
        are zero.
    """
    import torch

    from quant.formats.packing import pack_int4
    from quant.quantizers.rtn import QuantizedRows

    scale = tensor.scale(rows).to(getattr(torch, format.scale_dtype))
    points = tensor.zero_point(rows)
    packed = None
    if not format.symmetric:
        if points is None:
            given = torch.full(scale.shape, format.implicit_zero_point, dtype=torch.uint8)
        else:
            given = points.contiguous()
        packed = pack_int4(given) if format.bits == 4 else given
    error, norm = tensor.change(rows, scale)
    return QuantizedRows(tensor.codes(rows).contiguous(), scale, packed, error, norm)
