"""A plan's file: what lies in its place already."""

import os
import signal

import pytest

from edgeforge.errors import UsageError
from edgeforge.planning.plan_file import write_plan
from quant.formats.formats import parse_format
from quant.plans.plan import Assignment, QuantPlan

PLAN = QuantPlan("mine", {"a.weight": Assignment(parse_format("int4-g32"), "rtn")})


def test_a_pipe_in_the_files_place_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "plan.yaml")
    signal.alarm(20)
    with pytest.raises(UsageError, match="it is a named pipe"):
        write_plan(PLAN, {"a.weight": (8, 64)}, (), tmp_path / "plan.yaml")
    signal.alarm(0)
