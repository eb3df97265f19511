"""The protocol: what is run when, what counts, and what is kept."""

from __future__ import annotations

from dataclasses import replace

import pytest

from device_harness.devices.device import Condition
from device_harness.measuring.protocol import measure_point
from device_harness.timed_run import TimedRun


def outcomes(cell):
    return [(run.start, run.outcome) for run in cell.runs]


def test_a_fresh_process_runs_cold_then_warms_up_then_counts(site, play):
    one = play("a", [0.5, 0.2, *[0.1] * 3])
    (cell,) = measure_point(site(runs=3), [one.arm()], 8, 5).cells
    assert outcomes(cell) == [("cold", "counted"), ("warm", "warm-up"), *[("warm", "counted")] * 3]
    assert len(one.opened) == 1 and not one.opened[0].is_open
    cold = cell.cold
    assert (cold.load_seconds, cold.first_token_seconds) == (0.5, 1.0)
    assert [run.load_seconds for run in cell.runs[1:]] == [None] * 4
    # The slow cold run and the warm-up are in no median.
    assert cell.summary("decode").largest == cell.summary("decode").smallest == 10.0
    assert cell.summary("prefill").median == 8 / 0.2
    assert cell.summary("first_token").median == pytest.approx(0.2)
    assert (cell.runtime, cell.notes, cell.peak_bytes) == (
        "played runtime 1.0 (1 thread)",
        ("It is played.",),
        1000,
    )


@pytest.mark.parametrize(
    ("installed", "start"), [(True, "first-ever"), (False, "cold"), (None, "cold")]
)
def test_the_first_run_after_installing_is_apart(site, play, installed, start):
    arm = play("a", [0.1] * 9).arm(was_installed=lambda: installed)
    (cell,) = measure_point(site(runs=2), [arm], 4, 3).cells
    assert cell.cold.start == start


def test_arms_take_turns_and_nobody_is_always_second(site, play, log):
    arms = [play(name, [0.1] * 9).arm() for name in "abc"]
    measure_point(site(runs=4, warm_up=0), arms, 4, 3)
    assert "".join(log) == "abc" + "abc" + "cba" + "abc" + "cba"


def test_ratios_are_of_pairs_of_one_round(site, play):
    # The device slows down all the time; in each round b takes half of a's time.
    slower = [0.1, 0.12, 0.15, 0.2, 0.3, 0.5]
    a, b = play("a", [1, 1, *slower]), play("b", [1, 1, *(each / 2 for each in slower)])
    turns = measure_point(site(runs=6), [a.arm(), b.arm()], 8, 5)
    found = {ratio.figure: ratio for ratio in turns.ratios}
    assert found.keys() == {"prefill", "decode"}
    for ratio in found.values():
        assert (ratio.value, ratio.low, ratio.high) == pytest.approx((2, 2, 2))
        assert (ratio.of_folder, ratio.against_folder, ratio.pairs) == ("b", "a", 6)
    assert not turns.cells[0].summary("decode").is_reliable


def test_a_failed_run_stays_and_its_arm_begins_again(site, play):
    one = play("a", [0.5, 0.2, 0.1, "the phone was unplugged", 0.4, 0.3, 0.1, 0.1])
    two = play("b", [0.5, 0.2, *[0.1] * 9])
    turns = measure_point(site(runs=4), [one.arm(), two.arm()], 8, 5)
    cell = turns.cells[0]
    assert outcomes(cell) == [
        ("cold", "counted"),
        ("warm", "warm-up"),
        ("warm", "counted"),
        ("warm", "failed"),
        ("cold", "counted"),
        ("warm", "warm-up"),
        ("warm", "counted"),
        ("warm", "counted"),
    ]
    assert cell.runs[3].reason == "the phone was unplugged"
    assert len(one.opened) == 2 and not any(each.is_open for each in one.opened)
    assert cell.summary("decode").count == 3 and not cell.failed
    assert {ratio.pairs for ratio in turns.ratios} == {3}


def test_after_two_failures_in_a_row_the_others_go_on(site, play):
    one = play("a", [0.1, 0.1, 0.1, "it crashed", "it crashed again"])
    two = play("b", [0.1] * 9)
    first, second = measure_point(site(runs=5), [one.arm(), two.arm()], 8, 5).cells
    assert first.failed == "2 runs in a row failed, the last because it crashed again"
    assert len(first.counted) == 1 and len(second.counted) == 5 and not second.failed


def test_a_device_that_opens_nothing_is_asked_twice(site, play):
    one = play("a", [])
    one.refuses = "no space left on the phone"
    (cell,) = measure_point(site(runs=5), [one.arm()], 8, 5).cells
    assert outcomes(cell) == [("cold", "failed")] * 2
    assert "no space left on the phone" in cell.failed
    assert cell.summary("decode") is None


def test_a_run_of_a_slowed_clock_is_excluded_and_kept(site, play):
    fine = Condition(0, clock_limits={"cpu4": 2_800_000_000})
    slow = Condition(0, clock_limits={"cpu4": 1_400_000_000})
    # Looks: before the cold run and after it, then before and after each warm one.
    where = site([fine, fine, fine, fine, fine, slow, fine, fine], runs=3, warm_up=0)
    (cell,) = measure_point(where, [play("a", [0.1] * 4).arm()], 8, 5).cells
    assert [run.outcome for run in cell.runs] == ["counted", "counted", "excluded", "counted"]
    run = cell.runs[2]
    assert "cpu4 was limited to 1.40 GHz, 50 % below the 2.80 GHz" in run.reason
    assert run.after["clock_limits"] == {"cpu4": 1_400_000_000}
    assert cell.summary("decode").count == 2


def test_a_run_of_a_device_that_stays_warm_is_excluded(site, play, clock):
    where = site([Condition(0, thermal_status=2)], runs=2, longest_wait=100)
    (cell,) = measure_point(where, [play("a", [0.1] * 4).arm()], 8, 5).cells
    warm = [run for run in cell.runs if run.outcome == "excluded"]
    assert [run.cool for run in warm] == ["not cool"] * 3
    assert {run.reason for run in warm} == {"the device was not cool after 100 s of waiting"}
    assert cell.failed.startswith("no run counts: the device was not cool")


def test_unknown_is_not_cool_and_does_not_exclude(site, play):
    (cell,) = measure_point(site(runs=2), [play("a", [0.1] * 4).arm()], 8, 5).cells
    assert {run.cool for run in cell.counted} == {"unknown"}
    assert len(cell.counted) == 2


def test_numbers_that_are_none_end_an_arm_at_once(site, play):
    bad = TimedRun(8, 0.1, (0.1,) * 4, (7,) * 5, 1000, not_finite=5, where="first in layer 3")
    (cell,) = measure_point(site(runs=3), [play("a", [0.1, bad]).arm()], 8, 5).cells
    assert cell.text.is_not_finite and "NaN or infinite logits in 5 calls" in cell.failed
    assert "first in layer 3" in cell.failed
    assert cell.summary("decode") is None


def test_processes_end_when_somebody_interrupts(site, play):
    one, two = play("a", [0.1] * 9), play("b", [0.1] * 9)

    def tell(done, of):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_point(site(runs=5), [one.arm(), two.arm()], 8, 5, tell)
    assert not any(each.is_open for each in (*one.opened, *two.opened))


def test_a_silent_fall_back_is_named(site, play):
    arm = play("a", [0.1] * 9).arm()
    arm = replace(arm, artifact=replace(arm.artifact, options={"backend": "vulkan"}))
    (cell,) = measure_point(site(runs=1), [arm], 8, 5).cells
    assert cell.processor == "CPU"
    assert cell.notes[0] == (
        "a: it was to run on GPU (backend vulkan) and ran on CPU: the runtime fell back"
    )
