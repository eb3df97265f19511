"""A Core ML artifact on an iPhone, whose functions coremltools' runner calls one at a time.

The runner keeps one state for each function that it has loaded. It outlives the calls, and belongs
to that function alone. So a text goes through ``decode`` token by token, which computes what an app
gets; ``prefill`` is called beside it, in a state of its own, for its time and its last logits. A
package for iOS 17 gives its caches back, and its one function does both, as in an app.

A state is not cleared: a fresh text begins at position 0 again, and attention sees no later
position than a token's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from device_harness.errors import DeviceError
from device_harness.finite import bad_positions
from device_harness.session import HostSession, Logits, Tokens, check_tokens
from device_harness.timed_run import TimedRun
from exporters.coreml import names
from exporters.coreml.package import Interface, Package

Arrays = dict[str, npt.NDArray[Any]]

UNKNOWN: Final = (
    "memory: coremltools' runner tells none, and what stands as a peak here is 0",
    "a first-ever load apart from later ones: Core ML keeps what it compiled between runs",
)


@dataclass(frozen=True)
class Loaded:
    """A function that the runner has loaded.

    Attributes:
        key: the runner's name for it.
        seconds: that loading took on the phone, transfers apart.
    """

    key: str
    seconds: float


class Runner(Protocol):
    """What the edge to the phone does.

    Attributes:
        runtime: the runtime's name and version, for reports.
        prepared: the seconds of each step of getting ready, by name: building, installing, ...
    """

    runtime: str
    prepared: Mapping[str, float]

    def load(self, function: str) -> Loaded:
        """Loads a function once more, with a state of its own.

        Raises:
            DeviceError: the phone refuses it.
        """

    def call(self, key: str, inputs: Mapping[str, npt.NDArray[Any]]) -> tuple[Arrays, float]:
        """Calls a loaded function: its outputs, and the seconds that it took on the phone.

        Raises:
            DeviceError: the call fails.
        """

    def close(self) -> None:
        """Ends the runner; closing again does nothing."""


class PhoneSession(HostSession):
    """An artifact on an iPhone.

    Args:
        package: the package.
        context: the declared context, in tokens.
        runner: runs its functions.
    """

    limits: tuple[str, ...] = UNKNOWN
    runs_drafts = False  # each function there has a state of its own

    def __init__(self, package: Package, context: int, runner: Runner) -> None:
        self.context, self._package, self._phone = context, package, runner
        self.runtime = runner.runtime
        functions = package.functions
        self._step = names.DECODE if names.DECODE in functions else package.default_function
        self._prefill = names.PREFILL if names.PREFILL in functions else None
        self._all = names.VERIFY if names.VERIFY in functions else None
        self.has_all_positions = self._all is not None
        self._keys: dict[str, Loaded] = {}
        self._caches = self._fresh(self._step)
        self.load_seconds = 0.0
        self._last = np.zeros(0, np.float32)

    @property
    def peak_bytes(self) -> int:
        """Zero: the runner does not tell."""
        return 0

    @property
    def vocab_size(self) -> int:
        """Width of the logits; loads the functions that an app calls."""
        for function in (self._step, self._prefill):
            if function is not None:
                self._load(function)
        for feature in self._interface(self._step).outputs:
            if feature.name == names.LOGITS and feature.shape:
                return feature.shape[-1]
        raise DeviceError(f"{self._package.path} has no output {names.LOGITS!r} of fixed width")

    def reset(self) -> None:
        """Forgets all positions."""
        super().reset()
        self._caches = self._fresh(self._step)

    def extend(self, tokens: Tokens) -> Logits:
        """Appends tokens, one call each, and returns the last one's logits."""
        return self._extend(tokens)[0]

    def logits(self, tokens: Tokens) -> Logits:
        """Logits of every position of a fresh text, by the function that gives all of them."""
        check_tokens(tokens, len(tokens), self.vocab_size, self.context)
        if self._all is None:
            return self._one_by_one(tokens)
        size = max(chunks_of(self._interface(self._all)))
        if -(-len(tokens) // size) * size > self.context:
            return self._one_by_one(tokens)
        key, found = self._load(self._all).key, []
        for at in range(0, len(tokens), size):
            part = np.zeros(size, np.int64)  # what pads the last chunk comes after all that counts
            part[: len(tokens[at : at + size])] = tokens[at : at + size]
            found.append(self._call(self._all, key, part, at, {})[0])
        return np.concatenate(found)[: len(tokens)]

    def run_timed(self, prompt: Tokens, output: int) -> TimedRun:
        """Runs a prompt and generates greedily, by the phone's own clock.

        Args:
            prompt: ``int64[t]``.
            output: how many tokens to generate, at least 1.
        """
        self.reset()
        logits, first = self._prompt(prompt)
        seconds, generated, bad = [first], [int(np.nan_to_num(logits, nan=-np.inf).argmax())], []
        if bad_positions(logits[None]):
            bad.append(0)
        for _ in range(output - 1):
            logits, took = self._extend(np.array(generated[-1:], np.int64))
            seconds.append(took)
            if bad_positions(logits[None]):
                bad.append(len(generated))
            generated.append(int(np.nan_to_num(logits, nan=-np.inf).argmax()))
        return TimedRun(
            prompt_tokens=len(prompt),
            first_token_seconds=seconds[0],
            step_seconds=tuple(seconds[1:]),
            tokens=tuple(generated),
            peak_bytes=0,
            not_finite=len(bad),
        )

    def close(self) -> None:
        """Ends the runner."""
        super().close()
        self._phone.close()

    def _prompt(self, prompt: Tokens) -> tuple[Logits, float]:
        """The last logits of a prompt, and the seconds that an app's calls would take for it."""
        if self._prefill is None:
            return self._extend(prompt)
        size = max(chunks_of(self._interface(self._prefill)))
        whole, took = len(prompt) // size * size, 0.0
        logits = self._last
        for at in range(0, whole, size):
            key = self._load(self._prefill).key
            found, seconds = self._call(self._prefill, key, prompt[at : at + size], at, {})
            logits, took = found[-1], took + seconds
        # Decode reads the whole prompt into its own state; only what prefill leaves counts.
        if whole:
            self._extend(prompt[:whole])
        if len(prompt) > whole:
            logits, seconds = self._extend(prompt[whole:])
            took += seconds
        return logits, took

    def _extend(self, tokens: Tokens) -> tuple[Logits, float]:
        check_tokens(tokens, self._length + len(tokens), self.vocab_size, self.context)
        key, took, done = self._load(self._step).key, 0.0, 0
        sizes = chunks_of(self._interface(self._step)) or (1,)
        while done < len(tokens):
            fitting = [size for size in sizes if size <= len(tokens) - done]
            size = max(fitting) if self._caches and fitting else 1
            part = tokens[done : done + size]
            found, seconds = self._call(self._step, key, part, self._length, self._caches)
            self._last, took = found[-1], took + seconds
            self._length, done = self._length + size, done + size
        return self._last, took

    def _one_by_one(self, tokens: Tokens) -> Logits:
        """Every position's logits, by a copy of the stepping function, whose state is its own."""
        name = f"{self._step} of all positions"
        if name not in self._keys:
            self._keys[name] = self._phone.load(self._step)
        caches, found = self._fresh(self._step), []
        for at in range(len(tokens)):
            part = tokens[at : at + 1]
            found.append(self._call(self._step, self._keys[name].key, part, at, caches)[0])
        return np.concatenate(found)

    def _load(self, function: str) -> Loaded:
        self._require_open()
        if function not in self._keys:
            self._keys[function] = self._phone.load(function)
            self.load_seconds += self._keys[function].seconds
        return self._keys[function]

    def _call(
        self, function: str, key: str, tokens: Tokens, position: int, caches: Arrays
    ) -> tuple[Logits, float]:
        inputs: Arrays = {
            names.TOKENS: tokens.astype(np.int32).reshape(1, -1),
            names.POSITION: np.array([position], np.int32),
            **caches,
        }
        outputs, seconds = self._phone.call(key, inputs)
        for name in caches:
            if name + names.UPDATED not in outputs:
                raise DeviceError(f"function {function} does not give {name} back on the phone")
            caches[name] = outputs[name + names.UPDATED].astype(np.float16)
        if names.LOGITS not in outputs or outputs[names.LOGITS].ndim != 3:
            raise DeviceError(f"function {function} gives no logits on the phone")
        logits: Logits = outputs[names.LOGITS][0].astype(np.float32)
        return logits, seconds

    def _interface(self, function: str) -> Interface:
        return self._package.interface(function)

    def _fresh(self, function: str) -> Arrays:
        """Caches of zeros, where they are inputs."""
        return {
            feature.name: np.zeros(feature.shape, np.float16)
            for feature in self._interface(function).inputs
            if feature.name not in (names.TOKENS, names.POSITION)
        }


def chunks_of(interface: Interface) -> tuple[int, ...]:
    """The numbers of tokens that a call of a function may take."""
    for feature in interface.inputs:
        if feature.name == names.TOKENS:
            shapes = feature.shapes or (feature.shape,)
            return tuple(shape[-1] for shape in shapes if shape)
    return ()
