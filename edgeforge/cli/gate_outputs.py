"""Writes what `check` found to files and to GitHub."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from edgeforge.cli.printable import printable_lines
from edgeforge.errors import UsageError
from edgeforge.gate.gate import GateOptions
from edgeforge.gate.result import GateResult
from edgeforge.output_folder.inputs import Input, refuse_inputs
from edgeforge.output_folder.whole_file import whole_file


@dataclass(frozen=True)
class GateFiles:
    """The files that a user asks for."""

    junit: Path | None
    sarif: Path | None
    markdown: Path | None

    def given(self) -> Iterator[tuple[str, Path]]:
        """Those that were asked for, by their options."""
        for name in ("junit", "sarif", "markdown"):
            path = getattr(self, name)
            if path is not None:
                yield f"--{name}", path


def refuse_places(files: GateFiles, options: GateOptions) -> None:
    """Refuses, before anything runs, files that cannot be written or are inputs.

    Raises:
        UsageError: says which option, and why.
    """
    inputs = [
        Input(what, path)
        for what, path in (("the policy", options.policy), ("the baseline", options.baseline))
        if path is not None
    ]
    for name, path in files.given():
        refuse_inputs(path, inputs, name)
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise UsageError(f"{name} {path} cannot be written: name a file in an existing folder")
        inputs.append(Input(f"the file of {name}", path))


def write_files(
    result: GateResult, files: GateFiles, github: bool | None, commands: TextIO
) -> None:
    """Writes each file whole, and speaks to GitHub where it runs us or the user says so.

    Args:
        result: of the check.
        files: to write.
        github: whether to; None for where ``GITHUB_ACTIONS`` is ``true``.
        commands: where the commands of a workflow go; GitHub reads them on both streams.
    """
    from edgeforge.gate.outputs.github import github_annotations
    from edgeforge.gate.outputs.junit import junit_xml
    from edgeforge.gate.outputs.markdown import markdown
    from edgeforge.gate.outputs.sarif import sarif_json

    if files.junit is not None:
        _write(files.junit, junit_xml(result))
    if files.sarif is not None:
        _write(files.sarif, sarif_json(result).encode())
    if files.markdown is not None:
        _write(files.markdown, markdown(result).encode())
    if github is None:
        github = os.environ.get("GITHUB_ACTIONS") == "true"
    if not github:
        return
    workspace = os.environ.get("GITHUB_WORKSPACE")
    lines = github_annotations(result, Path(workspace) if workspace else Path())
    if lines:
        print(printable_lines(lines), file=commands)
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        with open(summary, "ab") as stream:  # other steps have written there
            stream.write(markdown(result).encode())


def _write(path: Path, content: bytes) -> None:
    with whole_file(path) as stream:
        stream.write(content)
