"""What a session and a device share: they are closed, at the latest by a ``with`` statement."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, Self


class Closing(Protocol):
    """Something to close, or to use in a ``with`` statement, which closes it."""

    def close(self) -> None:
        """Lets go of what it holds, if there is anything; closing again does nothing."""

    def __enter__(self) -> Self:
        """The thing itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes it."""
        self.close()
