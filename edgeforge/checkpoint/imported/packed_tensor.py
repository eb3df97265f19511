"""`PackedTensor`: the integers and scales of one linear layer of a quantized checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeforge.errors import CheckpointError
from quant.formats.formats import IntFormat, ScaleName

if TYPE_CHECKING:
    import torch

    from edgeforge.checkpoint.checkpoint import Checkpoint
    from edgeforge.checkpoint.imported.packing import Packing
    from quant.quantizers.rtn import QuantizedRows


class PackedTensor:
    """A linear layer of ``rows`` outputs and ``columns`` inputs; safe from several threads.

    Args:
        checkpoint: the checkpoint that has the layer's tensors.
        module: the layer's name, without ``.weight``.
        packing: the checkpoint's layout of quantized layers.
        shape: rows and columns that the configuration calls for.

    Raises:
        CheckpointError: a part is missing or has another shape or dtype, columns are not grouped in
            their order, or there is a bias.
    """

    def __init__(
        self, checkpoint: Checkpoint, module: str, packing: Packing, shape: tuple[int, int]
    ) -> None:
        self.checkpoint, self.module, self.packing, self.shape = checkpoint, module, packing, shape
        rows, columns = shape
        words = 32 // packing.bits
        if columns % words or rows % words:
            raise CheckpointError(
                f"{module} has {rows} outputs and {columns} inputs; {packing.method} packs {words} "
                f"codes in a word, and EdgeForge reads full words only: both must be multiples of "
                f"{words}"
            )
        size = packing.group_size
        if size is not None and columns % size:
            raise CheckpointError(
                f"{module} has {columns} inputs, not a multiple of group_size {size}"
            )
        self._check_parts()
        self._check_order()
        self._check_bias()

    @property
    def tensors(self) -> tuple[str, ...]:
        """The checkpoint's tensors that belong to this layer."""
        names = (*self.packing.parts(*self.shape), "bias")
        found = (f"{self.module}.{name}" for name in names)
        return tuple(name for name in found if name in self.checkpoint.tensors)

    def codes(self) -> torch.Tensor:
        """Returns ``uint8[rows, columns * bits / 8]`` in the layout of `IntFormat.layout`."""
        return self.packing.codes(self._read(self.packing.codes_part))

    def scale(self) -> torch.Tensor:
        """Returns the scales, ``[rows, groups]`` in the checkpoint's dtype.

        Raises:
            CheckpointError: a scale is not a finite number above zero.
        """
        scale = self.packing.scale(self._read(self.packing.scale_part))
        bad = ~(scale.isfinite() & (scale > 0))
        if bool(bad.any()):
            value = float(scale[bad][0])
            raise CheckpointError(
                f"{self.module}.{self.packing.scale_part} holds {value:g}; scales must be finite "
                f"and above zero: the checkpoint is damaged"
            )
        return scale

    def zero_point(self) -> torch.Tensor | None:
        """Returns ``uint8[rows, groups]``, unpacked; None when all are the middle of the range.

        Raises:
            CheckpointError: zero points contradict the configuration, or are ambiguous.
        """
        part = self.packing.zero_part
        if part not in self.packing.parts(*self.shape):
            return None
        try:
            points = self.packing.zero_point(self._read(part))
        except ValueError as error:
            raise CheckpointError(f"{self.module}.{part}: {error}") from error
        middle = 1 << (self.packing.bits - 1)
        return None if bool((points == middle).all()) else points

    def format(self) -> IntFormat:
        """Returns the narrowest format that stores this layer exactly.

        Raises:
            CheckpointError: neither bfloat16 nor float16 can store the scales exactly.
        """
        symmetric = self.zero_point() is None
        return IntFormat(self.packing.bits, self.packing.group_size, symmetric, self._scale_name())

    def _scale_name(self) -> ScaleName:
        import torch

        scale = self.scale()
        if torch.equal(scale.bfloat16().float(), scale.float()):
            return "bfloat16"
        if torch.equal(scale.half().float(), scale.float()):
            return "float16"
        raise CheckpointError(
            f"{self.module}.{self.packing.scale_part} holds scales that neither bfloat16 nor "
            f"float16 can store exactly: save the checkpoint with float16 scales"
        )

    def dequantize(self) -> torch.Tensor:
        """Returns the exact weights that the checkpoint represents, ``float32[rows, columns]``."""
        return (self.steps() * self.scale().float().unsqueeze(-1)).reshape(self.shape)

    def steps(self) -> torch.Tensor:
        """Returns codes minus zero points, ``float32[rows, groups, columns of a group]``."""
        from quant.formats.packing import unpack_codes

        rows, columns = self.shape
        fmt = IntFormat(self.packing.bits, self.packing.group_size)
        codes = unpack_codes(self.codes(), fmt, columns).reshape(rows, fmt.groups(columns), -1)
        points = self.zero_point()
        return codes.float() - (
            fmt.implicit_zero_point if points is None else points.unsqueeze(-1).float()
        )

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

    def _check_bias(self) -> None:
        """Refuses a bias that is not zero; some tools write one of zeros."""
        name = f"{self.module}.bias"
        if name in self.checkpoint.tensors and self.checkpoint.read(name).any():
            raise CheckpointError(
                f"the checkpoint holds {name}, which is not zero: this family has no biases"
            )


def import_rows(tensor: PackedTensor, format: IntFormat, rows: slice) -> QuantizedRows:
    """Returns codes, scales and zero points of some rows, as `quant.formats.formats` lays them out.

    The scales are the checkpoint's where ``format`` can store them exactly, else they are rounded.

    Args:
        tensor: the layer.
        format: the format to store. It may have zero points although the layer's are all the
            middle of the range, because layers that are stacked into one weight share its format.
        rows: the rows to return.

    Returns:
        The parts; squared error and norm are computed only where scales were rounded, else they are
        zero.
    """
    import torch

    from quant.formats.packing import pack_int4
    from quant.quantizers.rtn import QuantizedRows

    exact, points = tensor.scale()[rows], tensor.zero_point()
    scale = exact.to(getattr(torch, format.scale_dtype))
    packed = None
    if not format.symmetric:
        if points is None:
            given = torch.full(scale.shape, format.implicit_zero_point, dtype=torch.uint8)
        else:
            given = points[rows].contiguous()
        packed = pack_int4(given) if format.bits == 4 else given
    error = norm = 0.0
    change = scale.double() - exact.double()
    if bool(change.any()):
        sums = tensor.steps()[rows].square().sum(-1).double()
        error = float((sums * change.square()).sum())
        norm = float((sums * exact.double().square()).sum())
    return QuantizedRows(tensor.codes()[rows].contiguous(), scale, packed, error, norm)
