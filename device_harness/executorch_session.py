"""Runs an ExecuTorch artifact on this host, in a separate process."""

from __future__ import annotations

import json
import signal
import subprocess
import tempfile
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

import numpy as np

from device_harness.child_process import python_command, python_environment
from device_harness.errors import DeviceError
from device_harness.executorch_shim import shim_folder, shim_version
from device_harness.session import (
    NO_DRAFTS,
    Calls,
    HostSession,
    Logits,
    Shown,
    Tokens,
    check_tokens,
    draft_rows,
    parts_of,
)
from exporters.adapter_entries import with_adapter
from exporters.errors import ExportError
from exporters.executorch import installed
from exporters.executorch.backends import backend_of
from exporters.manifest import MANIFEST, Manifest
from quant.processors import default_threads

MODEL, GENERATE, DRAFT, VERIFY = "model.pte", "forward", "draft", "logits_all"


class ExecutorchSession(HostSession):
    """A .pte in ExecuTorch's runtime with XNNPACK.

    Args:
        folder: the artifact.
        context: the declared context, in tokens.
        threads: the runtime's number of threads; by default one per processor, at most four.
        adapter: the name of an adapter of the artifact, whose methods run; None for the base's.

    Raises:
        DeviceError: ExecuTorch is not installed, has another version, or refuses the artifact.
    """

    def __init__(
        self,
        folder: Path,
        context: int,
        threads: int | None = None,
        *,
        adapter: str | None = None,
    ) -> None:
        _refuse_other_backends(folder)
        found = require_executorch()
        self.context = context
        self._file, self._threads = folder / MODEL, threads or default_threads()
        self.processor = "CPU"  # `_require_backend` refuses programs for other delegates
        self.runtime = f"executorch {found} (XNNPACK on CPU, {self._threads} threads)"
        self._worker: subprocess.Popen[bytes] | None = None
        self._ending: weakref.finalize[..., ExecutorchSession] | None = None
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the worker)
        self._constants: dict[str, list[int]] = {}
        self._loaded = False
        self._generate, self._draft, self._verify = (
            each if adapter is None else with_adapter(each, adapter)
            for each in (GENERATE, DRAFT, VERIFY)
        )
        self._method = self._generate
        self._names: list[str] = []
        self._peak = 0

    def _start(self) -> None:
        """Starts the runtime's process."""
        self._require_open()
        if self._worker is not None:
            return
        weights = weights_of(self._file)
        self._worker = start_worker(str(self._file), weights, self._threads, self._said)
        # When a session is garbage-collected without `close`, this ends its process.
        self._ending = weakref.finalize(self, _end, self._worker)
        answer = self._read_answer(f"loading {self._file}")
        constants = answer["constants"]
        assert isinstance(constants, dict)
        names, peak = answer["methods"], answer["peak"]
        assert isinstance(names, list) and isinstance(peak, int)
        self._constants, self._names, self._peak = constants, names, peak
        if self._generate not in names:
            raise DeviceError(f"{self._file} has no method {self._generate} for that adapter")

    def load(self) -> None:
        """Loads the method that generates; `extend` does it when needed."""
        self._start()
        if not self._loaded:
            self._ask(self._method, np.zeros(0, np.int64), 0)
            self._loaded = True

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        self.load()
        return self._constants["get_vocab_size"][0]

    @property
    def peak_bytes(self) -> int:
        """Peak resident memory so far of the process that runs the artifact."""
        if not self._closed:
            self._start()
        return self._peak

    @property
    def chunks(self) -> tuple[int, ...]:  # type: ignore[override]
        """The lengths that one run takes of a longer text: any up to a limit."""
        self.load()
        limit = self._constants["get_max_seq_len"][0]
        return tuple(range(1, limit + 1)) if limit < self.context else ()

    @property
    def has_all_positions(self) -> bool:  # type: ignore[override]
        """Whether the program has a method that gives all logits."""
        self.load()
        return self._verify in self._names

    def use_drafts(self, wanted: bool) -> None:
        """Makes `extend` run the method of `extend_draft`, or again the one without drafts.

        Each method has caches of its own, so that one alone must run the whole text.
        """
        self.reset()
        self._start()
        method = self._draft if wanted else self._generate
        if method not in self._names:
            raise DeviceError(NO_DRAFTS)
        if self._method != method:
            self._method, self._loaded = method, False

    def extend(self, tokens: Tokens) -> Logits:
        """Appends tokens and returns the last one's logits, ``float32[vocab]``."""
        last: Logits = self._extend(tokens)[-1]
        return last

    def extend_draft(self, tokens: Tokens) -> Logits:
        """Appends a token and its draft and returns the logits of each, ``float32[t, vocab]``."""
        return draft_rows(self._extend(tokens), tokens)

    def _extend(self, tokens: Tokens) -> Logits:
        """Appends tokens and returns the logits of the last run, ``float32[rows, vocab]``."""
        check_tokens(tokens, self._length + len(tokens), self.vocab_size, self.context)
        for piece in self._pieces(tokens):
            logits = self._ask(self._method, piece, self._length)
            self._length += len(piece)
        rows: Logits = logits[0]
        return rows

    def logits(self, tokens: Tokens) -> Logits:
        """Logits of every position of a fresh text: ``int64[t] -> float32[t, vocab]``.

        A stripped artifact gives them token by token, as an app would get them.
        """
        check_tokens(tokens, len(tokens), self.vocab_size, self.context)
        if self._verify not in self._names:
            # The artifact was exported with --strip. The generating method then runs in separate
            # caches, so that the text of `extend` stays as it is.
            pieces = [tokens[at : at + 1] for at in range(len(tokens))]
            return np.concatenate(
                [
                    self._ask(self._generate, piece, at, apart=True)[0]
                    for at, piece in enumerate(pieces)
                ]
            )
        position, rows = 0, []
        for piece in self._pieces(tokens):
            rows.append(self._ask(self._verify, piece, position)[0])
            position += len(piece)
        return np.concatenate(rows)

    def values(
        self, texts: Sequence[Tokens], names: Sequence[str], calls: Calls | None = None
    ) -> list[Shown]:
        """Returns values of a method while it runs fresh texts.

        A copy of the program returns them, so the disk must hold the program once more.
        """
        from exporters.executorch.probing import write_probing

        for tokens in texts:
            check_tokens(tokens, len(tokens), self.vocab_size, self.context)
        if self._file.with_suffix(".ptd").is_file():
            raise DeviceError("values inside a program with its weights in a .ptd are not shown")
        whole = self._verify in self._names and calls is None
        method = self._verify if whole else self._generate
        with tempfile.TemporaryDirectory(prefix="edgeforge-") as folder:
            copy = Path(folder) / MODEL
            try:
                shown = write_probing(self._file, self.context, method, names, copy)
            except OSError as error:
                raise DeviceError(f"the copy that shows values is not written: {error}") from error
            if not shown:
                return [{} for _ in texts]
            with ExecutorchSession(Path(folder), self.context, self._threads) as probing:
                each = [[len(tokens)] for tokens in texts] if calls is None else calls
                return [
                    probing._results(method, tokens, sizes, shown)
                    for tokens, sizes in zip(texts, each, strict=True)
                ]

    def _results(
        self, method: str, tokens: Tokens, sizes: Sequence[int], names: Sequence[str]
    ) -> Shown:
        """All results of a method over a fresh text in such calls, as ``names`` in turn."""
        self._start()
        found: Shown = {name: [] for name in names}
        for start, part in parts_of(tokens, sizes):
            position = start
            for piece in self._pieces(part):
                for name, array in zip(names, self._ask_all(method, piece, position), strict=True):
                    found[name].append(array)
                position += len(piece)
        return found

    def close(self) -> None:
        """Ends the runtime's process."""
        super().close()
        self._stop()
        self._said.close()

    def _stop(self) -> None:
        """Ends the runtime's process; `_start` starts another."""
        if self._ending is not None:
            self._ending()
        self._worker, self._ending, self._loaded = None, None, False

    def _pieces(self, tokens: Tokens) -> list[Tokens]:
        limit = self._constants["get_max_seq_len"][0]
        return [tokens[start : start + limit] for start in range(0, len(tokens), limit)]

    def _ask(self, method: str, tokens: Tokens, position: int, *, apart: bool = False) -> Logits:
        """Runs a method and returns its first result, which is its only one."""
        return self._ask_all(method, tokens, position, apart=apart)[0]

    def _ask_all(
        self, method: str, tokens: Tokens, position: int, *, apart: bool = False
    ) -> list[Logits]:
        """Runs a method; with ``apart``, in other caches than those of the text of `extend`."""
        assert self._worker is not None and self._worker.stdin is not None
        what = f"{method} with {len(tokens)} tokens at position {position}"
        if not len(tokens):
            what = f"loading {method}"
        request = {
            "method": method,
            "apart": apart,
            "tokens": len(tokens),
            "position": position,
        }
        try:
            self._worker.stdin.write(json.dumps(request).encode() + b"\n")
            self._worker.stdin.write(np.ascontiguousarray(tokens, np.int64).data)
            self._worker.stdin.flush()
        except BrokenPipeError:
            pass  # the process has ended; reading its answer reports how
        answer = self._read_answer(what)
        shapes, peak = answer.get("shapes", [answer["shape"]]), answer["peak"]
        assert isinstance(shapes, list) and isinstance(peak, int) and self._worker.stdout
        self._peak = max(self._peak, peak)
        found = []
        for shape in shapes:
            count = int(np.prod(shape))
            data = self._worker.stdout.read(4 * count)
            if len(data) != 4 * count:
                self._fail(what)
            found.append(np.frombuffer(data, np.float32).reshape(shape))
        return found

    def _read_answer(self, what: str) -> dict[str, object]:
        assert self._worker is not None and self._worker.stdout is not None
        line = self._worker.stdout.readline()
        if not line:
            self._fail(what)
        answer: dict[str, object] = json.loads(line)
        if "error" in answer:
            raise DeviceError(f"ExecuTorch failed in {what}: {answer['error']}{self._last_words()}")
        return answer

    def _fail(self, what: str) -> None:
        """Reports how the runtime's process ended.

        Raises:
            DeviceError: always.
        """
        assert self._worker is not None
        code = self._worker.wait()
        self._stop()
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        raise DeviceError(f"ExecuTorch ended its process ({how}) in {what}{self._last_words()}")

    def _last_words(self) -> str:
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        kept = [line for line in lines if "cpuinfo" not in line]
        return f": {kept[-1].strip()[:300]}" if kept else ""


def start_worker(file: str, weights: str, threads: int, said: IO[bytes]) -> subprocess.Popen[bytes]:
    """Starts a process that serves a program, as `device_harness.executorch_worker` describes.

    Args:
        file: the .pte.
        weights: the .ptd; empty for none.
        threads: for the runtime.
        said: takes what the runtime prints.
    """
    return subprocess.Popen(
        python_command("device_harness.executorch_worker", file, weights, str(threads)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=said,
        env=python_environment(),
    )


def weights_of(file: Path) -> str:
    """The .ptd of a program; empty for none.

    Raises:
        DeviceError: the program or its .ptd is damaged.
    """
    if shim_folder() is not None:  # what reads a program's head is not on every device
        weights = file.with_suffix(".ptd")
        return str(weights) if weights.is_file() else ""
    from exporters.executorch.reader import read_weights

    try:
        external = read_weights(file)
    except ExportError as error:
        raise DeviceError(str(error)) from error
    return str(external.file) if external else ""


def _end(worker: subprocess.Popen[bytes]) -> None:
    """Ends a process and waits until it is gone."""
    assert worker.stdin is not None and worker.stdout is not None
    with suppress(BrokenPipeError):  # closing flushes a request that an ended process never read
        worker.stdin.close()
    worker.stdout.close()
    worker.kill()
    worker.wait()


def _refuse_other_backends(folder: Path) -> None:
    """Refuses an artifact whose delegate this host's runtime does not have.

    Raises:
        DeviceError: names the runtime that the artifact needs.
    """
    if not (folder / MANIFEST).is_file():
        return
    backend = backend_of(Manifest.read(folder).options)
    if backend.needs is not None:
        raise DeviceError(
            f"{folder} is for ExecuTorch's {backend.title} delegate, which the runtime on this "
            f"host does not have: run it in {backend.needs}"
        )


def require_executorch() -> str:
    """Returns the installed version of ExecuTorch.

    Raises:
        DeviceError: ExecuTorch is not installed, or is a version that EdgeForge is not tested
            with.
    """
    folder = shim_folder()
    if folder is not None:
        try:
            return shim_version(folder)
        except OSError as error:
            raise DeviceError(
                f"ExecuTorch's runtime in {folder} cannot be read: {error}"
            ) from error
    try:
        return installed.require_executorch("this artifact runs in it")
    except ExportError as error:
        raise DeviceError(str(error)) from None
