"""Branches and loops."""

from __future__ import annotations

from typing import Any, Final

from torch import Tensor

from device_harness.coreml_interpreter.limits import spent
from device_harness.coreml_interpreter.ops.kinds import Blocks, Operation, Tensors


def cond(pred: bool, blocks: Blocks) -> tuple[Tensor, ...]:
    """The outputs of the first block when ``pred`` holds, of the second otherwise."""
    return tuple(blocks[0 if pred else 1]([]))


def while_loop(loop_vars: Tensors, blocks: Blocks) -> tuple[Tensor, ...]:
    """Runs the second block on its own outputs as long as the first block gives true."""
    values: list[Any] = list(loop_vars)
    while bool(blocks[0](values)[0]):
        spent().iteration()
        values = blocks[1](values)
    return tuple(values)


OPS: Final[dict[str, Operation]] = {"cond": cond, "while_loop": while_loop}
