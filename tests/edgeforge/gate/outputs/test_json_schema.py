"""What ``--json`` prints keeps to the schema that ships."""

import json
from importlib.resources import files

import jsonschema
import pytest

from edgeforge.gate.result import RESULT_VERSION
from quant.json_output import json_text


@pytest.fixture(scope="module")
def validator():
    place = files("edgeforge.gate") / "schemas" / f"check-{RESULT_VERSION}.schema.json"
    schema = json.loads(place.read_text("utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_every_result_is_valid(any_result, validator):
    data = json.loads(json_text(any_result.to_json()))
    validator.validate(data)
    assert data["passed"] is any_result.passed
    assert data["schema_version"] == RESULT_VERSION


def test_the_schema_refuses_what_is_no_result(failed, validator):
    data = json.loads(json_text(failed.to_json()))
    assert data["artifacts"][1]["findings"][0]["value"] is None  # NaN
    for change in (
        {"schema_version": 2},
        {"extra": 1},
        {"artifacts": [{"path": "a"}]},
        {"artifacts": [{**data["artifacts"][0], "findings": [{"metric": "a"}]}]},
    ):
        assert not validator.is_valid({**data, **change})
    assert not validator.is_valid({key: data[key] for key in data if key != "passed"})
