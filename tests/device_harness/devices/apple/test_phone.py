"""An iPhone through unmodified coremltools; Xcode's tools and the runner are fakes: FAKE.md."""

import json
import os
import threading

import numpy as np
import pytest

from device_harness.coreml_session import CoremlSession
from device_harness.device_session import open_on
from device_harness.devices.apple import iphone
from device_harness.devices.apple.compute_plan import read_plan, sections_of
from device_harness.devices.apple.iphone import IosDevice
from device_harness.devices.apple.phone_worker import open_on_phone
from device_harness.devices.apple.remote import BUNDLE, TEAM
from device_harness.devices.apple.report import examine
from device_harness.errors import DeviceError
from device_harness.timed_run import SelfTimed, run_timed
from device_harness.worker import Answers, serve
from exporters.manifest import Manifest

UDID = "00008130-FA4E000000000001"
PROMPT = np.arange(6) * 5 + 1


@pytest.fixture
def session(phone, artifacts):
    opset, opened = phone
    opened.reset()
    return opened, CoremlSession(artifacts[opset], 32)


def test_the_text_is_the_interpreters_and_the_clock_the_phones(session):
    phone, host = session
    assert isinstance(phone, SelfTimed)
    run, expected = phone.run_timed(PROMPT, 3), run_timed(host, PROMPT, 3)
    assert run.tokens == expected.tokens and run.not_finite == 0
    # The fake phone takes 2 ms for each token of a call.
    assert run.first_token_seconds == pytest.approx(0.002 * len(PROMPT))
    assert run.step_seconds == pytest.approx([0.002] * 2)
    # It loads a function in 30 ms, and an app calls two or one.
    assert phone.load_seconds in (pytest.approx(0.03), pytest.approx(0.06))
    # A second text begins anew, whatever the states hold.
    again = phone.run_timed(PROMPT[:4], 2)
    assert again.tokens == run_timed(host, PROMPT[:4], 2).tokens


def test_all_logits_are_the_interpreters(session):
    phone, host = session
    first = phone.extend(PROMPT[:2])
    # The last chunk is padded here and run token by token there, which float16 rounds otherwise.
    np.testing.assert_allclose(phone.logits(PROMPT), host.logits(PROMPT), atol=5e-3)
    np.testing.assert_allclose(first, host.extend(PROMPT[:2]), atol=5e-3)
    # The text of extend is as it was.
    np.testing.assert_allclose(phone.extend(PROMPT[2:3]), host.extend(PROMPT[2:3]), atol=5e-3)
    assert phone.vocab_size == host.vocab_size and phone.peak_bytes == 0
    with pytest.raises(DeviceError, match=r"do not fit the artifact's context of 32"):
        phone.extend(np.ones(40, np.int64))


def test_the_compute_plan_by_operation(phone):
    _, session = phone
    runner, package = session._phone, session._package
    steps = {"compiling", "finding", "building", "installing", "starting"}
    assert set(runner.prepared) == steps
    function = session._step
    plan = read_plan(runner.compute_plan(runner.load(function).key), function)
    (section,) = sections_of(plan, package, function)
    processors = {row[0]: row[1] for row in section.rows}
    assert processors["linear"] == "Neural Engine" and processors["silu"] == "CPU"
    assert sum(row[2] for row in section.rows) == len(plan)
    assert "not in the package" not in processors


def test_a_report_keeps_loading_the_first_call_and_the_others_apart(phone):
    _, session = phone
    found = examine(session._package, session._phone, trials=2)
    assert [each.function for each in found] == list(session._package.functions)
    for each in found:
        assert (each.load_seconds, len(each.trial_seconds)) == (0.03, 2)
        assert {each.warm_up_seconds, *each.trial_seconds} == {0.002 * each.tokens}
        (title,) = each.plan
        assert title == f"Compute plan of {each.function}" and each.plan[title]


def test_what_the_runner_refuses_is_one_sentence(phone):
    runner = phone[1]._phone
    with pytest.raises(DeviceError, match=r"coremltools failed in loading nowhere: .*FAKE"):
        runner.load("nowhere")
    assert runner._folder.is_dir()


def test_what_was_made_for_it_is_removed(artifacts, fake_xcode):
    with open_on_phone(artifacts["ios18"], UDID, {}) as session:
        folder = session._phone._folder
        assert folder.is_dir()
    assert not folder.exists()
    with pytest.raises(DeviceError, match="this session is closed"):
        session.extend(PROMPT)


@pytest.mark.parametrize(
    "result",
    [
        {},
        {"infos": {}},
        {"infos": [1]},
        {"infos": [{"path": {"components": [{"programOperation": {}}]}}]},
        {
            "infos": [
                {
                    "path": {"components": [{"programOperation": {"data": {"outputName": "a"}}}]},
                    "deviceUsage": {"preferred": {"quantum": {}}, "supported": []},
                }
            ]
        },
    ],
)
def test_a_damaged_plan_is_one_sentence(result):
    with pytest.raises(DeviceError, match="compute plan"):
        read_plan(result, "decode")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        (TEAM, "ABC; touch x", "a team is ten letters and digits"),
        (BUNDLE, "a b", "write it like com.example.runner"),
        ("TMPDIR", "{tmp}/a $(b)", "would paste into a shell line: set TMPDIR"),
        ("FAKE_BUNDLE", "x; touch y", "installed an app whose identifier is none"),
    ],
)
def test_nothing_is_pasted_into_a_shell_line(
    name, value, words, artifacts, fake_xcode, tmp_path, monkeypatch
):
    import tempfile

    folder = value.format(tmp=tmp_path)
    if name == "TMPDIR":
        (tmp_path / "a $(b)").mkdir()
        monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv(name, folder)
    with pytest.raises(DeviceError, match=words):
        open_on_phone(artifacts["ios18"], UDID, {})
    commands = fake_xcode / "commands"
    said = commands.read_text() if commands.exists() else ""
    assert "touch" not in said and "$(b)" not in said
    assert "launch" not in said


def test_an_option_or_a_phone_that_is_none_is_refused(artifacts, fake_xcode):
    with pytest.raises(DeviceError, match="there are no compute units quantum"):
        open_on_phone(artifacts["ios18"], UDID, {"compute_units": "quantum"})
    with pytest.raises(DeviceError, match="has no option --precision"):
        open_on_phone(artifacts["ios18"], UDID, {"precision": "fp32"})
    with pytest.raises(DeviceError, match="is not there any more"):
        open_on_phone(artifacts["ios18"], "00000000-0000", {})


def test_the_device_starts_a_worker_of_its_own(artifacts, fake_mac, monkeypatch):
    started = []
    monkeypatch.setattr(iphone, "ProcessChannel", lambda command, _: started.append(command))
    with IosDevice() as device:
        facts = device.facts()
        assert (device.name, facts.model) == (f"ios:{UDID}", "iPhone 15 Pro")
        assert facts.system == "iOS 18.1 (22B83)" and json.dumps(facts.as_json())
        assert device.condition().temperatures == {} and device.limits
        manifest = Manifest.read(artifacts["ios18"])
        device.start(artifacts["ios18"], manifest, ["--options", "{}"])
        assert "device_harness.devices.apple.phone_worker" in started[0]
        assert started[0][started[0].index("--udid") + 1] == UDID


class Threaded:
    """A device whose worker is a thread here, so that it can share a fake phone."""

    limits: tuple[str, ...] = ()

    def __init__(self, session):
        self.name, self.session = f"ios:{UDID}", session

    def start(self, folder, manifest, arguments):
        asked, requests = os.pipe()
        answers, answered = os.pipe()
        self.requests, self.answers = os.fdopen(requests, "wb"), os.fdopen(answers, "rb")

        def work():
            session = self.session
            with os.fdopen(asked, "rb") as incoming, os.fdopen(answered, "wb") as outgoing:
                answers = Answers(outgoing)
                words = {"runtime": session.runtime, "limits": list(session.limits)}
                answers.write({**words, "context": session.context, "peak": session.peak_bytes})
                serve(session, incoming, answers)

        self.thread = threading.Thread(target=work)
        self.thread.start()
        return self

    def wait(self, seconds):
        return 0

    def last_words(self):
        return ""

    def close(self):
        self.requests.close()
        self.thread.join()
        self.answers.close()


def test_a_session_on_the_device_takes_the_phones_own_clock(session, artifacts, phone):
    opened, host = session
    folder = artifacts[phone[0]]
    with open_on(Threaded(opened), folder, Manifest.read(folder)) as there:
        assert there.load()["seconds"] == pytest.approx(opened.load_seconds)
        run = there.timed(PROMPT[:5], 2)
        assert run.tokens == run_timed(host, PROMPT[:5], 2).tokens
        assert run.first_token_seconds == pytest.approx(0.002 * 5)
        assert "by coremltools 9.0's runner" in there.runtime and there.limits == opened.limits
