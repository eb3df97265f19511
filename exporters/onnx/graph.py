"""An ONNX graph under construction: nodes, initializers and their places in the weight file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, helper

from exporters.onnx.weight_file import PAGE, Placed, WeightFile
from quant.store.store import Extent

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, ValueInfoProto

MICROSOFT = "com.microsoft"
# The oldest opset with RMSNormalization, the only form of the norm that onnx.checker knows.
OPSET, IR_VERSION = 23, 11

_ELEMENT = {
    "F32": TensorProto.FLOAT,
    "F16": TensorProto.FLOAT16,
    "BF16": TensorProto.BFLOAT16,
    "U8": TensorProto.UINT8,
}


class GraphBuilder:
    """Collects one graph; several graphs may share one weight file.

    Args:
        weights: the weight file, for initializers that are too large for the graph itself.
    """

    def __init__(self, weights: WeightFile) -> None:
        self.weights = weights
        self._nodes: list[NodeProto] = []
        self._initializers: dict[str, TensorProto] = {}
        self._given: set[str] = set()  # the names of the nodes' outputs

    def node(
        self,
        op: str,
        inputs: Sequence[str],
        outputs: Sequence[str] | str,
        *,
        domain: str = "",
        **attributes: object,
    ) -> str:
        """Appends a node and returns the name of its first output."""
        names = [outputs] if isinstance(outputs, str) else list(outputs)
        name = f"{op}:{names[0]}"
        made = helper.make_node(op, list(inputs), names, name=name, domain=domain, **attributes)
        self._nodes.append(made)
        self._given.update(names)
        return names[0]

    def constant(self, name: str, value: npt.NDArray[np.generic]) -> str:
        """Adds a small initializer, which the graph itself holds, and returns its name."""
        element = helper.np_dtype_to_tensor_dtype(value.dtype)
        made = helper.make_tensor(name, element, value.shape, value.tobytes(), raw=True)
        known = self._initializers.setdefault(name, made)
        assert known == made, f"two constants have the name {name}"
        return name

    def integers(self, name: str, values: Sequence[int]) -> str:
        """Adds a small initializer ``int64[n]`` and returns its name."""
        return self.constant(name, np.array(values, np.int64))

    def table(self, name: str, value: npt.NDArray[np.generic]) -> str:
        """Adds an initializer from an array; one of a page or more goes to the weight file."""
        data = np.ascontiguousarray(value)
        if data.nbytes < PAGE:
            return self.constant(name, data)
        element = helper.np_dtype_to_tensor_dtype(data.dtype)
        placed = self.weights.place_bytes(name, data.tobytes())
        return self._external(name, element, data.shape, placed)

    def raw(self, name: str, element: int, shape: Sequence[int], data: bytes) -> str:
        """Adds a small initializer from its bytes, for elements that NumPy does not have."""
        self._initializers[name] = helper.make_tensor(name, element, shape, data, raw=True)
        return name

    def stored(
        self,
        name: str,
        extent: Extent,
        shape: Sequence[int],
        key: object,
        *,
        element: int | None = None,
    ) -> str:
        """Adds an initializer whose bytes are in the weight store.

        Args:
            name: the initializer's name.
            extent: where the bytes are.
            shape: the shape in which this graph reads them; another initializer may read the same
                bytes in another shape.
            key: identifies the bytes; initializers with equal keys share one place in the weight
                file.
            element: ONNX's number of the dtype in which this graph reads the bytes; None for the
                store's own.

        Returns:
            The initializer's name.
        """
        if name not in self._initializers:
            element = _ELEMENT[extent.dtype] if element is None else element
            if extent.nbytes < PAGE:
                with extent.file.open("rb") as stream:
                    stream.seek(extent.offset)
                    data = stream.read(extent.nbytes)
                self._initializers[name] = helper.make_tensor(name, element, shape, data, raw=True)
            else:
                self._external(name, element, shape, self.weights.place_extent(key, extent))
        return name

    def _external(self, name: str, element: int, shape: Sequence[int], placed: Placed) -> str:
        tensor = TensorProto(name=name, data_type=element, dims=list(shape))
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (
            ("location", self.weights.name),
            ("offset", str(placed.offset)),
            ("length", str(placed.nbytes)),
        ):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, value
        self._initializers[name] = tensor
        return name

    def has(self, name: str) -> bool:
        """Whether a node gives a value of this name."""
        return name in self._given

    def model(
        self,
        inputs: Sequence[ValueInfoProto],
        outputs: Sequence[ValueInfoProto],
        name: str = "decoder",
    ) -> ModelProto:
        """The finished model; the weight file holds the bytes of its large initializers."""
        graph = helper.make_graph(
            self._nodes,
            name,
            list(inputs),
            list(outputs),
            initializer=list(self._initializers.values()),
        )
        return helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)],
            ir_version=IR_VERSION,
            producer_name="edgeforge",
        )
