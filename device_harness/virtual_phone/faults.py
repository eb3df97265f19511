"""The faults that a virtual phone shows when it is told to."""

from __future__ import annotations

import threading
from typing import Final

FAULTS: Final[dict[str, str]] = {
    "offline": "accepts the connection and never says a word",
    "unauthorized": "accepts no key, as a phone whose owner has not said yes",
    "unplugged": "cuts the line after so many received bytes, and every later line at once",
    "cut": "cuts the line once, after so many received bytes; the next connection works",
    "disk-full": "refuses to write a file after so many bytes sent to it in all",
    "little-space": "says that so many bytes are free",
    "killed": "kills the worker, as Android does for want of memory, after so many answered bytes",
    "garbage": "answers every command with so many bytes of noise and escape codes, without an end",
    "clock-skew": "has a clock that is so many seconds ahead",
    "hung-shell": "starts commands that never say a word and never end",
    "throttling": "reports this thermal status, 0 to 6, and clocks held down",
    "lies": "says that files arrived whole, but keeps only their first so many bytes",
    "forgets-exit": "ends every command without its exit code",
    "32-bit": "is a phone with an arm processor of 32 bits",
    "x86": "is a phone, or an emulator, with an x86 processor",
}
_WITHOUT_AMOUNT: Final = 0


class Faults:
    """The faults that are switched on, each with an amount; safe to change while the phone runs.

    >>> faults = Faults()
    >>> faults.set("cut", 1000)
    >>> faults.take("cut"), faults.get("cut")
    (1000, None)
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._on: dict[str, int] = {}

    def set(self, name: str, amount: int = _WITHOUT_AMOUNT) -> None:
        """Switches a fault on.

        Raises:
            ValueError: there is no such fault.
        """
        if name not in FAULTS:
            raise ValueError(f"there is no fault {name!r}; known: {', '.join(FAULTS)}")
        with self._lock:
            self._on[name] = amount

    def clear(self, name: str | None = None) -> None:
        """Switches a fault off, or all of them."""
        with self._lock:
            if name is None:
                self._on.clear()
            else:
                self._on.pop(name, None)

    def get(self, name: str) -> int | None:
        """A fault's amount; None where it is off."""
        with self._lock:
            return self._on.get(name)

    def take(self, name: str) -> int | None:
        """A fault's amount, which is switched off by this; None where it was off."""
        with self._lock:
            return self._on.pop(name, None)


def parse_fault(text: str) -> tuple[str, int]:
    """Reads ``NAME`` or ``NAME=AMOUNT``.

    Raises:
        ValueError: there is no such fault, or the amount is no number.

    >>> parse_fault("disk-full=1000000")
    ('disk-full', 1000000)
    """
    name, _, amount = text.partition("=")
    if name not in FAULTS:
        raise ValueError(f"there is no fault {name!r}; known: {', '.join(FAULTS)}")
    if amount and not (amount.isascii() and amount.isdigit()):
        raise ValueError(f"--fault {text} needs a whole number after the sign =")
    return name, int(amount or _WITHOUT_AMOUNT)
