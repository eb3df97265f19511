"""Checkpoints that MLX has quantized: ``value = code * scale + bias`` for each group of columns.

``weight: uint32[out, in * bits / 32]`` packs codes along the input, the lowest bits first;
``scales`` and ``biases`` are ``[out, groups]``. MLX puts the value of a group that is farthest from
zero on a code exactly, so that bias over scale is a whole number but for the rounding of both: its
negative is the zero point. A scale may be below zero; codes are turned round then.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

from edgeforge.checkpoint.config_reader import ConfigReader
from edgeforge.checkpoint.imported.integer_tensor import ALL, IntegerTensor
from edgeforge.checkpoint.imported.packing import SCALES, Bits, read_width
from edgeforge.errors import CheckpointError
from quant.quoted import quoted

if TYPE_CHECKING:
    import torch

    from edgeforge.checkpoint.checkpoint import Checkpoint
    from edgeforge.checkpoint.imported.decoded_tensor import DecodedTensor

# How far rounding two numbers of a dtype may move their ratio, as a share of it.
_RATIO: Final = {"bfloat16": 2.0**-7, "float16": 2.0**-10, "float32": 2.0**-20}
_GROUPS: Final = (32, 64, 128)


@dataclass(frozen=True)
class Width:
    """How a matrix is quantized: bits of a code, and input columns that share a scale."""

    bits: Bits
    group_size: int


class MlxLayers:
    """The matrices of a checkpoint of MLX.

    Args:
        width: how matrices are quantized.
        others: how single modules are, by name; None for one that holds floats.
    """

    method: ClassVar[str] = "MLX"
    sign: ClassVar[str] = "*.scales"

    def __init__(self, width: Width, others: Mapping[str, Width | None]) -> None:
        self._width, self._others = width, dict(others)
        self._inexact: dict[str, None] = {}

    def __repr__(self) -> str:
        return f"MlxLayers({self._width}, {sorted(self._others.items(), key=str)})"

    def find(
        self, checkpoint: Checkpoint, tensor: str, shape: tuple[int, ...]
    ) -> IntegerTensor | DecodedTensor | None:
        """As `edgeforge.checkpoint.imported.method.Method.find`."""
        module = tensor.removesuffix(".weight")
        if len(shape) == 1 or f"{module}.scales" not in checkpoint.tensors:
            return None
        width = self._others.get(module, self._width)
        if width is None:
            raise CheckpointError(
                f"config.json says that {module} is not quantized, and the checkpoint holds "
                f"{module}.scales: config.json and weights do not belong together"
            )
        found = MlxTensor(checkpoint, module, (shape[0], shape[1]), width)
        if found.is_whole():
            return found
        self._inexact[module] = None
        return self.as_floats(found)

    def as_floats(self, tensor: IntegerTensor) -> DecodedTensor:
        """As `edgeforge.checkpoint.imported.method.DecodableMethod.as_floats`."""
        assert isinstance(tensor, MlxTensor)
        return _Floats(tensor)

    def notes(self) -> tuple[str, ...]:
        """As `edgeforge.checkpoint.imported.method.Method.notes`."""
        if not self._inexact:
            return (
                "zero points of MLX weights are bias over scale, rounded to whole numbers: "
                "relative_error says what that changes",
            )
        first, *others = self._inexact
        more = f" and {len(others)} more" if others else ""
        return (
            f"{first}{more} could not stay integers: bias over scale is no whole number "
            f"of the format, or no dtype of stores holds the scales",
        )


class MlxTensor(IntegerTensor):
    """A matrix that MLX has quantized."""

    def __init__(
        self, checkpoint: Checkpoint, module: str, shape: tuple[int, int], width: Width
    ) -> None:
        super().__init__(module, shape, width.bits, width.group_size)
        self.checkpoint, self.module = checkpoint, module
        rows, columns = shape
        groups = columns // width.group_size
        for part, wanted, dtypes in (
            ("weight", (rows, columns * width.bits // 32), ("uint32",)),
            ("scales", (rows, groups), SCALES),
            ("biases", (rows, groups), SCALES),
        ):
            entry = checkpoint.tensors.get(f"{module}.{part}")
            if entry is None:
                raise CheckpointError(
                    f"the checkpoint lacks {module}.{part}, which MLX stores beside {module}.scales"
                )
            if entry.shape != wanted or entry.dtype not in dtypes:
                raise CheckpointError(
                    f"{module}.{part} is {entry.dtype} {list(entry.shape)}; config.json calls for "
                    f"{' or '.join(dtypes)} {list(wanted)}"
                )

    @property
    def tensors(self) -> tuple[str, ...]:
        """As `IntegerTensor.tensors`."""
        return tuple(f"{self.module}.{part}" for part in ("weight", "scales", "biases"))

    @property
    def form(self) -> str:
        """As `IntegerTensor.form`."""
        return f"MLX {self.bits}-bit integers in groups of {self.group_size}"

    def is_whole(self) -> bool:
        """Whether zero points are whole numbers of the format, and stores hold the scales."""
        scale, bias = self._floats(ALL)
        points = self._points(scale, bias)
        share = _RATIO[self.checkpoint.tensors[f"{self.module}.scales"].dtype]
        near = (points - points.round()).abs() <= (bias / scale).abs() * share
        inside = (points.round() >= 0) & (points.round() < 1 << self.bits)
        # A group of zeros has no ratio, and needs none.
        if not bool(((near & inside) | ((scale == 0) & (bias == 0))).all()):
            return False
        try:
            self._scale_name()
        except CheckpointError:
            return False
        return True

    def codes(self, rows: slice = ALL) -> torch.Tensor:
        """As `IntegerTensor.codes`."""
        import torch

        from quant.formats.packing import pack_int4

        codes, (scale, _) = self._codes(rows), self._floats(rows)
        top = (1 << self.bits) - 1
        codes = torch.where((scale < 0)[..., None], top - codes, codes)
        codes = torch.where((scale == 0)[..., None], 1 << (self.bits - 1), codes).to(torch.uint8)
        flat = codes.reshape(len(codes), -1)
        return pack_int4(flat) if self.bits == 4 else flat

    def scale(self, rows: slice = ALL) -> torch.Tensor:
        """As `IntegerTensor.scale`; a group of zeros, whose scale is 0, gets another."""
        import torch

        scale = self._part("scales", rows)
        least = torch.tensor(torch.finfo(torch.float16).tiny, dtype=scale.dtype)
        return torch.where(scale == 0, least, scale.abs())

    def zero_point(self, rows: slice = ALL) -> torch.Tensor | None:
        """As `IntegerTensor.zero_point`; rows that are all symmetric have none either."""
        import torch

        scale, bias = self._floats(rows)
        middle = 1 << (self.bits - 1)
        points = torch.where(scale == 0, middle, self._points(scale, bias).round())
        return None if bool((points == middle).all()) else points.to(torch.uint8)

    def dequantize(self, rows: slice = ALL) -> torch.Tensor:
        """As `IntegerTensor.dequantize`: codes times scales plus biases."""
        scale, bias = self._floats(rows)
        values = self._codes(rows).float() * scale[..., None] + bias[..., None]
        return values.reshape(-1, self.shape[1])

    def change(self, rows: slice, scale: torch.Tensor) -> tuple[float, float]:
        """As `IntegerTensor.change`; a rounded zero point counts too."""
        exact = self.dequantize(rows).double()
        stored = self.steps(rows).double() * scale.double().unsqueeze(-1)
        error = float((stored.reshape(exact.shape) - exact).square().sum())
        return error, float(exact.square().sum())

    def _points(self, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """Returns the zero points before they are rounded, for codes as `codes` returns them."""
        import torch

        ratio = bias / scale.abs()
        return torch.where(scale < 0, (1 << self.bits) - 1 - ratio, -ratio)

    def _codes(self, rows: slice) -> torch.Tensor:
        """Returns the checkpoint's codes, ``uint8[rows, groups, columns of a group]``."""
        import torch

        start, stop, _ = rows.indices(self.shape[0])
        stride = self.shape[1] * self.bits // 8
        name = f"{self.module}.weight"
        apart = torch.from_numpy(self.checkpoint.read_bytes(name, start * stride, stop * stride))
        if self.bits == 4:
            apart = torch.stack((apart & 15, apart >> 4), dim=-1)
        assert self.group_size is not None
        return apart.reshape(stop - start, -1, self.group_size)

    def _part(self, part: str, rows: slice) -> torch.Tensor:
        import torch

        start, stop, _ = rows.indices(self.shape[0])
        name = f"{self.module}.{part}"
        values = torch.from_numpy(self.checkpoint.read_rows(name, start, stop))
        if self.checkpoint.tensors[name].dtype == "bfloat16":
            values = values.view(torch.bfloat16)
        if not bool(values.isfinite().all()):
            raise CheckpointError(
                f"{name} holds values that are no finite numbers: the checkpoint is damaged"
            )
        return values

    def _floats(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        return self._part("scales", rows).float(), self._part("biases", rows).float()


@dataclass(frozen=True)
class _Floats:
    """A matrix of MLX's that is read as floats."""

    tensor: MlxTensor
    dtype: ClassVar[str] = "float32"

    @property
    def tensors(self) -> tuple[str, ...]:
        """As `DecodedTensor.tensors`."""
        return self.tensor.tensors

    @property
    def form(self) -> str | None:
        """As `DecodedTensor.form`."""
        return self.tensor.form

    def read(self, start: int, stop: int) -> torch.Tensor:
        """As `DecodedTensor.read`."""
        return self.tensor.dequantize(slice(start, stop))


def read_mlx(section: Mapping[str, object], ignore: Iterable[str], where: str) -> MlxLayers:
    """Reads the section ``quantization`` of a ``config.json``.

    Args:
        section: the section; besides the width of all it may name modules with another one, or
            with false where they hold floats.
        ignore: fields that the user knows not to change the maths.
        where: the section's name, for messages.

    Raises:
        CheckpointError: a width, or a way to quantize, that EdgeForge does not read.
    """
    others = {
        name: value
        for name, value in section.items()
        if isinstance(value, dict) or (isinstance(value, bool) and "." in name)
    }
    plain = {name: value for name, value in section.items() if name not in others}
    width = _width(ConfigReader(plain, ignore, where))
    return MlxLayers(
        width,
        {
            name: _of_module(value, width, ConfigReader({}, ignore), ignore, f"{where}: {name}")
            for name, value in others.items()
        },
    )


def _of_module(
    value: object, usual: Width, reader: ConfigReader, ignore: Iterable[str], where: str
) -> Width | None:
    if isinstance(value, dict):
        return _width(ConfigReader(value, ignore, where))
    return usual if value else None


def _width(reader: ConfigReader) -> Width:
    reader.choice("mode", ("affine",), "affine")
    reader.get("quant_method")
    bits, size = read_width(reader, "bits", "group_size")
    reader.finish()
    if size not in _GROUPS:
        raise CheckpointError(
            f"{reader.where}: group_size is {quoted(size)}; MLX has groups of "
            f"{', '.join(map(str, _GROUPS))}"
        )
    return Width(bits, size)
