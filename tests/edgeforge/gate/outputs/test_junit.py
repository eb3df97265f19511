"""JUnit XML: what Jenkins's schema allows, and the figures."""

from xml.etree import ElementTree

from edgeforge.gate.outputs.junit import junit_xml

# By element: its attributes, and its children, as the schema of Jenkins's xUnit plugin has them.
_ALLOWED = {
    "testsuites": ({"name", "tests", "failures", "errors", "time", "disabled"}, {"testsuite"}),
    "testsuite": (
        {"name", "tests", "failures", "errors", "time", "skipped", "timestamp", "hostname", "id"},
        {"testcase", "system-out", "system-err", "properties"},
    ),
    "testcase": (
        {"name", "classname", "time", "status", "assertions"},
        {"failure", "error", "skipped", "system-out", "system-err"},
    ),
    "failure": ({"type", "message"}, set()),
    "system-out": (set(), set()),
}


def test_every_result_has_the_form(any_result):
    root = ElementTree.fromstring(junit_xml(any_result))
    assert root.tag == "testsuites"
    for element in root.iter():
        attributes, children = _ALLOWED[element.tag]
        assert set(element.attrib) <= attributes, element.tag
        assert {each.tag for each in element} <= children, element.tag


def test_counts_and_failures_are_the_results(failed):
    root = ElementTree.fromstring(junit_xml(failed))
    assert (root.get("tests"), root.get("failures")) == ("7", "3")
    suite, other = root
    assert (suite.get("tests"), suite.get("failures")) == ("5", "2")
    failures = suite.findall("testcase/failure")
    assert "must be at most 0.02" in failures[0].text
    assert failures[0].get("message") == "total.kl_mean is 0.0362, and must be at most 0.02"
    # No XML can hold an escape character.
    assert other.get("name") == 'out/<a & "b">|?[2J%0A::error::\n`x`'
