"""A result as SARIF 2.1.0, which code scanning services read."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from urllib.parse import quote

from edgeforge.gate.outputs.lines import finding_line
from edgeforge.gate.result import ArtifactResult, Finding, GateResult
from exporters.manifest import MANIFEST
from quant.json_output import json_text

_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
_LEVELS = {"failed": "error", "doubtful": "warning", "allowed": "note"}


def sarif_json(result: GateResult) -> str:
    """The result as a log of one run: a rule for each figure, a result for each violation."""
    shown = [
        (artifact, finding)
        for artifact in result.artifacts
        for finding in artifact.findings
        if finding.outcome != "passed"
    ]
    rules = sorted({finding.metric for _, finding in shown})
    driver: dict[str, object] = {
        "name": "edgeforge check",
        "rules": [
            {"id": name, "shortDescription": {"text": f"{name} keeps to the policy"}}
            for name in rules
        ],
    }
    with suppress(PackageNotFoundError):  # where it runs from a folder
        driver["semanticVersion"] = version("edgeforge")
    log = {
        "$schema": _SCHEMA,
        "version": "2.1.0",
        "runs": [
            {
                "tool": {"driver": driver},
                "columnKind": "unicodeCodePoints",
                "results": [_result(*each, rules) for each in shown],
            }
        ],
    }
    return json_text(log) + "\n"


def _result(artifact: ArtifactResult, finding: Finding, rules: list[str]) -> dict[str, object]:
    place = f"{artifact.folder}/{MANIFEST}"
    # A later run of the same artifact and figure is about the same thing, whatever its value is.
    same = f"{artifact.path}\n{finding.metric}\n{finding.kind}"
    return {
        "ruleId": finding.metric,
        "ruleIndex": rules.index(finding.metric),
        "level": _LEVELS[finding.outcome],
        "message": {"text": f"{artifact.path}: {finding_line(finding)}"},
        "locations": [
            {
                "physicalLocation": {
                    "artifactLocation": {"uri": quote(place)},
                    "region": {"startLine": 1},
                }
            }
        ],
        "partialFingerprints": {"figure/v1": hashlib.sha256(same.encode()).hexdigest()},
    }
