"""A weight store that takes long: its partial results outlive an interruption.

The store's file, and a journal of what of it is done, lie in a folder that is kept until the store
is whole. Quantizers that work layer by layer also leave there what they know at the last boundary
between layers, so that nothing before it runs again.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch

from quant.errors import QuantizationError
from quant.plans.plan import QuantPlan
from quant.store.store import STORE_FILES, StoreWriter, or_explained

JOURNAL_VERSION: Final = 1
_JOURNAL, _LOCK = "progress.json", "lock"


class PartialStore:
    """A store being filled that can be left and taken up again.

    Args:
        folder: where it lies.
        key: of the store.
        plan: formats by weight.
        shapes: shape by weight.

    Attributes:
        writer: of the store.
        done: relative error of each weight that is written.
        boundary: what `keep_boundary` was last given, or None.

    Raises:
        QuantizationError: the folder holds partial results of another store.
    """

    def __init__(
        self, folder: Path, key: str, plan: QuantPlan, shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        self.folder, self._key = folder, key
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
        """Writes bytes ``at`` an offset within a part, from any thread."""
        self.writer.write(weight, part, at, data)

    def note(self, weight: str, relative_error: float) -> None:
        """Records that a weight is written, and how well it survived."""
        self.done[weight] = relative_error
        self.writer.note(weight, relative_error)

    def keep(self) -> None:
        """Makes what is noted last: it is not done again."""
        self.writer.sync()
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
        """Makes a boundary last, and what is noted with it; the boundary before it goes.

        Args:
            facts: what tells where the boundary is, for JSON.
            tensors: float32, what is known there.
        """
        before = None if self.boundary is None else str(self.boundary["file"])
        name = "boundary-1.bin" if before == "boundary-0.bin" else "boundary-0.bin"
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
                f"{path} is no journal of partial results ({error}): name another folder, or "
                f"remove it"
            ) from error
        if version != JOURNAL_VERSION or key != self._key:
            raise QuantizationError(
                f"{self.folder} holds partial results of another model, recipe, rotation or "
                f"calibration: name another folder, or remove it"
            )
        return journal


@contextmanager
def partial_store(
    cache: Path,
    key: str,
    plan: QuantPlan,
    shapes: Mapping[str, tuple[int, ...]],
    folder: Path | None = None,
) -> Iterator[PartialStore]:
    """A store that appears under ``cache / key`` when the block ends well, and else is kept.

    Args:
        cache: folder of stores.
        key: `quant.store.store.store_key`.
        plan: formats by weight.
        shapes: shape by weight.
        folder: where partial results are kept, and found; by default a folder of the cache, by key.

    Raises:
        StoreFullError: there is no room for the store.
        QuantizationError: the folder holds partial results of another store, or another process
            is at work there, or it cannot be written.
    """
    where = folder or cache / f".{key}.resume"
    or_explained(cache, lambda: cache.mkdir(parents=True, exist_ok=True))
    or_explained(where, lambda: where.mkdir(parents=True, exist_ok=True))
    with _locked(where):
        store = or_explained(where, lambda: PartialStore(where, key, plan, shapes))
        try:
            yield store
        except BaseException:
            store.writer.abandon()
            raise
        or_explained(where, store.writer.finish)
        whole = cache / f".{key}.partial-{os.getpid()}-{threading.get_ident()}"
        try:
            whole.mkdir()
            for name in STORE_FILES:
                shutil.move(where / name, whole / name)
            try:
                whole.rename(cache / key)
            except OSError:  # another process was first; its bytes are the same
                if not (cache / key / STORE_FILES[1]).is_file():
                    raise
        finally:
            shutil.rmtree(whole, ignore_errors=True)
        _clear(where, folder is None)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keeps other processes out of a folder of partial results."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with (folder / _LOCK).open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise QuantizationError(
                f"another process is quantizing the same model into {folder}: wait for it"
            ) from None
        yield


def _clear(folder: Path, whole: bool) -> None:
    """Removes what is not needed any more: the folder, or only what was put there."""
    if whole:
        shutil.rmtree(folder, ignore_errors=True)
        return
    for path in (*folder.glob("boundary-*.bin"), folder / _JOURNAL, folder / _LOCK):
        path.unlink(missing_ok=True)
