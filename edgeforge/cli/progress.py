"""Progress on stderr: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import Any, Self

from edgeforge.cli.exits import one_line
from edgeforge.cli.printable import console, printable
from edgeforge.stage_progress import NOTE

_LINE_SECONDS = 5.0


class Reporter:
    """Shows the progress of stages; a `edgeforge.stage_progress.Progress` for any thread.

    Args:
        quiet: whether to print nothing.
    """

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._bar: Any = None
        self._tasks: dict[str, Any] = {}
        self._lines: dict[str, float] = {}
        self._first: dict[str, tuple[float, int]] = {}
        self._done: dict[str, int] = {}
        self._started = time.perf_counter()
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        if not self._quiet and sys.stderr.isatty():
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description:<18}"),
                BarColumn(),
                TextColumn("{task.fields[amount]}"),
                TimeRemainingColumn(),
                console=console(stderr=True),
                transient=True,
            )
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, stage: str, done: int, size: int) -> None:
        """Reports that ``done`` of ``size`` of a stage is done; the size is 0 if it is unknown.

        What begins with `NOTE` is printed to stay, also where no progress is to be shown.
        """
        if stage.startswith(NOTE):
            with self._lock:
                self._print_note(one_line(f"warning: {stage.removeprefix(NOTE)}"))
            return
        if self._quiet:
            return
        with self._lock:
            if done < self._done.get(stage, 0):
                # It begins again, for another artifact: its time starts anew, too.
                self._lines.pop(stage, None)
                if stage in self._tasks:
                    self._bar.remove_task(self._tasks.pop(stage))
            self._done[stage] = done
            if self._bar is not None:
                self._update_bar(stage, done, size)
            else:
                self._print_line(stage, done, size)

    def _print_note(self, words: str) -> None:
        if self._bar is None:
            print(words, file=sys.stderr, flush=True)
        else:  # above the bar, which will vanish
            self._bar.console.print(words, markup=False, highlight=False, soft_wrap=True)

    def _update_bar(self, stage: str, done: int, size: int) -> None:
        amount = f"{_amount(done)} of {_amount(size)}" if size > 1 else ""
        if stage not in self._tasks:
            for task in self._tasks.values():
                self._bar.update(task, visible=False)
            self._tasks[stage] = self._bar.add_task(stage, total=size or None, amount=amount)
        self._bar.update(self._tasks[stage], completed=done, total=size or None, amount=amount)

    def _print_line(self, stage: str, done: int, size: int) -> None:
        now = time.perf_counter()
        first = stage not in self._lines
        if not first and (now - self._lines[stage] < _LINE_SECONDS or not size):
            return
        self._lines[stage] = now
        words = f"{now - self._started:7.1f} s  {printable(stage)}"
        if first:
            self._first[stage] = now, done
        else:
            begun, before = self._first[stage]
            words += f": {done / size:.0%} of {_amount(size)}"
            if before < done < size:
                left = (now - begun) * (size - done) / (done - before)
                words += f", about {left:.0f} s left"
        print(words, file=sys.stderr, flush=True)


def _amount(count: int) -> str:
    """Returns a count with a metric prefix.

    >>> _amount(1_235_814_400), _amount(12)
    ('1.24 G', '12')
    """
    for factor, prefix in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if count >= factor:
            return f"{count / factor:.3g}{prefix}"
    return str(count)
