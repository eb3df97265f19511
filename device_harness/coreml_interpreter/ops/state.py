"""Reading and writing states.

Reading returns the state's own memory. The binder has the result copied where a step still reads
the old value after a new one is written; see `device_harness.coreml_interpreter.sharing`.
"""

from __future__ import annotations

from typing import Final

from torch import Tensor

from device_harness.coreml_interpreter.ops.kinds import Operation
from device_harness.coreml_interpreter.states import State


def read_state(input: State) -> Tensor:
    """Returns the state's content."""
    return input.tensor


def write_state(input: State, data: Tensor) -> tuple[Tensor, ...]:
    """Replaces the state's content."""
    input.write(data)
    return ()


def coreml_update_state(state: State, value: Tensor) -> Tensor:
    """Replaces the state's content and returns it."""
    state.write(value)
    return state.tensor


OPS: Final[dict[str, Operation]] = {
    "read_state": read_state,
    "write_state": write_state,
    "coreml_update_state": coreml_update_state,
}
