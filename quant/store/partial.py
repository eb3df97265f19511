"""A weight store whose partial results survive an interruption.

The store's file, and a journal of the weights that are written, lie in a folder that is kept until
the store is complete. Quantizers that work layer by layer also save their state there at the last
boundary between layers, so that a later run starts from it.
"""

from __future__ import annotations

import os
import shutil
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import torch

from quant.errors import QuantizationError, StoreDamagedError, StoreFullError
from quant.input_files import NotRegularError, open_input, read_input
from quant.locked_folders import unfinished
from quant.plans.plan import QuantPlan
from quant.sealed_json import seal, unseal
from quant.store.cached import or_explained
from quant.store.store import STORE_FILES, file_blocks, readable
from quant.store.writer import StoreWriter

JOURNAL_VERSION: Final = 2
_JOURNAL, _LOCK = "progress.json", "lock"
# Two names in turn: the journal must never name a file that is half written.
_BOUNDARIES = ("boundary-0.bin", "boundary-1.bin")
_LARGEST_JOURNAL: Final = 64 << 20


class PartialStore:
    """A store that one run begins to fill and a later run can continue.

    Args:
        folder: where the partial results lie.
        key: the store's key.
        plan: formats by weight name.
        shapes: shape by weight name.
        unchanged: raises an error if the weights' source is no longer what the key says; it is
            called before a journal is written, for a later run trusts what a journal notes.
        tell: called with a sentence for the user when a saved state was damaged.

    Attributes:
        writer: the store's writer.
        done: relative error of each weight that is written, by weight name.
        tokens: how many calibration tokens chose the expert, by the names of experts' weights.
        boundary: the facts of the last `keep_boundary` and the file with its tensors, or None.

    Raises:
        QuantizationError: the folder holds partial results of another store.
        StoreDamagedError: the partial results are not as they were written.
    """

    def __init__(
        self,
        folder: Path,
        key: str,
        plan: QuantPlan,
        shapes: Mapping[str, tuple[int, ...]],
        unchanged: Callable[[], None] = lambda: None,
        tell: Callable[[str], None] = lambda note: None,
    ) -> None:
        self.folder, self._key, self._unchanged = folder, key, unchanged
        self.done: dict[str, float] = {}
        self.tokens: dict[str, int] = {}
        self.boundary: dict[str, object] | None = None
        self._checksums: dict[str, dict[str, int]] = {}
        self._rewriting = threading.Lock()  # threads that write different weights share the journal
        self._boundary_checksum: int | None = None
        journal = readable(folder, self._read_journal)
        if journal is not None and (folder / STORE_FILES[0]).is_file():
            self.writer = StoreWriter(folder, plan, shapes, reopen=True)
            try:
                readable(folder, lambda: self._take_up(journal, tell))
            except BaseException:
                self.writer.abandon()
                raise
        else:
            for name in STORE_FILES:
                (folder / name).unlink(missing_ok=True)
            self.writer = StoreWriter(folder, plan, shapes)

    def write(self, weight: str, part: str, at: int, data: memoryview) -> None:
        """Writes bytes at offset ``at`` of a part, from any thread."""
        with self._rewriting:
            if self._checksums.pop(weight, None) is not None:
                self._write_journal()  # first: it must not call these bytes damaged
        self.writer.write(weight, part, at, data)

    def note(self, weight: str, relative_error: float, tokens: int | None = None) -> None:
        """Records that a weight is written, and what `quant.store.writer.WeightNote` holds."""
        self.done[weight] = relative_error
        if tokens is not None:
            self.tokens[weight] = tokens
        self.writer.note(weight, relative_error, tokens)

    def keep(self) -> None:
        """Writes the journal, so that a later run does not repeat the weights noted so far."""
        self.writer.sync()
        for weight in self.done.keys() - self._checksums.keys():
            self._checksums[weight] = self.writer.checksums(weight)
        self._unchanged()
        self._write_journal()

    def keep_boundary(self, facts: dict[str, object], tensors: Iterator[torch.Tensor]) -> None:
        """Saves the state at a boundary between layers and the journal; removes the state before.

        Args:
            facts: where the boundary is, as JSON values.
            tensors: the state there, float32.
        """
        before = None if self.boundary is None else str(self.boundary["file"])
        name = _BOUNDARIES[1 if before == _BOUNDARIES[0] else 0]
        self._boundary_checksum = 0
        with (self.folder / name).open("wb") as stream:
            for tensor in tensors:
                data = tensor.contiguous().view(torch.uint8).numpy().data
                self._boundary_checksum = zlib.crc32(data, self._boundary_checksum)
                stream.write(data)
        self.boundary = {"file": name, **facts}
        self.keep()
        if before is not None:
            (self.folder / before).unlink(missing_ok=True)

    def boundary_file(self) -> Path:
        """The file with the boundary's tensors."""
        assert self.boundary is not None
        return self.folder / str(self.boundary["file"])

    def _take_up(self, journal: dict[str, Any], tell: Callable[[str], None]) -> None:
        """Continues what a journal describes.

        Later weights were quantized on the outputs of those before, so a damaged weight spoils all
        of them. A damaged state at a boundary spoils nothing: the layers before it run again.
        """
        try:
            done, self.boundary = dict(journal["done"]), journal["boundary"]
            tokens = dict(journal.get("tokens", {}))
            self._checksums = dict(journal["checksums"])
            self._boundary_checksum = journal["boundary_checksum"]
        except (LookupError, TypeError, ValueError) as error:
            raise StoreDamagedError(f"{self.folder / _JOURNAL} is damaged ({error})") from error
        for weight, relative_error in done.items():
            # A weight without checksums was being written again; whoever does so does it anew.
            if weight in self._checksums and (
                self.writer.checksums(weight) != self._checksums[weight]
            ):
                raise StoreDamagedError(f"{self.folder} holds {weight} otherwise than it was kept")
            self.note(weight, relative_error, tokens.get(weight))
        if self.boundary is None:
            return
        if _checksum_of(self.boundary_file()) != self._boundary_checksum:
            tell(
                f"{self.boundary_file()} is damaged and not used: the calibration text runs again "
                f"through the layers that are quantized already"
            )
            self.boundary = self._boundary_checksum = None

    def _write_journal(self) -> None:
        journal = {
            "version": JOURNAL_VERSION,
            "key": self._key,
            "done": self.done,
            "tokens": self.tokens,
            "checksums": self._checksums,
            "boundary": self.boundary,
            "boundary_checksum": self._boundary_checksum,
        }
        partial = self.folder / f"{_JOURNAL}.partial"
        partial.write_text(seal(journal), encoding="utf-8")
        partial.replace(self.folder / _JOURNAL)

    def _read_journal(self) -> dict[str, Any] | None:
        path = self.folder / _JOURNAL
        if not path.exists():
            return None
        try:
            journal = unseal(read_input(path, _LARGEST_JOURNAL))
            version, key = journal["version"], journal["key"]
            done, boundary = journal["done"], journal["boundary"]
            ours = version == JOURNAL_VERSION and key == self._key
            if ours and not _is_sound(done, boundary):
                raise ValueError("it does not say what is done")
        except (ValueError, LookupError, IsADirectoryError, NotRegularError) as error:
            raise StoreDamagedError(
                f"{path} is not a journal of partial results ({error})"
            ) from error
        if version != JOURNAL_VERSION or key != self._key:
            raise QuantizationError(
                f"{self.folder} holds partial results of another model, recipe, rotation or "
                f"calibration: name another folder, or remove this one"
            )
        return dict(journal)


def _is_sound(done: object, boundary: object) -> bool:
    """Whether a journal's facts have their types; a boundary's file must be one of ours."""
    numbers = isinstance(done, dict) and all(
        isinstance(each, float | int) for each in done.values()
    )
    named = boundary is None or (isinstance(boundary, dict) and boundary.get("file") in _BOUNDARIES)
    return numbers and named


def _checksum_of(file: Path) -> int | None:
    """Returns CRC-32 of a file, None where there is none."""
    found = 0
    try:
        with open_input(file) as stream:
            for block in file_blocks(stream.fileno(), 0, file.stat().st_size):
                found = zlib.crc32(block, found)
    except FileNotFoundError:
        return None
    return found


@contextmanager
def partial_store(
    cache: Path,
    key: str,
    plan: QuantPlan,
    shapes: Mapping[str, tuple[int, ...]],
    folder: Path | None = None,
    unchanged: Callable[[], None] = lambda: None,
    tell: Callable[[str], None] = lambda note: None,
) -> Iterator[PartialStore]:
    """Opens a partial store; it moves to ``cache / key`` when the block ends without an error.

    When the block raises, the partial results stay in their folder; where a weight was refused,
    they stay only in a folder that the user named.

    Args:
        cache: folder of stores.
        key: the store's key, `quant.store.cached.store_key`.
        plan: formats by weight name.
        shapes: shape by weight name.
        folder: where partial results are kept and looked for; by default a folder in the cache
            whose name contains the key.
        unchanged: raises an error if the weights' source is no longer what the key says; it is
            called before the store gets its name and before partial results are kept.
        tell: called with a sentence for the user when partial results were damaged.

    Raises:
        StoreFullError: there is no room for the store.
        StoreDamagedError: the folder that the user named holds damaged partial results. In the
            cache they are removed and made again.
        StoreUnreadableError: the system does not let the partial results be read.
        QuantizationError: the folder holds partial results of another store or what EdgeForge did
            not write, another process works there, or it cannot be written.
    """
    where, named = folder or cache / f".{key}.resume", folder or cache
    or_explained(cache, lambda: cache.mkdir(parents=True, exist_ok=True))
    or_explained(named, lambda: where.mkdir(parents=True, exist_ok=True))
    if folder is not None:
        or_explained(where, lambda: _refuse_strange(where))
    with _locked(where, named):
        try:
            store = _open(
                where,
                named,
                lambda: PartialStore(where, key, plan, shapes, unchanged, tell),
                tell,
                own=folder is None,
            )
        except StoreFullError:
            if folder is None:  # nothing is done yet, and the disk is full
                _clear(where, whole=True)
            raise
        try:
            yield store
        except BaseException as error:
            store.writer.abandon()
            refused = isinstance(error, QuantizationError) and not isinstance(error, StoreFullError)
            if refused and folder is None:  # the same work would be refused again
                _clear(where, whole=True)
            raise
        or_explained(named, store.writer.finish)
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


def _open(
    where: Path,
    named: Path,
    opened: Callable[[], PartialStore],
    tell: Callable[[str], None],
    *,
    own: bool,
) -> PartialStore:
    """Opens partial results; in the cache's ``own`` folder, damaged ones are removed first.

    Messages name the folder ``named``, which users know.
    """
    try:
        return or_explained(named, opened)
    except StoreDamagedError as damage:
        if not own:
            raise StoreDamagedError(
                f"{damage}: name another folder, or remove this one"
            ) from damage
        for path in (*where.glob("boundary-*.bin"), where / _JOURNAL):
            path.unlink(missing_ok=True)
        tell(f"damaged partial results were removed and are made again: {damage}")
        return or_explained(named, opened)


@contextmanager
def _locked(folder: Path, named: Path) -> Iterator[None]:
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
    descriptor = or_explained(named, lambda: os.open(folder / _LOCK, flags, 0o644))
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
