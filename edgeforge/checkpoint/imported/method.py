"""`Method`: how the checkpoints of one tool hold matrices that are not plain floats."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from edgeforge.checkpoint.checkpoint import Checkpoint
    from edgeforge.checkpoint.imported.decoded_tensor import DecodedTensor
    from edgeforge.checkpoint.imported.integer_tensor import IntegerTensor


class Method(Protocol):
    """A way to hold matrices."""

    @property
    def method(self) -> str:
        """Its name for users, such as the checkpoint's ``quant_method``."""

    @property
    def sign(self) -> str:
        """How a tensor is named that shows the method, such as ``*.qweight``."""

    def find(
        self, checkpoint: Checkpoint, tensor: str, shape: tuple[int, ...]
    ) -> IntegerTensor | DecodedTensor | None:
        """Returns a tensor that is no plain float; None for one that is, or that is not there.

        Args:
            checkpoint: the checkpoint.
            tensor: the name that the tensor has, or would have as floats.
            shape: what the configuration calls for.

        Raises:
            CheckpointError: a part is missing or wrong.
        """

    def notes(self) -> tuple[str, ...]:
        """Returns what a user must know of tensors that were found, one sentence each."""


@runtime_checkable
class DecodableMethod(Method, Protocol):
    """A way to hold matrices whose integers may be read as floats where no target keeps them."""

    def as_floats(self, tensor: IntegerTensor) -> DecodedTensor:
        """Returns a tensor that `find` gave, to be read as floats."""
