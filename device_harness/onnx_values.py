"""Shows values between the nodes of an ONNX graph: the graph runs with them as its outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from device_harness.session import Shown

if TYPE_CHECKING:
    import onnxruntime

_SKIP_NORM: Final = "SkipSimplifiedLayerNormalization"
_SUM: Final = 3  # the place of a skip norm's sum among its outputs


def shown_values(
    graph: Path,
    texts: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    open_session: Callable[[bytes], onnxruntime.InferenceSession],
) -> list[Shown]:
    """Runs a graph on texts and returns values inside it.

    The sum that a norm computes on the way, and that no node reads, is named ``NORM_sum``.

    Args:
        graph: the .onnx, beside its weight file.
        texts: the graph's inputs, for each text.
        names: the values; what the graph does not compute is left out.
        open_session: opens a graph that is given as bytes, with weights from the same folder.
    """
    made, shown = showing(graph, names, alone=True)
    if not shown:
        return [{} for _ in texts]
    session = open_session(made)
    return [
        {
            name: [np.asarray(value, np.float32)]
            for name, value in zip(shown, session.run(shown, dict(feeds)), strict=True)
        }
        for feeds in texts
    ]


def showing(graph: Path, names: Sequence[str], *, alone: bool) -> tuple[bytes, list[str]]:
    """Returns a copy of a graph whose outputs are values inside it, and their names in order.

    Args:
        graph: the .onnx.
        names: the values; what the graph does not compute is left out.
        alone: whether the graph's own outputs are left out; else they come first.
    """
    import onnx

    model = onnx.load(graph, load_external_data=False)
    made = {name for node in model.graph.node for name in node.output}
    unnamed = {f"{node.output[0]}_sum": node for node in model.graph.node if _hides_sum(node)}
    shown = [name for name in dict.fromkeys(names) if name in made or name in unnamed]
    for name in shown:
        if name in made:
            continue
        outputs = [*unnamed[name].output, "", "", ""][:_SUM]
        del unnamed[name].output[:]
        unnamed[name].output.extend([*outputs, name])
    if alone:
        del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in shown)
    return model.SerializeToString(), shown


def _hides_sum(node: Any) -> bool:
    return node.op_type == _SKIP_NORM and (len(node.output) <= _SUM or not node.output[_SUM])
