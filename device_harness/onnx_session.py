"""Runs an ONNX artifact in onnxruntime on this host."""

from __future__ import annotations

import math
import mmap
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from device_harness.errors import DeviceError
from device_harness.memory import resident_peak
from device_harness.session import HostSession, Logits, Tokens, check_tokens
from quant.processors import default_threads

if TYPE_CHECKING:
    import onnxruntime

    Caches = dict[str, tuple[str, onnxruntime.OrtValue]]
    """By input: the output that takes its place, and what holds both."""

GENERATE, VERIFY = "model.onnx", "verify.onnx"


class OnnxSession(HostSession):
    """An ONNX artifact in onnxruntime's CPU provider, its caches bound in place.

    Args:
        folder: the artifact.
        context: the declared context, tokens.
        threads: for onnxruntime; by default one per processor, four at most.

    Raises:
        DeviceError: onnxruntime refuses the artifact.
    """

    def __init__(self, folder: Path, context: int, threads: int | None = None) -> None:
        import onnxruntime

        self._folder, self._threads = folder, threads or default_threads()
        self.context = context
        self.runtime = f"onnxruntime {onnxruntime.__version__} (CPU, {self._threads} threads)"
        self._generator: onnxruntime.InferenceSession | None = None
        self._verifier: onnxruntime.InferenceSession | None = None
        self._caches: Caches = {}
        self._apart: Caches = {}  # of `logits`, where the generating graph gives them
        self._buffers: list[npt.NDArray[Any]] = []  # the caches' memory, kept alive
        self._length = 0

    def _open(self, name: str) -> onnxruntime.InferenceSession:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # errors are raised; they need not be printed too
        path = self._folder / name
        try:
            return onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's errors share no base class
            raise DeviceError(f"onnxruntime cannot load {path}: {_first_line(error)}") from error

    def load(self) -> None:
        """Loads the graph that generates and makes its caches; `extend` does it when needed."""
        self._require_open()
        if self._generator is None:
            self._generator = self._open(GENERATE)
            self._caches = self._make_caches(self._generator)

    def _make_caches(self, generator: onnxruntime.InferenceSession) -> Caches:
        import onnxruntime

        caches: Caches = {}
        for value in generator.get_inputs():
            if not value.name.startswith("past_key_values."):
                continue
            shape = (1, value.shape[1], self.context, value.shape[3])
            zeros = untouched_zeros(shape, _cache_dtype(value))
            present = value.name.replace("past_key_values", "present")
            caches[value.name] = present, onnxruntime.OrtValue.ortvalue_from_numpy(zeros)
            self._buffers.append(zeros)
        return caches

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        self.load()
        assert self._generator is not None
        return _vocab_size(self._generator)

    @property
    def peak_bytes(self) -> int:
        """Peak resident memory so far of this process, which runs the artifact."""
        return resident_peak()

    def reset(self) -> None:
        """Forgets all positions."""
        self._require_open()
        self._length = 0

    def extend(self, tokens: Tokens) -> Logits:
        """Appends tokens and returns the last one's logits, ``float32[vocab]``."""
        self.load()
        assert self._generator is not None
        total = self._length + len(tokens)
        check_tokens(tokens, total, _vocab_size(self._generator), self.context)
        result = self._run(self._generator, tokens, total, self._caches)
        self._length = total
        return result

    def _run(
        self, generator: onnxruntime.InferenceSession, tokens: Tokens, total: int, caches: Caches
    ) -> Logits:
        """Runs tokens that end a text of ``total`` ones, of which caches hold the others."""
        binding = generator.io_binding()
        binding.bind_cpu_input("input_ids", tokens.reshape(1, -1))
        binding.bind_cpu_input("attention_mask", np.ones((1, total), np.int64))
        binding.bind_output("logits")
        for past, (present, cache) in caches.items():
            binding.bind_ortvalue_input(past, cache)
            binding.bind_ortvalue_output(present, cache)
        self._call(lambda: generator.run_with_iobinding(binding))
        result: Logits = binding.get_outputs()[0].numpy().reshape(-1).copy()
        return result

    def logits(self, tokens: Tokens) -> Logits:
        """Logits of every position of a fresh text: ``int64[t] -> float32[t, vocab]``.

        A stripped artifact gives them token by token, as an app would get them.
        """
        self._require_open()
        if not (self._folder / VERIFY).is_file():
            return self._token_by_token(tokens)
        if self._verifier is None:
            self._verifier = self._open(VERIFY)
        check_tokens(tokens, len(tokens), _vocab_size(self._verifier), self.context)
        feeds: dict[str, Any] = {
            "input_ids": tokens.reshape(1, -1),
            "attention_mask": np.ones((1, len(tokens)), np.int64),
        }
        for value in self._verifier.get_inputs():
            if value.name.startswith("past_key_values."):
                shape = (1, value.shape[1], 0, value.shape[3])
                feeds[value.name] = np.zeros(shape, _cache_dtype(value))
        verifier = self._verifier
        result = self._call(lambda: verifier.run(["logits"], feeds))
        logits: Logits = result[0][0]
        return logits

    def close(self) -> None:
        """Lets go of the graphs and the caches."""
        super().close()
        self._generator = self._verifier = None
        self._caches, self._apart, self._buffers = {}, {}, []

    def _token_by_token(self, tokens: Tokens) -> Logits:
        self.load()
        assert self._generator is not None
        check_tokens(tokens, len(tokens), _vocab_size(self._generator), self.context)
        self._apart = self._apart or self._make_caches(self._generator)
        rows = [
            self._run(self._generator, tokens[at : at + 1], at + 1, self._apart)
            for at in range(len(tokens))
        ]
        return np.stack(rows)

    def _call(self, work: Any) -> Any:
        try:
            return work()
        except Exception as error:  # onnxruntime's errors share no base class
            raise DeviceError(f"onnxruntime failed: {_first_line(error)}") from error


def untouched_zeros(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Zeros ``dtype[shape]`` that cost memory only where they are written, page by small page.

    A cache holds one stretch of positions for each head. NumPy asks for huge pages, of which the
    first token of every head would touch one: all of them, where a context is long.
    """
    # Private pages: shared ones would be counted when they are only read, too.
    private = {} if sys.platform == "win32" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
    pages = mmap.mmap(-1, np.dtype(dtype).itemsize * math.prod(shape), **private)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with suppress(OSError):  # a kernel without huge pages
            pages.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(pages, dtype).reshape(shape)


def _cache_dtype(cache: onnxruntime.NodeArg) -> npt.DTypeLike:
    """What an artifact keeps keys and values in: int8 with ``--kv-cache int8``, else float32."""
    return np.int8 if cache.type == "tensor(int8)" else np.float32


def _vocab_size(session: onnxruntime.InferenceSession) -> int:
    return int(session.get_outputs()[0].shape[2])


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
