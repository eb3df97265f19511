"""Reads the figures that other runners print: ExecuTorch's llama runner, and llama-bench."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from device_harness.devices.android.device_text import clean, one_line

EXECUTORCH: Final = "ExecuTorch's llama runner"
LLAMA_BENCH: Final = "llama-bench"
LARGEST_OUTPUT: Final = 8 << 20
_MOST_FIGURES: Final = 1000
_MOST_SAMPLES: Final = 1000
_MOST_TOKENS: Final = 1 << 31
_FASTEST: Final = 1e7  # tokens/s; whatever is faster is no measurement
_LONGEST_SECONDS: Final = 1e7
# As ``print_report`` of ExecuTorch's extension/llm/runner/stats.h prints them.
_OBSERVER: Final = re.compile(r"PyTorchObserver (\{[^\n]{1,4000}\})")
_SAID: Final = ("build_commit", "backends", "n_threads", "type_k", "type_v", "n_depth", "n_batch")


@dataclass(frozen=True)
class RunnerFigures:
    """What a runner said of one run, or of repetitions of one.

    Attributes:
        source: the runner.
        prompt_tokens: the length of the prompt; None where it ran none.
        output_tokens: how many tokens it generated; None where it generated none.
        load_seconds: that loading took.
        first_token_seconds: from the prompt to the first token.
        prefill_tokens_per_second: of the prompt.
        decode_tokens_per_second: of the generated tokens.
        samples: tokens/s of each repetition, where there are any.
        spread: the standard deviation of the tokens/s, where it is said.
        model: what the runner says that it ran.
        more: what else it says, by its own names.
    """

    source: str
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    load_seconds: float | None = None
    first_token_seconds: float | None = None
    prefill_tokens_per_second: float | None = None
    decode_tokens_per_second: float | None = None
    samples: tuple[float, ...] = ()
    spread: float | None = None
    model: str = ""
    more: Mapping[str, str] = field(default_factory=dict)


def read_figures(output: bytes | str) -> list[RunnerFigures]:
    """All figures in what a runner printed, of whichever of the known forms; else none.

    What is no number, or no number that can be measured, is left out: nothing is guessed.

    Args:
        output: its stdout; more than `LARGEST_OUTPUT` of it is not looked at.
    """
    text = clean(output[-LARGEST_OUTPUT:])
    readers: tuple[Callable[[str], Iterator[RunnerFigures]], ...] = (
        _executorch,
        _llama_bench_json,
        _llama_bench_csv,
        _llama_bench_markdown,
    )
    for reader in readers:
        found = [figures for figures, _ in zip(reader(text), range(_MOST_FIGURES), strict=False)]
        if found:
            return found
    return []


def _executorch(text: str) -> Iterator[RunnerFigures]:
    """A line of JSON after the word PyTorchObserver, of time stamps in milliseconds."""
    for match in _OBSERVER.finditer(text):
        said = _object(match[1])
        unit = _number(said, "SCALING_FACTOR_UNITS_PER_SECOND", 1e12)
        stamps = {
            name: _number(said, f"{name}_ms", 1e18)
            for name in (
                *("model_load_start", "model_load_end", "inference_start", "inference_end"),
                *("prompt_eval_end", "first_token"),
            )
        }
        if not unit or any(value is None for value in stamps.values()):
            continue
        at = {name: value for name, value in stamps.items() if value is not None}
        prompt, output = _count(said, "prompt_tokens"), _count(said, "generated_tokens")
        sampling = _number(said, "aggregate_sampling_time_ms", 1e18)

        def seconds(
            begin: str, end: str, at: Mapping[str, float] = at, unit: float = unit
        ) -> float:
            return (at[end] - at[begin]) / unit

        yield RunnerFigures(
            EXECUTORCH,
            prompt,
            output,
            _seconds(seconds("model_load_start", "model_load_end")),
            _seconds(seconds("inference_start", "first_token")),
            # The runner's own report divides so: the prompt's time includes its tokenization.
            _rate(prompt, seconds("inference_start", "prompt_eval_end")),
            _rate(output, seconds("prompt_eval_end", "inference_end")),
            more={} if sampling is None else {"sampling_seconds": f"{sampling / unit:g}"},
        )


def _llama_bench_json(text: str) -> Iterator[RunnerFigures]:
    """``-o json`` is one list, ``-o jsonl`` an object a line."""
    begin, end = re.search(r"^\[\s*\{", text, re.MULTILINE), text.rfind("]")
    rows: object = None
    if begin is not None:
        rows = _parsed(text[begin.start() : end + 1])
    if not isinstance(rows, list) or not any(isinstance(row, dict) for row in rows):
        rows = [_parsed(line) for line in text.splitlines() if line.startswith("{")]
    for row in rows:
        if isinstance(row, dict) and "n_gen" in row and "avg_ts" in row:
            yield from _row(row)


def _llama_bench_csv(text: str) -> Iterator[RunnerFigures]:
    """``-o csv``: a line of names that begins with the build, and a line for each test."""
    begin = re.search(r"^build_commit,.*\bavg_ts\b.*$", text, re.MULTILINE)
    if begin is None:
        return
    try:
        for row in csv.DictReader(io.StringIO(text[begin.start() :])):
            yield from _row({str(name): value for name, value in row.items()})
    except csv.Error:
        return


def _row(row: Mapping[str, Any]) -> Iterator[RunnerFigures]:
    """One test of llama-bench, which reports prompts (pp) and generation (tg) apart."""
    prompt, output = _count(row, "n_prompt"), _count(row, "n_gen")
    rate = _number(row, "avg_ts", _FASTEST)
    if prompt is None or output is None or not prompt + output or not rate:
        return
    samples = row.get("samples_ts")
    given = samples[:_MOST_SAMPLES] if isinstance(samples, list) else []
    numbers = [_number({"x": each}, "x", _FASTEST) for each in given]
    yield RunnerFigures(
        LLAMA_BENCH,
        prompt or None,
        output or None,
        # Of a prompt with generation after it the tokens/s are of both together, and of neither.
        prefill_tokens_per_second=rate if not output else None,
        decode_tokens_per_second=rate if not prompt else None,
        samples=tuple(each for each in numbers if each is not None),
        spread=_number(row, "stddev_ts", _FASTEST),
        model=one_line(str(row.get("model_type", ""))),
        more={
            **{name: one_line(str(row[name])) for name in _SAID if name in row},
            **({"tokens_per_second_of_both": f"{rate:g}"} if prompt and output else {}),
        },
    )


def _llama_bench_markdown(text: str) -> Iterator[RunnerFigures]:
    """``-o md``, its default: a table whose last columns are the test and the tokens/s."""
    names: list[str] = []
    for line in text.splitlines():
        if not line.startswith("|"):
            names = []
            continue
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if "t/s" in cells and "test" in cells:
            names = cells
        elif names and len(cells) == len(names):
            row = dict(zip(names, cells, strict=True))
            yield from _markdown_row(row)


def _markdown_row(row: Mapping[str, str]) -> Iterator[RunnerFigures]:
    test = re.fullmatch(
        r"(?:pp ?(\d{1,9}))?\+?(?:tg ?(\d{1,9}))?(?: @ d(\d{1,9}))?", row.get("test", "")
    )
    speed = re.fullmatch(r"([0-9.]{1,20})(?: ± ([0-9.]{1,20}))?", row.get("t/s", ""))
    if test is None or speed is None:
        return
    yield from _row(
        {
            "n_prompt": test[1] or "0",
            "n_gen": test[2] or "0",
            "n_depth": test[3] or "0",
            "avg_ts": speed[1],
            "stddev_ts": speed[2] or "",
            "model_type": row.get("model", ""),
            **{
                name: row[column]
                for name, column in (("backends", "backend"), ("n_threads", "threads"))
                if column in row
            },
        }
    )


def _parsed(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _object(text: str) -> Mapping[str, Any]:
    found = _parsed(text)
    return found if isinstance(found, dict) else {}


def _number(row: Mapping[str, Any], name: str, most: float) -> float | None:
    """A number that is finite, not negative, and not beyond what can be."""
    given = row.get(name)
    if isinstance(given, bool) or not isinstance(given, int | float | str):
        return None
    if isinstance(given, str) and len(given) > 40:
        return None
    try:
        found = float(given)
    except (ValueError, OverflowError):
        return None
    return found if math.isfinite(found) and 0 <= found <= most else None


def _count(row: Mapping[str, Any], name: str) -> int | None:
    found = _number(row, name, _MOST_TOKENS)
    return int(found) if found is not None and found == int(found) else None


def _seconds(given: float) -> float | None:
    return round(given, 6) if 0 <= given <= _LONGEST_SECONDS else None


def _rate(tokens: int | None, seconds: float) -> float | None:
    if not tokens or not 0 < seconds <= _LONGEST_SECONDS:
        return None
    return tokens / seconds
