"""Which processor Core ML means to run each operation on, from its compute plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from device_harness.errors import DeviceError
from device_harness.plain_text import plain
from exporters.coreml.package import Package
from exporters.structure import Section

PROCESSORS: Final = {"cpu": "CPU", "gpu": "GPU", "neuralEngine": "Neural Engine"}
_MOST_OPERATIONS: Final = 1_000_000


@dataclass(frozen=True)
class PlannedOperation:
    """One operation of a function.

    Attributes:
        output: the name of its first output; empty for one without a result.
        processor: where Core ML means to run it: ``CPU``, ``GPU`` or ``Neural Engine``.
        supported: where it could run.
        cost: its share of the function's estimated cost, 0 to 1; None where it is not estimated.
    """

    output: str
    processor: str
    supported: tuple[str, ...]
    cost: float | None


def read_plan(result: Mapping[str, Any], function: str) -> tuple[PlannedOperation, ...]:
    """Reads the runner's answer to ``MLModelService.ComputePlan``.

    Args:
        result: the answer's ``result``.
        function: the function whose operations are wanted; the plan holds those of all.

    Raises:
        DeviceError: it is no compute plan.
    """
    infos = result.get("infos")
    if not isinstance(infos, list) or len(infos) > _MOST_OPERATIONS:
        raise DeviceError("the runner's compute plan lists no operations")
    found = []
    try:
        for info in infos:
            parts = info["path"]["components"]
            named = [each["programFunction"] for each in parts if "programFunction" in each]
            outputs = [each["programOperation"] for each in parts if "programOperation" in each]
            if not outputs or (named and named[0]["data"]["name"] != function):
                continue
            usage, cost = info["deviceUsage"], info.get("estimatedCost")
            found.append(
                PlannedOperation(
                    output=plain(str(outputs[-1]["data"]["outputName"])),
                    processor=_processor(usage["preferred"]),
                    supported=tuple(_processor(each) for each in usage["supported"]),
                    cost=None if cost is None else float(cost),
                )
            )
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise DeviceError(f"the runner's compute plan is damaged: {plain(repr(error))}") from error
    return tuple(found)


def sections_of(
    plan: Sequence[PlannedOperation], package: Package, function: str
) -> tuple[Section, ...]:
    """Tables of a plan: operators by processor, and what could run elsewhere.

    Args:
        plan: what `read_plan` returned.
        package: the package, which knows what operator gives each output.
        function: the function.
    """
    types = {
        str(output.name): str(operation.type)
        for operation in package.operations(function)
        for output in operation.outputs
    }
    counts: Counter[tuple[str, str]] = Counter()
    costs: Counter[tuple[str, str]] = Counter()
    for each in plan:
        operator = types.get(each.output, "not in the package")
        key = (operator if each.output else "without a result", each.processor)
        counts[key] += 1
        costs[key] += round((each.cost or 0.0) * 1e6)
    rows = [
        (operator, processor, count, f"{costs[operator, processor] / 1e4:.1f} %")
        for (operator, processor), count in sorted(counts.items())
    ]
    columns = ("operator", "processor", "times", "estimated cost")
    return (Section(f"Compute plan of {function}", columns, tuple(rows)),)


def _processor(device: Mapping[str, Any]) -> str:
    known = [PROCESSORS[key] for key in device if key in PROCESSORS]
    if len(known) != 1:
        raise ValueError(f"no known processor: {sorted(map(str, device))}")
    return known[0]
