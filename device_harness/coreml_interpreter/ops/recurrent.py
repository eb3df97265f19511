"""Recurrent layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from device_harness.coreml_interpreter.ops.kinds import Operation
from device_harness.errors import DeviceError

_ACTIVATIONS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "linear": lambda x: x,
    "hard_sigmoid": lambda x: (0.2 * x + 0.5).clamp(0, 1),
    "scaled_tanh": lambda x: 1.7159 * torch.tanh(x * 2 / 3),
}


def lstm(
    x: Tensor,
    initial_h: Tensor,
    initial_c: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    peephole: Tensor | None = None,
    weight_ih_back: Tensor | None = None,
    weight_hh_back: Tensor | None = None,
    bias_back: Tensor | None = None,
    peephole_back: Tensor | None = None,
    direction: str = "forward",
    output_sequence: bool = False,
    recurrent_activation: str = "sigmoid",
    cell_activation: str = "tanh",
    activation: str = "tanh",
    clip: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Long short-term memory over ``x [s, b, in]``; the gates are input, forget, output, cell.

    Returns:
        The hidden states of all steps (or only the last), the last hidden state, and the last cell
        state.
    """
    wanted = (recurrent_activation, cell_activation, activation)
    for name in wanted:
        if name not in _ACTIVATIONS:
            raise DeviceError(f"there is no activation {name}; there is {', '.join(_ACTIVATIONS)}")
    functions = [_ACTIVATIONS[name] for name in wanted]
    if direction not in ("forward", "reverse", "bidirectional"):
        raise DeviceError(
            f"there is no direction {direction}; there are forward, reverse and bidirectional"
        )
    hidden = weight_hh.shape[1]
    ways = [(direction == "reverse", weight_ih, weight_hh, bias, peephole)]
    if direction == "bidirectional":
        if weight_ih_back is None or weight_hh_back is None:
            raise DeviceError("direction bidirectional needs weight_ih_back and weight_hh_back")
        ways.append((True, weight_ih_back, weight_hh_back, bias_back, peephole_back))
    outputs, lasts, memories = [], [], []
    for place, (back, into, over, added, holes) in enumerate(ways):
        part = slice(place * hidden, (place + 1) * hidden)
        h, c = initial_h[:, part], initial_c[:, part]
        given = x @ into.T if added is None else x @ into.T + added
        steps: list[Tensor] = []
        for at in reversed(range(len(x))) if back else range(len(x)):
            h, c = _step(given[at] + h @ over.T, c, holes, functions, clip)
            steps.append(h)
        outputs.append(torch.stack(steps[::-1] if back else steps))
        lasts.append(h)
        memories.append(c)
    last = torch.cat(lasts, -1)
    sequence = torch.cat(outputs, -1) if output_sequence else last.unsqueeze(0).clone()
    return sequence, last, torch.cat(memories, -1)


def _step(
    gates: Tensor,
    c: Tensor,
    holes: Tensor | None,
    functions: list[Callable[[Tensor], Tensor]],
    clip: float | None,
) -> tuple[Tensor, Tensor]:
    recurrent, cell, out = functions
    i, f, o, z = gates.chunk(4, -1)
    if holes is not None:
        hole_i, hole_f, hole_o = holes.chunk(3)
        i, f = i + hole_i * c, f + hole_f * c
    c = recurrent(f) * c + recurrent(i) * cell(z if clip is None else z.clamp(-clip, clip))
    if holes is not None:
        o = o + hole_o * c
    return recurrent(o) * out(c), c


OPS: Final[dict[str, Operation]] = {"lstm": lstm}
