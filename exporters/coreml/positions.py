"""What many operators of a function share: the positions of its tokens, and values made once."""

from __future__ import annotations

from collections.abc import Callable

from exporters.coreml.function import Value
from exporters.coreml.state import FunctionLowering


class Positions:
    """Emits the positions of a call's tokens, and other values that are emitted at most once.

    Args:
        state: the function being lowered.
    """

    def __init__(self, state: FunctionLowering) -> None:
        self.state, self.emitter = state, state.emitter
        self._shared: dict[str, Value] = {}

    def share(self, name: str, make: Callable[[str], Value]) -> Value:
        """Returns a value that many operators use; the first one that asks for it emits it."""
        if name not in self._shared:
            self._shared[name] = make(name)
        return self._shared[name]

    def count(self) -> Value:
        """The number of tokens of a call, where the caller chooses it: ``int32[]``."""
        emitter = self.emitter

        def make(name: str) -> Value:
            shape = emitter.call("shape", f"{name}_shape", "int32", (2,), x=self.state.ids)
            return emitter.call(
                "gather",
                name,
                "int32",
                (),
                x=shape,
                indices=1,
                axis=0,
                batch_dims=0,
                validate_indices=False,
            )

        return self.share("token_count", make)

    def positions(self) -> Value:
        """The positions of these tokens: ``int32[t]``."""

        def make(name: str) -> Value:
            count = self.state.tokens if self.state.tokens != -1 else self.count()
            if count == 1:
                return self.state.position
            steps = self.emitter.numbers(f"{name}_steps", count)
            return self.emitter.binary("add", name, steps, self.state.position)

        return self.share("positions", make)

    def queries(self) -> Value:
        """The positions of these tokens as a column: ``int32[t, 1]``."""
        shape = (self.state.tokens, 1)
        return self.share(
            "query_positions", lambda name: self.emitter.reshape(name, self.positions(), shape)
        )

    def keys(self) -> Value:
        """The positions of all that caches hold: ``int32[c]``."""
        context = self.state.style.context
        return self.share("key_positions", lambda name: self.emitter.numbers(name, context))

    def continues(self) -> Value:
        """Whether the call follows others of its text: ``bool[1]``."""
        return self.share(
            "continues", lambda name: self.emitter.binary("greater", name, self.state.position, 0)
        )
