"""Runs an ONNX artifact in onnxruntime on this host."""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from device_harness.errors import DeviceError
from device_harness.memory import meminfo
from device_harness.onnx_adapter import read_adapter
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
from quant.processors import default_threads

if TYPE_CHECKING:
    import onnxruntime

    States = dict[str, tuple[str, onnxruntime.OrtValue]]
    """By input: the output that replaces it, and the memory that holds both. A graph reads recent
    tokens (`quant.program.states`) in one operation, before it computes those that replace them,
    and a memory in the one that replaces it, which copies it first."""

GENERATE, DRAFT, VERIFY = "model.onnx", "draft.onnx", "verify.onnx"
WEIGHTS = "model.onnx.data"
LOADED = 1.6
"""Bytes that a loaded graph takes for each byte of weights: 1.4 were measured at 4.8 GB of int4."""
ADAPTER = ".onnx_adapter"  # how the name of an adapter's file ends
# How the names of states begin: of caches, recent tokens and memories.
_STATES = ("past_key_values.", "past.")


class OnnxSession(HostSession):
    """An ONNX artifact in onnxruntime's CPU provider, which updates the states in place.

    What they hold is never reset: attention reads no cache row after its position, and a graph
    ignores recent tokens and memories where a text begins.

    Each graph that is loaded holds all weights. Where the memory has no room for one more, those
    that are loaded are released, and loaded again when they are needed: a text goes on as it was.

    Args:
        folder: the artifact.
        context: the declared context, in tokens.
        threads: onnxruntime's number of threads; by default one per processor, at most four.
        adapter: the name of an adapter of the artifact, which is switched on; None for none.
        kleidiai: ``off`` forbids onnxruntime Arm's KleidiAI kernels, which it uses on arm64 by
            default; ``on`` and None leave it its default. No other processor has them.

    Raises:
        DeviceError: onnxruntime is not installed or refuses the artifact.
    """

    def __init__(
        self,
        folder: Path,
        context: int,
        threads: int | None = None,
        *,
        kleidiai: str | None = None,
        adapter: str | None = None,
    ) -> None:
        version = require_onnxruntime()
        if kleidiai not in (None, "on", "off"):
            raise DeviceError(f"KleidiAI is on or off, not {kleidiai!r}")
        self._has_kleidiai = kleidiai != "off"
        self._adapter = None if adapter is None else folder / f"{adapter}{ADAPTER}"
        self._given: dict[str, npt.NDArray[np.float32]] = {}  # the adapter's inputs
        self._folder, self._threads = folder, threads or default_threads()
        self.context = context
        without = "" if self._has_kleidiai else ", without KleidiAI"
        self.runtime = f"onnxruntime {version} (CPU, {self._threads} threads{without})"
        self.has_all_positions = (folder / VERIFY).is_file()
        weights = folder / WEIGHTS
        self._weight_bytes = weights.stat().st_size if weights.is_file() else 0
        self._width: int | None = None
        self._graph = GENERATE
        self._generator: onnxruntime.InferenceSession | None = None
        self._verifier: onnxruntime.InferenceSession | None = None
        self._states: States = {}
        self._apart: States = {}  # for `logits`, where the generating graph computes them
        self._buffers: list[npt.NDArray[Any]] = []  # the states' memory, kept alive

    def _options(self) -> onnxruntime.SessionOptions:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # errors are raised; they need not be printed too
        if not self._has_kleidiai:
            options.add_session_config_entry("mlas.disable_kleidiai", "1")
        return options

    def _open_bytes(self, graph: bytes) -> onnxruntime.InferenceSession:
        """Opens a graph in memory whose weights are in the artifact's weight file."""
        import onnxruntime

        self._make_room()
        options, place = self._options(), "session.model_external_initializers_file_folder_path"
        options.add_session_config_entry(place, str(self._folder))
        return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    def _open(self, name: str) -> onnxruntime.InferenceSession:
        import onnxruntime

        self._make_room()
        options = self._options()
        path = self._folder / name
        try:
            return onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's errors share no base class
            raise DeviceError(f"onnxruntime cannot load {path}: {_first_line(error)}") from error

    def load(self) -> None:
        """Loads the graph that generates and makes its states; `extend` does it when needed."""
        self._require_open()
        if self._generator is None:
            self._generator = self._open(self._graph)
            self._width = _vocab_size(self._generator)
            used = self._generator.get_providers()
            self.processor = ", ".join(name.removesuffix("ExecutionProvider") for name in used)
            self._states = self._states or self._make_states(self._generator)
            if self._adapter is not None and not self._given:
                self._given = read_adapter(self._adapter, self._generator)

    def _make_room(self) -> None:
        """Releases the graphs that are loaded, where another does not fit beside them."""
        available = meminfo("MemAvailable")
        if available is not None and available < self._weight_bytes * LOADED:
            self._generator = self._verifier = None

    def _make_states(self, generator: onnxruntime.InferenceSession) -> States:
        import onnxruntime

        states: States = {}
        for value in generator.get_inputs():
            if not value.name.startswith(_STATES):
                continue
            zeros = untouched_zeros(_state_shape(value, self.context), _cache_dtype(value))
            present = f"present.{value.name.partition('.')[2]}"
            states[value.name] = present, onnxruntime.OrtValue.ortvalue_from_numpy(zeros)
            self._buffers.append(zeros)
        return states

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        self._require_open()
        if self._width is None:
            self.load()
        assert self._width is not None
        return self._width

    def use_drafts(self, wanted: bool) -> None:
        """Makes `extend` run the graph of `extend_draft`, or again the one without drafts."""
        self.reset()
        graph = DRAFT if wanted else GENERATE
        if not (self._folder / graph).is_file():
            raise DeviceError(NO_DRAFTS)
        if self._graph != graph:
            self._graph, self._generator, self._states = graph, None, {}

    def extend(self, tokens: Tokens) -> Logits:
        """Appends tokens and returns the last one's logits, ``float32[vocab]``."""
        last: Logits = self._extend(tokens)[-1]
        return last

    def extend_draft(self, tokens: Tokens) -> Logits:
        """Appends a token and its draft and returns the logits of each, ``float32[t, vocab]``."""
        return draft_rows(self._extend(tokens), tokens)

    def _extend(self, tokens: Tokens) -> Logits:
        """Appends tokens and returns the logits that the graph gives, ``float32[rows, vocab]``."""
        self.load()
        assert self._generator is not None
        total = self._length + len(tokens)
        check_tokens(tokens, total, _vocab_size(self._generator), self.context)
        result = self._run(self._generator, tokens, total, self._states)
        self._length = total
        return result

    def _run(
        self, generator: onnxruntime.InferenceSession, tokens: Tokens, total: int, states: States
    ) -> Logits:
        """Runs the last tokens of a text of ``total`` tokens; the states hold those before.

        Returns:
            The logits that the graph gives, ``float32[rows, vocab]``.
        """
        result: Logits = self._run_all(generator, tokens, total, states)[0][0]
        return result

    def _run_all(
        self,
        generator: onnxruntime.InferenceSession,
        tokens: Tokens,
        total: int,
        states: States,
        shown: Sequence[str] = (),
    ) -> list[npt.NDArray[Any]]:
        """As `_run`; returns the logits of all texts, and then the ``shown`` outputs."""
        import onnxruntime

        binding = generator.io_binding()
        binding.bind_cpu_input("input_ids", tokens.reshape(1, -1))
        binding.bind_cpu_input("attention_mask", np.ones((1, total), np.int64))
        for name in ("logits", *shown):
            binding.bind_output(name)
        for name, values in self._given.items():  # `bind_cpu_input` knows no inputs with defaults
            binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(values))
        for past, (present, state) in states.items():
            binding.bind_ortvalue_input(past, state)
            binding.bind_ortvalue_output(present, state)
        self._call(lambda: generator.run_with_iobinding(binding))
        return [each.numpy().copy() for each in binding.get_outputs()[: 1 + len(shown)]]

    def logits(self, tokens: Tokens) -> Logits:
        """Logits of every position of a fresh text: ``int64[t] -> float32[t, vocab]``.

        A stripped artifact gives them token by token, as an app would get them.
        """
        self._require_open()
        if not self.has_all_positions:
            return self._token_by_token(tokens)
        if self._verifier is None:
            self._verifier = self._open(VERIFY)
            if self._adapter is not None and not self._given:
                self._given = read_adapter(self._adapter, self._verifier)
        check_tokens(tokens, len(tokens), _vocab_size(self._verifier), self.context)
        verifier, feeds = self._verifier, _fresh_text(self._verifier, tokens) | self._given
        result = self._call(lambda: verifier.run(["logits"], feeds))
        logits: Logits = result[0][0]
        return logits

    def first_not_finite(self, tokens: Tokens) -> str | None:
        """Names the node that gives the first NaN or infinite value of a fresh text."""
        from device_harness.onnx_finite import first_not_finite

        graph, feeds = self._whole(tokens)
        found: str | None = self._call(lambda: first_not_finite(graph, feeds, self._open_bytes))
        return found

    def values(
        self, texts: Sequence[Tokens], names: Sequence[str], calls: Calls | None = None
    ) -> list[Shown]:
        """Returns values inside the graph while it runs fresh texts."""
        from device_harness.onnx_values import shown_values

        if calls is not None:
            each = list(zip(texts, calls, strict=True))
            called: list[Shown] = self._call(lambda: self._shown(each, names))
            return called
        whole = [self._whole(tokens) for tokens in texts]
        feeds = [given for _, given in whole]
        found: list[Shown] = self._call(
            lambda: shown_values(whole[0][0], feeds, names, self._open_bytes)
        )
        return found

    def _shown(
        self, texts: Sequence[tuple[Tokens, Sequence[int]]], names: Sequence[str]
    ) -> list[Shown]:
        """Values inside the graph of `extend` while it runs fresh texts in calls of such sizes."""
        from device_harness.onnx_values import showing

        graph, shown = showing(self._folder / GENERATE, names, alone=False)
        session = self._open_bytes(graph)
        self._apart = self._apart or self._make_states(session)
        texts_shown = []
        for tokens, sizes in texts:
            check_tokens(tokens, len(tokens), _vocab_size(session), self.context)
            found: Shown = {name: [] for name in shown}
            for start, part in parts_of(tokens, sizes):
                total = start + len(part)
                results = self._run_all(session, part, total, self._apart, shown)
                for name, result in zip(shown, results[1:], strict=True):
                    found[name].append(np.asarray(result, np.float32))
            texts_shown.append(found)
        return texts_shown

    def _whole(self, tokens: Tokens) -> tuple[Path, dict[str, Any]]:
        """The graph that gives most of a fresh text, and its inputs."""
        self.load()
        assert self._generator is not None
        check_tokens(tokens, len(tokens), _vocab_size(self._generator), self.context)
        whole = self._folder / VERIFY
        graph = whole if whole.is_file() else self._folder / GENERATE
        return graph, _fresh_text(self._generator, tokens) | self._given

    def close(self) -> None:
        """Releases the graphs and the states."""
        super().close()
        self._generator = self._verifier = None
        self._states, self._apart, self._buffers = {}, {}, []

    def _token_by_token(self, tokens: Tokens) -> Logits:
        self.load()
        assert self._generator is not None
        check_tokens(tokens, len(tokens), _vocab_size(self._generator), self.context)
        self._apart = self._apart or self._make_states(self._generator)
        rows = [
            self._run(self._generator, tokens[at : at + 1], at + 1, self._apart)
            for at in range(len(tokens))
        ]
        return np.concatenate(rows)

    def _call(self, work: Any) -> Any:
        try:
            return work()
        except Exception as error:  # onnxruntime's errors share no base class
            raise DeviceError(f"onnxruntime failed: {_first_line(error)}") from error


def require_onnxruntime() -> str:
    """The installed version of onnxruntime.

    Raises:
        DeviceError: it is not installed, or Python cannot load it.
    """
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        if error.name != "onnxruntime":
            raise DeviceError(f"onnxruntime is damaged: {_first_line(error)}") from error
        raise DeviceError(
            "onnxruntime is not installed, and this artifact runs in it: pip install "
            '"edgeforge[onnx]"'
        ) from None
    except ImportError as error:
        raise DeviceError(f"onnxruntime cannot be loaded: {_first_line(error)}") from error
    return str(onnxruntime.__version__)


def untouched_zeros(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Zeros ``dtype[shape]`` that take memory only where they are written, in small pages.

    A cache holds one contiguous range of positions for each head. NumPy asks the system for huge
    pages, and the first token would touch at least one huge page for every head; with a long
    context, that is the whole cache.
    """
    # The pages are private because shared pages would take memory when they are only read, too.
    private = {} if sys.platform == "win32" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
    pages = mmap.mmap(-1, np.dtype(dtype).itemsize * math.prod(shape), **private)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with suppress(OSError):  # a kernel without huge pages
            pages.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(pages, dtype).reshape(shape)


def _cache_dtype(cache: onnxruntime.NodeArg) -> npt.DTypeLike:
    """The dtype of an artifact's caches: int8 with ``--kv-cache int8``, otherwise float32."""
    return np.int8 if cache.type == "tensor(int8)" else np.float32


def _fresh_text(graph: onnxruntime.InferenceSession, tokens: Tokens) -> dict[str, Any]:
    """A graph's inputs for a text that begins."""
    feeds: dict[str, Any] = {
        "input_ids": tokens.reshape(1, -1),
        "attention_mask": np.ones((1, len(tokens)), np.int64),
    }
    for value in graph.get_inputs():
        if value.name.startswith(_STATES):
            feeds[value.name] = np.zeros(_state_shape(value, 0), _cache_dtype(value))
    return feeds


def _state_shape(state: onnxruntime.NodeArg, length: int) -> tuple[int, ...]:
    """The shape of a cache of some length, or of another state, whose shape is always the same."""
    return (1, *(size if isinstance(size, int) else length for size in state.shape[1:]))


def _vocab_size(session: onnxruntime.InferenceSession) -> int:
    return int(session.get_outputs()[0].shape[2])


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
