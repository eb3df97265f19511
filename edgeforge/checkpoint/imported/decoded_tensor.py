"""`DecodedTensor`: a tensor that a checkpoint holds in another form, and that is read as floats."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class DecodedTensor(Protocol):
    """A tensor that becomes floats when it is read, by rows; safe from several threads."""

    @property
    def tensors(self) -> tuple[str, ...]:
        """The checkpoint's tensors that belong to it."""

    @property
    def dtype(self) -> str:
        """The float dtype that holds its values: ``float32``, ``float16`` or ``bfloat16``."""

    @property
    def form(self) -> str | None:
        """What it is stored as, such as ``Q4_K``, where values were quantized; None for floats."""

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Returns rows in `dtype`; a vector's are its values.

        Raises:
            CheckpointError: the file is damaged.
        """
