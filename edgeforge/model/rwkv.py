"""RWKV 5 and 6 (Eagle and Finch, arXiv 2404.05892): the mix of tokens and the mix of channels.

Both mix each token with the one before it, column by column, before they transform it. RWKV 5 has
one mix of each kind for all tokens; RWKV 6 makes mixes and decays of each token.
"""

from __future__ import annotations

from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeforge.families.spec import LayerSpec, ModelSpec
from edgeforge.model.parts import Projection, Weights
from quant.program import recurrence_ops, token_ops

MIXED: Final = ("decay", "key", "value", "receptance", "gate")
"""What RWKV 6 mixes with the token before, in the order of its checkpoints."""

GROUP_NORM_EPS: Final = 64e-5
"""Epsilon of the norm of each head's result: 1e-5 of a result that is divided by 8 first."""


def _mixed(x: Tensor, difference: Tensor, mix: Tensor) -> Tensor:
    """``x + (previous - x) * mix``."""
    mixed: Tensor = x + token_ops.gain(difference, mix)
    return mixed


def _difference(x: Tensor, recent: Tensor, position: Tensor) -> Tensor:
    """The token before, minus the token: ``float[1, t, n]``."""
    before = recurrence_ops.token_shift(x, recent, position)
    difference: Tensor = before + token_ops.scale(x, -1.0)
    return difference


class TimeMix(nn.Module):
    """RWKV's mix of tokens: ``float[1, t, hidden] -> float[1, t, hidden]``.

    The states are the token before, ``float[1, hidden, 1]``, and the memory,
    ``float[1, heads, width, width]``. A mix is how much of the token before there is; checkpoints
    of RWKV 5 hold its complement.
    """

    recent: Tensor
    memory: Tensor

    def __init__(self, spec: ModelSpec, layer: LayerSpec, at: str, context: int) -> None:
        super().__init__()
        made = layer.recurrence
        assert made is not None
        self.heads, self.width, self.dynamic = made.heads, made.key_width, made.dynamic
        self.mixes = MIXED if self.dynamic else MIXED[1:]
        for name in self.mixes:
            self.add_module(f"mix_{name}", Weights(spec, f"{at}.mix_{name}"))
        if self.dynamic:
            self.mix_all = Weights(spec, f"{at}.mix_all")
            self.mix_down = Projection(spec, f"{at}.mix_down")
            for name in self.mixes:
                self.add_module(f"mix_up_{name}", Projection(spec, f"{at}.mix_up_{name}"))
            self.decay_down = Projection(spec, f"{at}.decay_down")
            self.decay_up = Projection(spec, f"{at}.decay_up")
        else:
            self.decay = Weights(spec, f"{at}.decay")
        self.bonus = Weights(spec, f"{at}.bonus")
        for name in ("receptance", "key", "value", "gate", "output"):
            self.add_module(f"{name}_proj", Projection(spec, f"{at}.{name}_proj"))
        self.head_norm = Weights(spec, f"{at}.head_norm")
        self.register_buffer("recent", torch.zeros(1, spec.hidden_size, 1, device="meta"))
        memory = torch.zeros(1, self.heads, self.width, made.value_width, device="meta")
        self.register_buffer("memory", memory)

    def forward(self, x: Tensor, tables: tuple[Tensor, ...], position: Tensor) -> Tensor:
        """Mixes each token with those before it."""
        count, difference = x.shape[1], _difference(x, self.recent, position)
        mixed = self._mixes(x, difference)
        r, k, v, gate = (
            self.get_submodule(f"{name}_proj")(mixed[name])
            for name in ("receptance", "key", "value", "gate")
        )
        if self.dynamic:
            grown = self.decay_up(torch.tanh(self.decay_down(mixed["decay"])))
            decay = token_ops.scale(torch.exp(grown), -1.0)
            decay = decay.view(1, count, self.heads, self.width)
        else:
            decay = self.decay.weight
        r, k, v = (x.view(1, count, self.heads, -1) for x in (r, k, v))
        found = recurrence_ops.recurrence(
            r, k, v, decay, self.bonus.weight, None, self.memory, position
        )
        normed = token_ops.layer_norm(found, None, None, GROUP_NORM_EPS)
        normed = normed.view(1, count, -1)
        normed = token_ops.bias(token_ops.gain(normed, self.head_norm.weight), self.head_norm.bias)
        out: Tensor = self.get_submodule("output_proj")(normed * F.silu(gate))
        return out

    def _mixes(self, x: Tensor, difference: Tensor) -> dict[str, Tensor]:
        """Each token with some of the one before it, for each product that reads it."""
        weights = {name: self.get_parameter(f"mix_{name}.weight") for name in self.mixes}
        if not self.dynamic:
            return {name: _mixed(x, difference, weight) for name, weight in weights.items()}
        shared = self.get_parameter("mix_all.weight")
        down: Any = torch.tanh(self.mix_down(_mixed(x, difference, shared)))
        rank = down.shape[-1] // len(self.mixes)
        parts: tuple[Tensor, ...] = down.split([rank] * len(self.mixes), -1)
        made = {}
        for (name, weight), part in zip(weights.items(), parts, strict=True):
            own = token_ops.bias(self.get_submodule(f"mix_up_{name}")(part), weight)
            made[name] = x + difference * own
        return made


class ChannelMix(nn.Module):
    """RWKV's mix of channels: ``float[1, t, hidden] -> float[1, t, hidden]``.

    ``sigmoid(receptance) * value(relu(key) ** 2)``. The state is the token before,
    ``float[1, hidden, 1]``.
    """

    recent: Tensor

    def __init__(self, spec: ModelSpec, at: str) -> None:
        super().__init__()
        for name in ("key", "receptance"):
            self.add_module(f"mix_{name}", Weights(spec, f"{at}.mix_{name}"))
        for name in ("key", "value", "receptance"):
            self.add_module(f"{name}_proj", Projection(spec, f"{at}.{name}_proj"))
        self.register_buffer("recent", torch.zeros(1, spec.hidden_size, 1, device="meta"))

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        """Transforms each token, mixed with the one before it."""
        difference = _difference(x, self.recent, position)
        keys, receptance = (
            self.get_submodule(f"{name}_proj")(
                _mixed(x, difference, self.get_parameter(f"mix_{name}.weight"))
            )
            for name in ("key", "receptance")
        )
        grown = F.relu(keys)
        out: Tensor = torch.sigmoid(receptance) * self.get_submodule("value_proj")(grown * grown)
        return out
