"""What `edgeforge doctor` tries: exporting, and running what was exported.

Each trial runs in a process of its own, so that a crash of a runtime is a result like any other.
Its answers go to a file, one JSON object a line, because runtimes may print on both streams.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from device_harness.child_process import python_command, python_environment

_SECONDS: Final = 300  # for one process; an idle machine needs a few
_INSTRUCTION_SETS: Final = ("none wider than the compiler's default", "AVX2", "AVX-512")

Answer = dict[str, Any]


def try_all(targets: Sequence[str]) -> tuple[Answer, dict[str, Answer]]:
    """Exports a tiny model of random weights to every target and runs each artifact.

    Args:
        targets: their names.

    Returns:
        What is known of the compiled kernels (``built``, ``instruction_set``, ``error``), and by
        target ``export_error`` (None when exporting works), ``runtime`` (None when running does not
        work) and ``run_error``.
    """
    with tempfile.TemporaryDirectory(prefix="edgeforge-doctor-") as name:
        folder = Path(name)
        kernels: Answer = {"built": None, "instruction_set": None, "error": None}
        exported = _try_export(folder, targets, kernels)
        if any(answer["error"] for answer in exported.values()):
            # Something went wrong in exporting to all at once; each alone tells whose fault it is.
            exported = {}
            for target in targets:
                exported |= _try_export(folder, [target], kernels)
        with ThreadPoolExecutor(2) as pool:  # each mostly waits for its process
            ran = list(pool.map(lambda target: _try_run(folder, exported[target]), targets))
        return kernels, dict(zip(targets, ran, strict=True))


def _try_export(folder: Path, targets: Sequence[str], kernels: Answer) -> dict[str, Answer]:
    """By target, the artifact's ``folder`` or the ``error``; says what it learns of the kernels."""
    answers, end = _in_a_process("export", folder, {"targets": list(targets)})
    for answer in answers:
        if "kernels" in answer:
            kernels.update(answer["kernels"], error=None)
        elif "folders" in answer:
            return {
                target: {"folder": answer["folders"][target], "error": None} for target in targets
            }
        else:
            end = answer["error"]
    if kernels["built"] is None:
        kernels["error"] = end
    return {target: {"folder": None, "error": end} for target in targets}


def _try_run(folder: Path, exported: Answer) -> Answer:
    result = {"export_error": exported["error"], "runtime": None, "run_error": None}
    if exported["error"] is not None:
        result["run_error"] = "there is no artifact to run"
        return result
    answers, end = _in_a_process("run", folder, {"folder": exported["folder"]})
    for answer in answers:
        result["runtime"], result["run_error"] = answer["runtime"], answer["error"]
    if not answers:
        result["run_error"] = end
    return result


def _in_a_process(
    trial: str, folder: Path, asked: Mapping[str, object]
) -> tuple[list[Answer], str | None]:
    """Runs a trial; returns its answers, and how its process ended if it did not end well."""
    descriptor, name = tempfile.mkstemp(".jsonl", dir=folder)
    os.close(descriptor)
    place = Path(name)
    try:
        done = subprocess.run(
            python_command("edgeforge.cli.trials", trial, str(folder), name, json.dumps(asked)),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_SECONDS,
            # What is exported here must really be quantized, and leave the user's cache alone.
            env={**python_environment(), "EDGEFORGE_CACHE": str(folder / "cache")},
        )
    except subprocess.TimeoutExpired:
        return _read(place), f"it did not end within {_SECONDS} seconds"
    if done.returncode == 0:
        return _read(place), None
    how = f"exit code {done.returncode}"
    if done.returncode < 0:
        how = signal.Signals(-done.returncode).name
    said = done.stderr.decode(errors="replace").strip().splitlines()
    return _read(place), f"its process ended by {how}" + (f": {said[-1][:300]}" if said else "")


def _read(place: Path) -> list[Answer]:
    answers = []
    for line in place.read_text(encoding="utf-8").splitlines():
        answer: Answer = json.loads(line)
        answers.append(answer)
    return answers


def main() -> None:
    """Carries out one trial.

    The command's arguments are ``export`` or ``run``, a folder for what is written, the file that
    answers go to, and what is asked as JSON.
    """
    trial, folder, answers, asked = sys.argv[1:]
    place, request = Path(answers), json.loads(asked)
    try:
        if trial == "export":
            _export(Path(folder), request["targets"], place)
        else:
            _run(Path(request["folder"]), place)
    except Exception as error:  # whatever it is, it is the answer
        _say(place, {"runtime": None, "error": _sentence(error)})


def _say(place: Path, answer: Answer) -> None:
    """Writes an answer at once: a later crash must not take it along."""
    with place.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(answer) + "\n")


def _export(folder: Path, targets: list[str], place: Path) -> None:
    from edgeforge import api
    from edgeforge.synth.synthesise import synthesise
    from quant.kernels import native

    level = native.limit_instruction_set(2) if native.available() else None
    name = None if level is None else _INSTRUCTION_SETS[level]
    _say(place, {"kernels": {"built": level is not None, "instruction_set": name}})
    checkpoint = folder / "checkpoint"
    if not checkpoint.exists():
        synthesise("tiny-llama", checkpoint)
    out = folder / "-".join(targets)
    written = api.export(checkpoint, out, targets=targets, context=64, threads=1)
    _say(place, {"folders": dict(zip(targets, map(str, written), strict=True))})


def _run(artifact: Path, place: Path) -> None:
    import numpy as np

    from device_harness.registry import open_session
    from exporters.manifest import Manifest

    with open_session(artifact, Manifest.read(artifact), threads=1) as session:
        logits = session.extend(np.array([1, 2, 3], np.int64))
        runtime = session.runtime
    error = None if np.isfinite(logits).all() else f"logits of {runtime} are not finite"
    _say(place, {"runtime": None if error else runtime, "error": error})


def _sentence(error: Exception) -> str:
    """One line: an error's own sentence where it is meant for users, else with its class's name."""
    from edgeforge.cli.exits import explain, one_line

    words = one_line(str(error)).strip()
    return words if words and explain(error) else f"{type(error).__name__}: {words}"
