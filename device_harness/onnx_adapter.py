"""Reads adapters of onnxruntime's format, and refuses those that a graph does not take."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from device_harness.errors import DeviceError

if TYPE_CHECKING:
    import onnxruntime


def read_adapter(
    path: Path, graph: onnxruntime.InferenceSession
) -> dict[str, npt.NDArray[np.float32]]:
    """Returns an adapter's factors by the graph's inputs.

    onnxruntime itself takes a part of an adapter in silence, and fails in a product later.

    Raises:
        DeviceError: it cannot be read, is not whole, or is of another graph.
    """
    import onnxruntime

    try:
        read = onnxruntime.AdapterFormat.read_adapter(str(path))
        # The values are views of what is read, and go with it.
        found = {name: value.numpy().copy() for name, value in read.get_parameters().items()}
    except Exception as error:  # onnxruntime's errors share no base class
        told = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DeviceError(f"{path} cannot be read as an adapter: {told[:200]}") from error
    places = {each.name: each.shape for each in graph.get_overridable_initializers()}
    for name, values in found.items():
        other = name[:-1] + {"A": "B", "B": "A"}.get(name[-1:], "")
        if name not in places:
            raise DeviceError(f"{path} holds {name}, which the graph does not take: it is another")
        if other not in found:
            raise DeviceError(f"{path} holds {name} and lacks {other}: the adapter is not whole")
        side, rank = (0, 1) if name.endswith("A") else (1, 0)
        plain = values.ndim == 2 and values.dtype == np.float32
        if (
            not plain
            or values.shape[side] != places[name][side]
            or values.shape[rank] != found[other].shape[1 - rank]
        ):
            raise DeviceError(
                f"{path} gives {name} the shape {list(values.shape)}, which does not fit the graph"
            )
    if not found:
        raise DeviceError(f"{path} holds no factors")
    return found
