"""Keeps what is in front of a convolution with rounded inputs in the layout that it has.

XNNPACK convolves images whose channels lie last, and ExecuTorch 1.4 turns what a convolution reads
into that layout. Of rounded inputs it goes back to the first value of the whole chain, which it
turns for all readers. Those that depend on the layout, such as a padding, then compute another
thing. Pull request 21637 of pytorch/executorch mends it in later versions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def layouts_kept() -> Iterator[None]:
    """ExecuTorch's exporter turns only what a convolution rounds, for this convolution alone."""
    import torch
    from executorch.backends.xnnpack import _passes
    from executorch.backends.xnnpack._passes.channels_last_tagged_reshape_pass import (
        ChannelsLastTaggedReshapePass,
        InputDimOrder,
    )
    from executorch.backends.xnnpack.utils.quant_utils import is_dequant, is_dynamic_qdq
    from executorch.exir.dialects._ops import ops
    from torch import fx

    class Kept(ChannelsLastTaggedReshapePass):  # type: ignore[misc]
        def input_to_nhwc(
            self, graph_module: fx.GraphModule, input_node: fx.Node, target_node: fx.Node
        ) -> None:
            """Turns what is rounded.

            Given::

                dequantize(quantize(%x, choose_qparams(%x)))

            Result::

                %c = _to_copy(%x, channels_last)
                dequantize(quantize(%c, choose_qparams(%c)))
            """
            if not (is_dequant(input_node) and is_dynamic_qdq(input_node)):
                super().input_to_nhwc(graph_module, input_node, target_node)
                return
            narrow: Any = input_node.args[0]
            source, scale = narrow.args[:2]
            if self.input_dim_order(source, InputDimOrder.NHWC):
                return
            turned = source.meta.get(self.PARTNER_NODE)
            if turned is None:
                with graph_module.graph.inserting_after(source):
                    turned = self.create_call_function_node(
                        graph_module, ops.edge.aten._to_copy.default, (source,), torch.channels_last
                    )
                self.mark_as_nhwc_node(turned)
                self.make_partners(source, turned)
            for reader in (narrow, scale.args[0]):
                reader.replace_input_with(source, turned)

    _passes.ChannelsLastTaggedReshapePass = Kept
    try:
        yield
    finally:
        _passes.ChannelsLastTaggedReshapePass = ChannelsLastTaggedReshapePass
