"""A weight store whose partial results survive an interruption.

The store's file, and a journal of the weights that are written, lie in a folder that is kept until
the store is complete. Quantizers that work layer by layer also save their state there at the last
boundary between layers, so that a later run starts from it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import torch

from quant.errors import QuantizationError
from quant.locked_folders import unfinished
from quant.plans.plan import QuantPlan
from quant.store.cached import or_explained
from quant.store.store import STORE_FILES
from quant.store.writer import StoreWriter

JOURNAL_VERSION: Final = 1
_JOURNAL, _LOCK = "progress.json", "lock"
_BOUNDARIES: Final = ("boundary-0.bin", "boundary-1.bin")


class PartialStore:
    """A store that one run begins to fill and a later run can continue.

    Args:
        folder: where the partial results lie.
        key: the store's key.
        plan: formats by weight name.
        shapes: shape by weight name.
        unchanged: raises an error if the weights' source is no longer what the key says; it is
            called before a journal is written, for a later run trusts what a journal notes.

    Attributes:
        writer: the store's writer.
        done: relative error of each weight that is written, by weight name.
        boundary: the facts of the last `keep_boundary` and the file with its tensors, or None.

    Raises:
        QuantizationError: the folder holds partial results of another store.
    """

    def __init__(
        self,
        folder: Path,
        key: str,
        plan: QuantPlan,
        shapes: Mapping[str, tuple[int, ...]],
        unchanged: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder, self._key, self._unchanged = folder, key, unchanged
        self.done: dict[str, float] = {}
        self.boundary: dict[str, object] | None = None
        journal = self._read_journal()
        if journal is not None and (folder / STORE_FILES[0]).is_file():
            self.writer = StoreWriter(folder, plan, shapes, reopen=True)
            for weight, error in journal["done"].items():
                self.note(weight, error)
            self.boundary = journal["boundary"]
        else:
            for name in STORE_FILES:
                (folder / name).unlink(missing_ok=True)
            self.writer = StoreWriter(folder, plan, shapes)

    def write(self, weight: str, part: str, at: int, data: memoryview) -> None:
        """Writes bytes at offset ``at`` of a part, from any thread."""
        self.writer.write(weight, part, at, data)

    def note(self, weight: str, relative_error: float) -> None:
        """Records that a weight is written, and the relative error of its stored values."""
        self.done[weight] = relative_error
        self.writer.note(weight, relative_error)

    def keep(self) -> None:
        """Writes the journal, so that a later run does not repeat the weights noted so far."""
        self.writer.sync()
        self._unchanged()
        journal = {
            "version": JOURNAL_VERSION,
            "key": self._key,
            "done": self.done,
            "boundary": self.boundary,
        }
        partial = self.folder / f"{_JOURNAL}.partial"
        partial.write_text(json.dumps(journal), encoding="utf-8")
        partial.replace(self.folder / _JOURNAL)

    def keep_boundary(self, facts: dict[str, object], tensors: Iterator[torch.Tensor]) -> None:
        """Saves the state at a boundary between layers and the journal; removes the state before.

        Args:
            facts: where the boundary is, as JSON values.
            tensors: the state there, float32.
        """
        # Two file names in turn: the journal must never name a file that is half written.
        before = None if self.boundary is None else str(self.boundary["file"])
        name = _BOUNDARIES[before == _BOUNDARIES[0]]
        with (self.folder / name).open("wb") as stream:
            for tensor in tensors:
                stream.write(tensor.contiguous().view(torch.uint8).numpy().data)
        self.boundary = {"file": name, **facts}
        self.keep()
        if before is not None:
            (self.folder / before).unlink(missing_ok=True)

    def boundary_file(self) -> Path:
        """The file with the boundary's tensors."""
        assert self.boundary is not None
        return self.folder / str(self.boundary["file"])

    def _read_journal(self) -> dict[str, Any] | None:
        path = self.folder / _JOURNAL
        if not path.exists():
            return None
        try:
            journal: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            version, key = journal["version"], journal["key"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise QuantizationError(
                f"{path} is not a journal of partial results ({error}): name another folder, or "
                f"remove this one"
            ) from error
        if version != JOURNAL_VERSION or key != self._key:
            raise QuantizationError(
                f"{self.folder} holds partial results of another model, recipe, rotation or "
                f"calibration: name another folder, or remove this one"
            )
        return journal


@contextmanager
def partial_store(
    cache: Path,
    key: str,
    plan: QuantPlan,
    shapes: Mapping[str, tuple[int, ...]],
    folder: Path | None = None,
    unchanged: Callable[[], None] = lambda: None,
) -> Iterator[PartialStore]:
    """Opens a partial store; it moves to ``cache / key`` when the block ends without an error.

    When the block raises, the partial results stay in their folder.

    Args:
        cache: folder of stores.
        key: the store's key, `quant.store.cached.store_key`.
        plan: formats by weight name.
        shapes: shape by weight name.
        folder: where partial results are kept and looked for; by default a folder in the cache
            whose name contains the key.
        unchanged: raises an error if the weights' source is no longer what the key says; it is
            called before the store gets its name and before partial results are kept.

    Raises:
        StoreFullError: there is no room for the store.
        QuantizationError: the folder holds partial results of another store or what EdgeForge did
            not write, another process works there, or it cannot be written.
    """
    where = folder or cache / f".{key}.resume"
    or_explained(cache, lambda: cache.mkdir(parents=True, exist_ok=True))
    or_explained(where, lambda: where.mkdir(parents=True, exist_ok=True))
    if folder is not None:
        or_explained(where, lambda: _refuse_strange(where))
    with _locked(where):
        store = or_explained(where, lambda: PartialStore(where, key, plan, shapes, unchanged))
        try:
            yield store
        except BaseException:
            store.writer.abandon()
            raise
        or_explained(where, store.writer.finish)
        unchanged()
        with ExitStack() as stack:
            whole = or_explained(cache, lambda: stack.enter_context(unfinished(cache, key)))
            for name in STORE_FILES:
                shutil.move(where / name, whole / name)
            try:
                whole.rename(cache / key)
            except OSError:  # another process was faster; the bytes of its store are the same
                if not (cache / key / STORE_FILES[1]).is_file():
                    raise
        _clear(where, folder is None)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Locks a folder of partial results against other processes.

    Raises:
        QuantizationError: another process holds the lock.
    """
    try:
        import fcntl
    except ImportError:  # Windows has no flock: nothing guards the folder there
        yield
        return
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = or_explained(folder, lambda: os.open(folder / _LOCK, flags, 0o644))
    with os.fdopen(descriptor, "w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise QuantizationError(
                f"another process is quantizing the same model into {folder}: wait until it ends"
            ) from None
        yield


def _refuse_strange(folder: Path) -> None:
    """Refuses a folder that the user named and in which no partial results were kept before.

    Raises:
        QuantizationError: names a file that lies there.
    """
    found = sorted(path.name for path in folder.iterdir())
    if found and not {_JOURNAL, _LOCK} & set(found):
        raise QuantizationError(
            f"{folder} holds {found[0]}, which EdgeForge did not write, so partial results are not "
            f"kept there: name another folder for --resume"
        )


def _clear(folder: Path, whole: bool) -> None:
    """Removes the folder, or, where the user named it, only the files that were put there."""
    if whole:
        shutil.rmtree(folder, ignore_errors=True)
        return
    for name in (*_BOUNDARIES, _JOURNAL, _LOCK):
        (folder / name).unlink(missing_ok=True)
