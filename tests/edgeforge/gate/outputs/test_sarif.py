"""SARIF: rules, results and levels. It was also held against the schema of OASIS, by hand."""

import json

from edgeforge.gate.outputs.sarif import sarif_json


def test_each_violation_is_a_result_of_a_rule(failed):
    log = json.loads(sarif_json(failed))
    (run,) = log["runs"]
    rules = [each["id"] for each in run["tool"]["driver"]["rules"]]
    assert log["version"] == "2.1.0"
    assert rules == sorted(set(rules))
    assert [each["level"] for each in run["results"]] == [
        "error",
        "error",
        "warning",
        "note",
        "error",
    ]
    for each in run["results"]:
        assert rules[each["ruleIndex"]] == each["ruleId"]
        (location,) = each["locations"]
        uri = location["physicalLocation"]["artifactLocation"]["uri"]
        assert uri.endswith("/edgeforge.json")
        assert uri.isascii() and not set(uri) & set(' <>"|`\x1b\n')
    fingerprints = [each["partialFingerprints"]["figure/v1"] for each in run["results"]]
    assert len(set(fingerprints)) == len(fingerprints)


def test_the_same_figure_is_the_same_result_in_a_later_run(failed):
    one, other = (json.loads(sarif_json(failed))["runs"][0]["results"] for _ in range(2))
    assert [e["partialFingerprints"] for e in one] == [e["partialFingerprints"] for e in other]


def test_nothing_is_reported_where_all_is_well(sound):
    assert json.loads(sarif_json(sound))["runs"][0]["results"] == []
