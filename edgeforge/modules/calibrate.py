"""Quantizes a module's linear layers by what enters them, one after the other."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import fx, nn

from edgeforge.errors import UsageError
from edgeforge.modules.digest import digest_of_tensors
from exporters.modules.traced import PREFIX, TracedModule
from quant.formats.formats import IntFormat
from quant.kernels import native
from quant.plans.plan import QuantPlan
from quant.quantizers.input_statistics import SecondMoment
from quant.quantizers.registry import CALIBRATED
from quant.store.fill import write_rows
from quant.store.writer import StoreWriter

_LINEAR: Final = torch.ops.aten.linear.default
Call = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Calibration:
    """What quantizers are calibrated on.

    Attributes:
        calls: inputs by name, in the order of the module's inputs.
    """

    calls: Sequence[Call]

    def digest(self, traced: TracedModule) -> str:
        """What the statistics depend on beside the quantized weights: the graph and the inputs."""
        found = hashlib.sha256(str(traced.program.graph).encode())
        held = {**traced.program.state_dict, **traced.program.constants}
        found.update(digest_of_tensors(held).encode())
        for call in self.calls:
            found.update(digest_of_tensors(call).encode())
        return found.hexdigest()


def fill_calibrated(
    traced: TracedModule,
    plan: QuantPlan,
    writer: StoreWriter,
    calibration: Calibration,
    threads: int | None = None,
) -> dict[str, int]:
    """Quantizes the weights whose algorithm needs second moments of their inputs.

    All calls run through the program side by side, node by node. A linear layer's weight is
    quantized when its inputs are there, which come of the quantized weights before it; what follows
    gets its quantized values. That is GPTQ's order (Frantar et al., 2022), as for language models.

    Args:
        traced: the module.
        plan: of all weights; those without calibration are in the store already.
        writer: of the store.
        calibration: what to run.
        threads: for the quantizers; None for one per processor, at most four.

    Returns:
        By weight, how many rows of inputs it was quantized for.

    Raises:
        UsageError: an input of a layer is not finite.
        QuantizationError: a weight cannot be quantized.
    """
    module = traced.program.module(check_guards=False)
    waiting = {name for name, given in plan.weights.items() if given.algorithm in CALIBRATED}
    for name in plan.weights:
        if name not in waiting:
            _set(module, name, _stored(writer, plan, name, traced))
    runs = [_Run(module, call) for call in calibration.calls]
    seen: dict[str, int] = {}
    with torch.no_grad():
        for node in module.graph.nodes:
            name = _weight_of(node)
            if name in waiting:
                rows = [
                    run.env[node.args[0]].reshape(-1, node.args[1].meta["val"].shape[1])
                    for run in runs
                ]
                seen[name] = _quantize(traced, plan, writer, name, rows, threads)
                waiting.remove(name)
                value = _stored(writer, plan, name, traced)
                for run in runs:
                    run.env[node.args[1]] = value
            for run in runs:
                run.step(node)
    return seen


class _Run(fx.Interpreter):
    """One call on its way through the program, a node at a time."""

    def __init__(self, module: fx.GraphModule, call: Call) -> None:
        super().__init__(module)
        self.env: dict[fx.Node, Any] = {}
        self.args_iter = iter(module.graph.process_inputs(*call.values()))

    def step(self, node: fx.Node) -> None:
        """Runs a node, and drops what no later one reads."""
        self.env[node] = self.run_node(node)
        for done in self.user_to_last_uses.get(node, []):
            del self.env[done]


def _weight_of(node: fx.Node) -> str:
    """The name of the weight that a linear layer reads; empty for all other nodes."""
    if node.target is not _LINEAR:
        return ""
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    return str(weight.target).removeprefix(PREFIX) if weight.op == "get_attr" else ""


def _quantize(
    traced: TracedModule,
    plan: QuantPlan,
    writer: StoreWriter,
    name: str,
    rows: Sequence[torch.Tensor],
    threads: int | None,
) -> int:
    assignment = plan.weights[name]
    assert isinstance(assignment.format, IntFormat)
    moment = SecondMoment(traced.weights[name].matrix[1])
    for each in rows:
        if not bool(each.isfinite().all()):
            raise UsageError(
                f"the inputs of {name} are not finite for the calibration's inputs: give others "
                f"with --calibration, or take a recipe without calibration"
            )
        moment.add(each.contiguous())
    made = CALIBRATED[assignment.algorithm].quantize_matrix(
        traced.state(name).detach().float(),
        moment.mean(),
        assignment.format,
        name=name,
        threads=threads,
    )
    write_rows(writer, name, 0, made)
    writer.note(name, (made.squared_error / made.squared_norm) ** 0.5 if made.squared_norm else 0.0)
    return int(moment.tokens)


def _stored(writer: StoreWriter, plan: QuantPlan, name: str, traced: TracedModule) -> torch.Tensor:
    """The values that the store has of a weight, in the parameter's shape."""
    format = plan.weights[name].format
    assert isinstance(format, IntFormat)
    codes, scale = (writer.part(name, part) for part in ("codes", "scale"))
    return native.unpack(codes, scale, None, format).view(traced.weights[name].shape)


def _set(module: nn.Module, name: str, value: torch.Tensor) -> None:
    path, _, leaf = f"{PREFIX}{name}".rpartition(".")
    owner = module.get_submodule(path)
    setattr(owner, leaf, nn.Parameter(value, requires_grad=False))
