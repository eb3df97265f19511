"""Reading and writing states.

What is read is the state's own memory: whoever binds a program sees to it that nobody still needs
the old value when a new one is written, and has it copied otherwise.
"""

from __future__ import annotations

from typing import Final

from torch import Tensor

from device_harness.coreml_interpreter.ops.kinds import Operation
from device_harness.coreml_interpreter.states import State


def read_state(input: State) -> Tensor:
    """What a state holds."""
    return input.tensor


def write_state(input: State, data: Tensor) -> tuple[Tensor, ...]:
    """Replaces what a state holds."""
    input.write(data)
    return ()


def coreml_update_state(state: State, value: Tensor) -> Tensor:
    """Replaces what a state holds, and reads it."""
    state.write(value)
    return state.tensor


OPS: Final[dict[str, Operation]] = {
    "read_state": read_state,
    "write_state": write_state,
    "coreml_update_state": coreml_update_state,
}
