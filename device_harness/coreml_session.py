"""Runs a Core ML artifact, in Apple's runtime on a Mac and in EdgeForge's interpreter elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from device_harness.errors import DeviceError
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
from exporters.coreml import names
from exporters.coreml.package import Interface, Package, open_package

if TYPE_CHECKING:
    from device_harness.coreml_interpreter.steps import Watch

COMPUTE_UNITS: Final = ("all", "cpu", "cpu-and-gpu", "cpu-and-ne")
UNKNOWN_TO_INTERPRETER: Final[tuple[str, ...]] = (
    "whether Core ML's own compiler accepts the package",
    "how wide Core ML accumulates on each processor: the interpreter accumulates in float32, and "
    "rounds the result of an operation to float16 where the package's types say so",
    "the arithmetic of the Neural Engine, and how Core ML fuses operations",
    "which processor runs which operation",
    "speed and memory on a device: times and memory here are the interpreter's on this machine",
)
UNROUNDED: Final = (
    "what float16 costs: nothing was rounded to it, to check how the package is wired"
)

_Arrays = Mapping[str, npt.NDArray[Any]]


class Runner(Protocol):
    """Calls the functions of a package.

    Attributes:
        runtime: the runtime's name and version, for reports.
        limits: what running the package here cannot tell about a device, one sentence each.
    """

    runtime: str
    limits: tuple[str, ...]

    def load(self, function: str) -> None:
        """Makes a function ready to be called."""

    def make_states(self, function: str) -> Any:
        """Makes fresh states, which all functions of the package can share."""

    def call(
        self, function: str, inputs: _Arrays, states: Any, watch: Watch | None = None
    ) -> dict[str, npt.NDArray[Any]]:
        """Calls a function and returns its outputs by name; it changes the states in place.

        Where the runtime shows the values between operations, ``watch`` looks at each.
        """


class CoremlSession(HostSession):
    """A Core ML artifact, whose functions are called in turn over the same caches.

    Args:
        folder: the artifact.
        context: the declared context, in tokens.
        threads: the interpreter's number of threads; by default PyTorch's own number.
        precision: the interpreter's precision, ``fp16`` (the default) or ``fp32``; when it is
            given, the interpreter runs even on a Mac.
        compute_units: the compute units of Apple's runtime, one of `COMPUTE_UNITS`.
        adapter: the name of an adapter of the artifact, whose functions run; None for the base's.

    Raises:
        DeviceError: an option has an unknown value or does not apply here.
        ExportError: the package cannot be read.
    """

    def __init__(
        self,
        folder: Path,
        context: int,
        threads: int | None = None,
        *,
        precision: str | None = None,
        compute_units: str | None = None,
        adapter: str | None = None,
    ) -> None:
        self.context = context
        self._package = open_package(folder / names.PACKAGE)
        runner = _choose_runner(self._package, threads, precision, compute_units)
        self._held: Runner | None = runner
        self.runtime, self.limits = runner.runtime, runner.limits
        functions = self._package.functions
        decode, prefill, draft, verify = (
            each if adapter is None else with_adapter(each, adapter) for each in names.FUNCTIONS
        )
        if adapter is not None and decode not in functions:
            raise DeviceError(f"{self._package.path} has no function {decode} for that adapter")
        self._decode = decode if decode in functions else self._package.default_function
        self._prefill = prefill if prefill in functions else self._decode
        self._draft = draft if draft in functions else None
        self._verify = verify if verify in functions else None
        self._interfaces = {name: self._package.interface(name) for name in functions}
        self._chunks = {name: _chunks(each) for name, each in self._interfaces.items()}
        self.chunks = tuple(sorted(n for n in self._chunks[self._prefill] if n > 1))
        self.has_all_positions = self._verify is not None
        self._caches: _Caches | None = self._new_caches()

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        self._runner.load(self._decode)
        for feature in self._interfaces[self._decode].outputs:
            if feature.name == names.LOGITS and feature.shape:
                return feature.shape[-1]
        raise DeviceError(f"{self._package.path} has no output {names.LOGITS!r} of fixed width")

    def extend(self, tokens: Tokens) -> Logits:
        """Appends tokens and returns the last one's logits, ``float32[vocab]``."""
        check_tokens(tokens, self._length + len(tokens), self.vocab_size, self.context)
        assert self._caches is not None
        logits = self._run(tokens, self._length, self._caches, self._prefill)[-1]
        self._length += len(tokens)
        last: Logits = logits[-1]
        return last

    def use_drafts(self, wanted: bool) -> None:
        """Makes sure that there is a function for drafts; the others run beside it."""
        self.reset()
        if wanted and self._draft is None:
            raise DeviceError(NO_DRAFTS)

    def extend_draft(self, tokens: Tokens) -> Logits:
        """Appends a token and its draft and returns the logits of each, ``float32[t, vocab]``.

        The function takes a fixed number of tokens. A shorter draft is filled up; what is behind it
        in the caches is overwritten before any token reads it. Where there is no room for that at
        the context's end, and for a token without a draft, tokens run one by one.
        """
        check_tokens(tokens, self._length + len(tokens), self.vocab_size, self.context)
        assert self._caches is not None
        (size,) = self._chunks.get(self._draft or "", ()) or (0,)
        if len(tokens) > size:
            return draft_rows(np.zeros((size, 0), np.float32), tokens)
        if len(tokens) == 1 or self._length + size > self.context:
            logits = np.concatenate(self._run(tokens, self._length, self._caches, None))
        else:
            filled = np.concatenate((tokens, np.full(size - len(tokens), tokens[-1], np.int64)))
            assert self._draft is not None
            logits = self._call(self._draft, filled, self._length, self._caches)[: len(tokens)]
        self._length += len(tokens)
        return logits

    def logits(self, tokens: Tokens) -> Logits:
        """Logits of every position of a fresh text: ``int64[t] -> float32[t, vocab]``."""
        check_tokens(tokens, len(tokens), self.vocab_size, self.context)
        return np.concatenate(self._run(tokens, 0, self._new_caches(), self._verify))

    def first_not_finite(self, tokens: Tokens) -> str | None:
        """Names the operation that gives the first NaN or infinite value of a fresh text.

        The interpreter sees every value; Apple's runtime shows none.
        """
        from device_harness.coreml_interpreter.finite import FiniteWatch

        check_tokens(tokens, len(tokens), self.vocab_size, self.context)
        watch = FiniteWatch()
        self._run(tokens, 0, self._new_caches(), self._verify, watch)
        return watch.origin(self._package)

    def values(
        self, texts: Sequence[Tokens], names: Sequence[str], calls: Calls | None = None
    ) -> list[Shown]:
        """Returns results of operations while fresh texts run; Apple's runtime shows none."""
        from device_harness.coreml_interpreter.value_watch import ValueWatch

        if not self.limits:
            raise DeviceError("Apple's runtime shows no values between its operations")
        found = []
        for index, tokens in enumerate(texts):
            check_tokens(tokens, len(tokens), self.vocab_size, self.context)
            watch, caches = ValueWatch(names), self._new_caches()
            if calls is None:
                self._run(tokens, 0, caches, self._verify, watch)
            else:
                for start, part in parts_of(tokens, calls[index]):
                    self._run(part, start, caches, self._prefill, watch)
            found.append({name: arrays for name, arrays in watch.found.items() if arrays})
        return found

    def close(self) -> None:
        """Releases the package's functions and the caches."""
        super().close()
        self._held = self._caches = None

    @property
    def _runner(self) -> Runner:
        self._require_open()
        assert self._held is not None
        return self._held

    def _run(
        self,
        tokens: Tokens,
        position: int,
        caches: _Caches,
        chunked: str | None,
        watch: Watch | None = None,
    ) -> list[Logits]:
        """Runs whole chunks through one function and the remaining tokens one by one.

        Returns:
            The logits of each call: ``float32[1 or t, vocab]``.
        """
        found, done = [], 0
        while done < len(tokens):
            fitting = [
                size for size in self._chunks.get(chunked or "", ()) if size <= len(tokens) - done
            ]
            function, size = (chunked, max(fitting)) if chunked and fitting else (self._decode, 1)
            part = tokens[done : done + size]
            found.append(self._call(function, part, position + done, caches, watch))
            done += size
        return found

    def _call(
        self,
        function: str,
        tokens: Tokens,
        position: int,
        caches: _Caches,
        watch: Watch | None = None,
    ) -> Logits:
        inputs: dict[str, npt.NDArray[Any]] = {
            names.TOKENS: tokens.astype(np.int32).reshape(1, -1),
            names.POSITION: np.array([position], np.int32),
            **caches.inputs,
        }
        outputs = self._runner.call(function, inputs, caches.states, watch)
        for name in caches.inputs:
            caches.inputs[name] = outputs[name + names.UPDATED]
        if names.LOGITS not in outputs:
            raise DeviceError(f"function {function} of {self._package.path} gives no logits")
        logits: Logits = outputs[names.LOGITS][0].astype(np.float32)
        return logits

    def _new_caches(self) -> _Caches:
        return _Caches(self._runner.make_states(self._decode), self._interfaces[self._decode])


class _Caches:
    """The caches of one text: states, or inputs that come back as outputs (iOS 17)."""

    def __init__(self, states: Any, interface: Interface) -> None:
        self.states = states
        self.inputs: dict[str, npt.NDArray[Any]] = {
            feature.name: np.zeros(feature.shape, np.float16)
            for feature in interface.inputs
            if feature.name not in (names.TOKENS, names.POSITION)
        }


class InterpretedRunner:
    """Calls functions in EdgeForge's interpreter.

    Args:
        package: the package.
        threads: PyTorch's number of threads; None leaves it unchanged.
        precision: ``fp16`` or ``fp32``.
    """

    limits: tuple[str, ...] = UNKNOWN_TO_INTERPRETER

    def __init__(self, package: Package, threads: int | None, precision: str) -> None:
        import torch

        from device_harness.coreml_interpreter.interpreter import Interpreter
        from device_harness.coreml_interpreter.values import Precision

        known = [each.value for each in Precision]
        if precision not in known:
            raise DeviceError(f"there is no precision {precision}; there is {' and '.join(known)}")
        if threads is not None:
            torch.set_num_threads(threads)
        self._interpreter = Interpreter(package, Precision(precision))
        if precision == "fp32":
            self.limits = (UNROUNDED, *UNKNOWN_TO_INTERPRETER)
        rounding = "fp16 rounding" if precision == "fp16" else "fp32, nothing rounded to fp16"
        self.runtime = (
            f"EdgeForge's interpreter of the Core ML package ({rounding}), not Apple's runtime"
        )

    def load(self, function: str) -> None:
        """Binds a function, so that it is ready to run."""
        self._interpreter.bind(function)

    def make_states(self, function: str) -> Any:
        """Makes states of zeros, by name."""
        return self._interpreter.make_states(function)

    def call(
        self, function: str, inputs: _Arrays, states: Any, watch: Watch | None = None
    ) -> dict[str, npt.NDArray[Any]]:
        """Calls a function and returns its outputs by name; ``watch`` looks at each value."""
        from device_harness.coreml_interpreter.finite import FiniteWatch

        if isinstance(watch, FiniteWatch):
            outputs = self._interpreter.bind(function).outputs
            watch.begin(function, (slot for _, slot in outputs))
        return self._interpreter.run(inputs, function, states, watch)


class AppleRunner:
    """Calls functions in Apple's runtime, through coremltools on a Mac with macOS 15 or later.

    EdgeForge's developers have no Mac, so this class has never run against Apple's runtime.

    Args:
        package: the package.
        compute_units: one of `COMPUTE_UNITS`.
    """

    limits: tuple[str, ...] = ()

    def __init__(self, package: Package, compute_units: str) -> None:
        import platform

        import coremltools

        units = coremltools.ComputeUnit
        self._units = {
            "all": units.ALL,
            "cpu": units.CPU_ONLY,
            "cpu-and-gpu": units.CPU_AND_GPU,
            "cpu-and-ne": units.CPU_AND_NE,
        }[compute_units]
        self._package = package
        self._several = len(package.functions) > 1
        self._models: dict[str, Any] = {}
        self.runtime = (
            f"Core ML of macOS {platform.mac_ver()[0]} (compute units: {compute_units}), by "
            f"coremltools {coremltools.__version__}"
        )

    def load(self, function: str) -> None:
        """Compiles and loads a function."""
        self._model(function)

    def make_states(self, function: str) -> Any:
        """Makes states that move to each function that is called; see `_AppleStates`."""
        return _AppleStates([each.name for each in self._package.interface(function).states])

    def call(
        self, function: str, inputs: _Arrays, states: Any, watch: Watch | None = None
    ) -> dict[str, npt.NDArray[Any]]:
        """Calls a function and returns its outputs by name; nothing between them can be seen."""
        model = self._model(function)
        try:
            state = states.of(function, model) if states.names else None
            found: dict[str, npt.NDArray[Any]] = model.predict(dict(inputs), state=state)
        except Exception as error:  # the errors of Apple's runtime have no common class
            raise DeviceError(f"Core ML failed in function {function}: {error}") from error
        return found

    def _model(self, function: str) -> Any:
        if function not in self._models:
            import coremltools

            named = {"function_name": function} if self._several else {}
            try:
                self._models[function] = coremltools.models.MLModel(
                    str(self._package.path), compute_units=self._units, **named
                )
            except Exception as error:  # as above
                raise DeviceError(
                    f"Core ML cannot load function {function} of {self._package.path}: {error}"
                ) from error
        return self._models[function]


class _AppleStates:
    """The states of one text, which several functions use in turn.

    A state belongs to the model that made it, and each function is a model of its own. So when
    another function is called, the content of the states is copied to that function's states.
    """

    def __init__(self, state_names: list[str]) -> None:
        self.names = state_names
        self._made: dict[str, Any] = {}
        self._last: str | None = None

    def of(self, function: str, model: Any) -> Any:
        """Returns the state to call a function with."""
        if function not in self._made:
            self._made[function] = model.make_state()
        state = self._made[function]
        if self._last not in (None, function):
            before = self._made[str(self._last)]
            for name in self.names:
                state.write_state(name, before.read_state(name))
        self._last = function
        return state


def _choose_runner(
    package: Package, threads: int | None, precision: str | None, compute_units: str | None
) -> Runner:
    if compute_units is not None and compute_units not in COMPUTE_UNITS:
        raise DeviceError(
            f"there are no compute units {compute_units}; there are {', '.join(COMPUTE_UNITS)}"
        )
    if precision is not None and compute_units is not None:
        raise DeviceError(
            "--precision is an option of the interpreter and --compute-units one of Apple's "
            "runtime: give only one of them"
        )
    if precision is None and sys.platform == "darwin" and _has_coremltools():
        return AppleRunner(package, compute_units or "all")
    if compute_units is not None:
        raise DeviceError(
            "compute units are chosen in Apple's runtime, which needs macOS 15 and coremltools "
            '(pip install "edgeforge[coreml]"); elsewhere leave --compute-units out'
        )
    return InterpretedRunner(package, threads, precision or "fp16")


def _has_coremltools() -> bool:
    import importlib.util

    return importlib.util.find_spec("coremltools") is not None


def _chunks(interface: Interface) -> tuple[int, ...]:
    """The numbers of tokens that a call of a function may take."""
    for feature in interface.inputs:
        if feature.name == names.TOKENS:
            shapes = feature.shapes or (feature.shape,)
            return tuple(shape[-1] for shape in shapes if shape)
    return ()
