"""A checkpoint: its config, its tensors read slice by slice, its tokenizer files.

It is a folder as Hugging Face has it, or a GGUF file (`edgeforge.checkpoint.gguf`).

This module runs no code from a checkpoint, maps no file into memory, and does not import torch.
``pread`` reads weights straight into the caller's buffer, so a process holds only the rows that it
asked for.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING

from edgeforge.checkpoint.digest import CheckpointDigest, FileDigest, Progress, digest_files
from edgeforge.checkpoint.gguf.source import StoredRows, is_gguf, open_gguf, parts_of
from edgeforge.checkpoint.json_text import MAX_CONFIG_BYTES, parse_object, read_small_file, reason
from edgeforge.checkpoint.layout import (
    CONFIG,
    GENERATION_CONFIG,
    SAFETENSORS,
    SAFETENSORS_INDEX,
    TOKENIZER_FILES,
    TORCH,
    TORCH_INDEX,
    WeightLayout,
    find_tokenizer_files,
)
from edgeforge.checkpoint.links import leads_out, left_out, refuse_dangling
from edgeforge.checkpoint.named_source import find_folder, find_tokenizer, require_weights
from edgeforge.checkpoint.source_files import SourceFiles
from edgeforge.checkpoint.tensor_entry import TensorEntry
from edgeforge.errors import CheckpointError, UsageError
from quant.input_files import open_descriptor
from quant.suggestion import nearest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Checkpoint", "CheckpointDigest", "FileDigest", "TensorEntry"]

# NumPy has no bfloat16, so its bits are returned as uint16.
READ_AS = {"float32": "float32", "float16": "float16", "bfloat16": "uint16"}
INTEGERS = ("int32", "int64")

# Files whose content decides what is read, or that are read whole: watched before any is opened.
_READ = (CONFIG, GENERATION_CONFIG, SAFETENSORS, SAFETENSORS_INDEX, TORCH, TORCH_INDEX)

# One read call on Linux transfers at most 2 GiB less one page.
_MAX_READ = 1 << 30


@dataclass(frozen=True)
class _Contents:
    """What a checkpoint holds.

    Attributes:
        config: what ``config.json`` holds.
        generation_config: what ``generation_config.json`` holds.
        tensors: every tensor by name, in the order of the weight files.
        files: the weight files.
        tokenizer_files: the tokenizer files, by name.
        sidecars: the configuration's files, by name.
        gguf: how each tensor of a GGUF file is stored; None in a folder.
        about: what a GGUF file says about its model.
    """

    config: dict[str, object]
    generation_config: dict[str, object]
    tensors: Mapping[str, TensorEntry]
    files: tuple[Path, ...]
    tokenizer_files: dict[str, Path]
    sidecars: dict[str, Path]
    gguf: Mapping[str, StoredRows] | None = None
    about: Mapping[str, str] = field(default_factory=dict)


class Checkpoint:
    """An opened checkpoint; all methods may be called from several threads.

    Attributes:
        path: The folder, or the GGUF file.
        folder: The folder in which the weight files lie.
        source: The folder, file or hub id that the user gave.
        revision: The hub commit, or None for a folder.
        config: The content of ``config.json``.
        generation_config: The content of ``generation_config.json``, or an empty dict.
        tensors: Every tensor by name, in the order of the weight files.
        files: The weight files, sorted by name.
        tokenizer_files: The tokenizer files that are present, by name.
        source_files: All files that are read, which must stay as they were when the checkpoint was
            opened.
        gguf: How each tensor of a GGUF file is stored; None in a folder.
        about: What a GGUF file says about its model, such as ``license``.
        warnings: What a user must know, one sentence each.
        notes: What was made of its files, one sentence each.
        tokenizer_refusal: Why its tokenizer cannot be used, or None.
        named_tokenizer: The absolute path or the hub id of a tokenizer that was named in place of
            its own; empty where none was.
    """

    def __init__(
        self,
        path: Path,
        source: str,
        revision: str | None,
        contents: _Contents,
        source_files: SourceFiles,
    ) -> None:
        self.path = path
        self.folder = path if contents.gguf is None else path.parent
        self.source = source
        self.revision = revision
        self.warnings: tuple[str, ...] = ()
        self.notes: tuple[str, ...] = ()
        self.tokenizer_refusal: str | None = None
        self.named_tokenizer = ""
        self.source_files = source_files
        self.config, self.generation_config = contents.config, contents.generation_config
        self.files, self.tokenizer_files = contents.files, contents.tokenizer_files
        self.tensors: Mapping[str, TensorEntry] = MappingProxyType(dict(contents.tensors))
        self.gguf, self.about = contents.gguf, contents.about
        self._sidecars = contents.sidecars
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()

    @classmethod
    def open(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        tokenizer: str | Path | None = None,
    ) -> Checkpoint:
        """Open a checkpoint and check its layout; weights are read only when asked for.

        Args:
            source: An existing folder, a GGUF file, or a hub id ``organisation/name``.
            revision: A hub branch, tag or commit; refused for a folder or file.
            tokenizer: A folder, a ``tokenizer.json``, ``tokenizer.model`` or ``vocab.json`` file,
                or a hub id from which to take the tokenizer instead.

        Raises:
            CheckpointError: The checkpoint is missing, damaged or unreadable; the message names
                the file.
            UsageError: ``revision`` is given with a folder.
        """
        file = Path(source).expanduser()
        if is_gguf(file) and not file.is_dir() and os.path.lexists(file):
            return cls._open_gguf(file, str(source), revision, tokenizer)
        folder, commit = find_folder(str(source), revision)
        watched = SourceFiles()
        watched.watch(folder / name for name in _READ)
        layout = require_weights(folder, str(source))
        where = folder
        if tokenizer is None:
            files = find_tokenizer_files(folder)
        else:
            where, files = find_tokenizer(str(tokenizer))
        watched.watch((*(folder / name for name in layout.files), *files.values()))
        opened = cls(folder, str(source), commit, _read_folder(folder, layout, files), watched)
        opened.named_tokenizer = _place_of(tokenizer)
        absent = (name for name in TOKENIZER_FILES if name not in files)
        opened.warnings = (
            *left_out(folder, (CONFIG, GENERATION_CONFIG)),
            *left_out(where, absent),
        )
        return opened

    @classmethod
    def _open_gguf(
        cls, file: Path, source: str, revision: str | None, tokenizer: str | Path | None
    ) -> Checkpoint:
        if revision is not None:
            raise UsageError(
                f"{source} is a file, which has no revision: leave out --revision {revision}"
            )
        refuse_dangling(file)
        watched = SourceFiles()
        watched.watch(parts_of(file))
        found = open_gguf(file, with_tokenizer=tokenizer is None)
        sidecars = {name: found.made[name] for name in (CONFIG, GENERATION_CONFIG)}
        files = {name: path for name, path in found.made.items() if name not in sidecars}
        if tokenizer is not None:
            files = find_tokenizer(str(tokenizer))[1]
        watched.watch((*sidecars.values(), *files.values()))
        contents = _Contents(
            config=found.config,
            generation_config=found.generation_config,
            tensors=found.tensors,
            files=found.files,
            tokenizer_files=files,
            sidecars=sidecars,
            gguf=found.rows,
            about=found.about,
        )
        opened = cls(found.path, source, None, contents, watched)
        opened.named_tokenizer = _place_of(tokenizer)
        return opened

    @classmethod
    def of_tensors(cls, folder: Path, file: Path, source: str) -> Checkpoint:
        """Open one safetensors file that is no whole model, such as an adapter's.

        Args:
            folder: The folder that holds it, all of whose files of that kind are watched.
            file: The file.
            source: What the user gave.

        Raises:
            CheckpointError: The file is missing or damaged.
        """
        from edgeforge.checkpoint.adapters import ADAPTER_CONFIG
        from edgeforge.checkpoint.safetensors_header import read_safetensors

        refuse_dangling(file)
        watched = SourceFiles()
        watched.watch((folder / ADAPTER_CONFIG, file))
        contents = _Contents(
            config={},
            generation_config={},
            tensors=read_safetensors(file),
            files=(file,),
            tokenizer_files={},
            sidecars={},
        )
        return cls(folder, source, None, contents, watched)

    @property
    def place(self) -> Path:
        """The absolute path by which it is found again; a GGUF file keeps its name."""
        if self.gguf is None:
            return self.path.resolve()
        return self.folder.resolve() / self.path.name

    def read(self, name: str) -> NDArray[np.float32] | NDArray[np.float16] | NDArray[np.uint16]:
        """Return a whole tensor.

        Returns:
            ``float32``, ``float16``, or ``uint16`` holding bfloat16 bits, of the tensor's shape.

        Raises:
            CheckpointError: There is no such tensor, its dtype is not one of ``READ_AS``, or the
                file was cut short.
        """
        import numpy as np

        entry = self._weight(name)
        result = np.empty(entry.shape, READ_AS[entry.dtype])
        self._fill(entry, entry.offset, result.reshape(-1).data)
        return result

    def read_integers(self, name: str) -> NDArray[np.int32] | NDArray[np.int64]:
        """Return a whole tensor of packed codes or indices, ``int32`` or ``int64``.

        Raises:
            CheckpointError: There is no such tensor, it has another dtype, or the file was cut
                short.
        """
        import numpy as np

        entry = self._entry(name, INTEGERS, "integers")
        result = np.empty(entry.shape, entry.dtype)
        self._fill(entry, entry.offset, result.reshape(-1).data)
        return result

    def read_bytes(self, name: str, start: int, stop: int) -> NDArray[np.uint8]:
        """Return bytes ``start`` to ``stop`` of a tensor of any dtype.

        Raises:
            CheckpointError: There is no such tensor, or the file was cut short.
            IndexError: The bytes are outside the tensor.
        """
        import numpy as np

        entry = self._entry(name)
        if not 0 <= start <= stop <= entry.nbytes:
            raise IndexError(f"bytes {start} to {stop} of {name}, which has {entry.nbytes}")
        result = np.empty(stop - start, np.uint8)
        self._fill(entry, entry.offset + start, result.data)
        return result

    def read_rows(
        self,
        name: str,
        start: int,
        stop: int,
        out: memoryview | NDArray[np.generic] | None = None,
        *,
        axes: int = 1,
    ) -> NDArray[np.float32] | NDArray[np.float16] | NDArray[np.uint16]:
        """Return rows ``start`` to ``stop`` of axis 0, without touching the rest of the tensor.

        Args:
            name: Name of a tensor of one dimension or more.
            start: The first row, counted from 0.
            stop: The row after the last one.
            out: A writable C-contiguous buffer of exactly the rows' bytes to read into.
            axes: How many of the first axes count as one; 2 reads the rows of stacked matrices.

        Returns:
            The rows, ``[stop - start, *shape[axes:]]``, in the dtype that ``read`` returns; a view
            of ``out`` when it is given.

        Raises:
            CheckpointError: As ``read``.
            IndexError: The rows are outside the tensor.
            ValueError: ``out`` has another size or layout.
        """
        import numpy as np

        entry = self._weight(name)
        rows = math.prod(entry.shape[:axes])
        if len(entry.shape) < axes or not 0 <= start <= stop <= rows:
            raise IndexError(f"rows {start} to {stop} of {name}, whose shape is {entry.shape}")
        shape = (stop - start, *entry.shape[axes:])
        row_bytes = entry.nbytes // rows if rows else 0
        nbytes = row_bytes * (stop - start)
        if out is None:
            result = np.empty(shape, READ_AS[entry.dtype])
        else:
            view = out if isinstance(out, memoryview) else out.data
            if view.readonly or not view.c_contiguous or view.nbytes != nbytes:
                raise ValueError(
                    f"out must be a writable C-contiguous buffer of {nbytes} bytes for rows "
                    f"{start} to {stop} of {name}; it has {view.nbytes}"
                )
            if not nbytes:
                return np.empty(shape, READ_AS[entry.dtype])
            result = np.frombuffer(view.cast("B"), READ_AS[entry.dtype]).reshape(shape)
        self._fill(entry, entry.offset + row_bytes * start, result.reshape(-1).data)
        return result

    def digest(self, progress: Progress | None = None) -> CheckpointDigest:
        """Return SHA-256 of ``config.json`` and every weight file; hash only files that changed.

        A GGUF file holds its configuration itself.

        The digest is of the files whose config and headers were read when they were opened.

        Args:
            progress: Called with (bytes done, bytes in all), from one thread at a time.

        Raises:
            CheckpointError: A file cannot be read, or changed while it was read.
        """
        paths = self.files if self.gguf is not None else (self.path / CONFIG, *self.files)
        named = [(path.relative_to(self.folder).as_posix(), path) for path in paths]
        found = digest_files(named, progress)
        self.require_unchanged()
        return found

    def require_unchanged(self) -> None:
        """Refuse a checkpoint of which a file is not as it was when it was opened.

        Raises:
            CheckpointError: Names the file.
        """
        self.source_files.require_unchanged()

    @property
    def sidecars(self) -> dict[str, Path]:
        """The configuration's files that an artifact gets copies of, by name; none leads out."""
        return dict(self._sidecars)

    def close(self) -> None:
        """Close the weight files; a later read opens them again."""
        with self._lock:
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        with suppress(AttributeError, OSError):
            self.close()

    def _weight(self, name: str) -> TensorEntry:
        return self._entry(name, READ_AS, "weights")

    def _entry(self, name: str, dtypes: Iterable[str] | None = None, what: str = "") -> TensorEntry:
        entry = self.tensors.get(name)
        if entry is None:
            near = nearest(name, self.tensors)
            hint = "" if near is None else f"; the nearest is {near}"
            raise CheckpointError(f"{self.source} has no tensor {name}{hint}")
        if dtypes is not None and entry.dtype not in dtypes:
            raise CheckpointError(
                f"{name} in {entry.file} is {entry.dtype}; {what} are read from {', '.join(dtypes)}"
            )
        return entry

    def _descriptor(self, path: Path) -> int:
        with self._lock:
            if path not in self._descriptors:
                self._descriptors[path] = open_descriptor(path)
            return self._descriptors[path]

    def _fill(self, entry: TensorEntry, offset: int, target: memoryview) -> None:
        if not target.nbytes:
            return
        view = target.cast("B")
        done = 0
        try:
            descriptor = self._descriptor(entry.file)
            while done < len(view):
                count = os.preadv(descriptor, [view[done : done + _MAX_READ]], offset + done)
                if not count:
                    raise CheckpointError(
                        f"{entry.file} ends {len(view) - done} bytes before the end of what was "
                        f"read of {entry.name}: it was cut short after it was opened"
                    )
                done += count
        except OSError as error:
            raise CheckpointError(
                f"{entry.name} cannot be read from {entry.file}: {reason(error)}"
            ) from error


def read_config(path: Path) -> dict[str, object]:
    return parse_object(read_small_file(path, MAX_CONFIG_BYTES), str(path), strict=False)


def _place_of(tokenizer: str | Path | None) -> str:
    """Where a tokenizer that was named is found again: an absolute path, or a hub id."""
    if tokenizer is None:
        return ""
    path = Path(tokenizer).expanduser()
    return str(path.absolute()) if path.exists() else str(tokenizer)


def _read_folder(folder: Path, layout: WeightLayout, tokenizer: dict[str, Path]) -> _Contents:
    config = read_config(folder / CONFIG)
    generation = folder / GENERATION_CONFIG
    refuse_dangling(generation)
    present = {name: folder / name for name in (CONFIG, GENERATION_CONFIG)}
    return _Contents(
        config=config,
        generation_config=read_config(generation) if generation.exists() else {},
        tensors=_read_tensors(folder, layout),
        files=tuple(folder / name for name in layout.files),
        tokenizer_files=tokenizer,
        sidecars={
            name: path
            for name, path in present.items()
            if path.is_file() and leads_out(path, folder) is None
        },
    )


def _read_tensors(folder: Path, layout: WeightLayout) -> dict[str, TensorEntry]:
    if layout.is_torch:
        from edgeforge.checkpoint.torch_pickle import read_torch_file as read_file
    else:
        from edgeforge.checkpoint.safetensors_header import read_safetensors as read_file
    if layout.index is None:
        return read_file(folder / layout.files[0])
    tensors: dict[str, TensorEntry] = {}
    for file in layout.files:
        held = read_file(folder / file)
        # A tensor that the index does not place here is not part of the checkpoint.
        tensors.update((n, e) for n, e in held.items() if layout.index.get(n) == file)
    absent = [name for name in layout.index if name not in tensors]
    if absent:
        raise CheckpointError(
            f"{folder / layout.index[absent[0]]} does not hold tensor {absent[0][:200]!r} that the "
            f"index places there ({len(absent)} such tensors): download the checkpoint again"
        )
    return tensors
