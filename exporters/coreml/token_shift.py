"""Each token's predecessor, with the state that holds the last token."""

from __future__ import annotations

from torch import fx

from exporters.coreml.function import Value
from exporters.coreml.recent import RecentRows
from exporters.coreml.state import FunctionLowering


class TokenShift:
    """Emits the token shifts of one function.

    Args:
        state: the function being lowered.
        recent: the rows of recent tokens.
    """

    def __init__(self, state: FunctionLowering, recent: RecentRows) -> None:
        self.state, self.recent = state, recent

    def emit(self, node: fx.Node) -> Value:
        """Emits a shift: the rows of ``[recent or zeros, x]`` without the last.

        Given::

            %y = edgeforge::token_shift(%x, %recent, %position)
        """
        x = self.state.value(node, 0)
        rows = self.recent.joined(node, 1, x, 1)
        return self.state.emitter.token_rows(self.state.name(node), rows, 0, x.shape[1], 1)
