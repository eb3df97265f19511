"""A result as JUnit XML, in the form that Jenkins, GitLab and most others read.

There is no standard. This keeps to the schema of Jenkins's xUnit plugin: ``testsuites`` of
``testsuite`` of ``testcase`` with ``failure``, ``skipped`` and ``system-out``.
"""

from __future__ import annotations

from xml.etree import ElementTree

from edgeforge.gate.outputs.lines import finding_line, summary
from edgeforge.gate.result import GateResult
from edgeforge.gate.texts import xml_text


def junit_xml(result: GateResult) -> bytes:
    """The result as an XML document: a suite for each artifact, a case for each check."""
    cases = [each for artifact in result.artifacts for each in artifact.findings]
    failures = sum(each.outcome == "failed" for each in cases)
    root = ElementTree.Element(
        "testsuites", name="edgeforge check", tests=str(len(cases)), failures=str(failures)
    )
    for artifact in result.artifacts:
        suite = ElementTree.SubElement(
            root,
            "testsuite",
            name=xml_text(artifact.path),
            tests=str(len(artifact.findings)),
            failures=str(len(artifact.failed)),
            errors="0",
            skipped="0",
        )
        for finding in artifact.findings:
            case = ElementTree.SubElement(
                suite,
                "testcase",
                classname=xml_text(artifact.path.replace("/", ".")),
                name=f"{finding.metric} ({finding.kind})",
            )
            line = xml_text(finding_line(finding))
            if finding.outcome == "failed":
                failure = ElementTree.SubElement(
                    case, "failure", type=finding.kind, message=xml_text(finding.message)
                )
                failure.text = line
            elif finding.outcome != "passed":
                ElementTree.SubElement(case, "system-out").text = f"{finding.outcome}: {line}"
        ElementTree.SubElement(suite, "system-out").text = xml_text(summary(artifact))
    ElementTree.indent(root)
    written: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return written + b"\n"
