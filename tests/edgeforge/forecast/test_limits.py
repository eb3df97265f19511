"""What an app gets, by the version of the system."""

import pytest

from edgeforge.errors import UsageError
from edgeforge.forecast.limits import AppMemory, app_memory, parse_version
from edgeforge.forecast.profiles import load_profiles

PHONES = load_profiles().phones
GB = 10**9


def limits(phone, version=None, memory=None):
    found = app_memory(PHONES[phone], version, memory)
    return found.plain, found.entitled, " | ".join(found.warnings)


def test_the_limit_follows_the_release():
    assert limits("iphone-15-pro", "26.3")[:2] == (3 * GB, 6 * GB)
    assert limits("iphone-15-pro", "26.3.2")[:2] == (3 * GB, 6 * GB)
    assert limits("iphone-15-pro", "26.4")[:2] == (3 * GB, None)
    assert limits("iphone-15-pro") == limits("iphone-15-pro", "26.4")
    assert limits("iphone-14", "16.5")[:2] == (2_870_000_000, None)
    assert limits("iphone-14", "26")[:2] == (3_120_000_000, 4_200_000_000)


@pytest.mark.parametrize(
    ("phone", "version", "used"),
    [
        ("iphone-15-pro", "27", "26.4"),  # newer than any that is known
        ("iphone-15-pro", "17.2", "18"),  # older
        ("iphone-14", "18", "16"),  # between two
    ],
)
def test_a_version_without_a_limit_takes_a_near_one_and_says_so(phone, version, used):
    found = app_memory(PHONES[phone], version, None)
    title = PHONES[phone].title
    assert found.warnings[0] == (
        f"no limit is known for iOS {version} on {title}, and limits change with releases: the one "
        f"of iOS {used} is used; pass another as --memory"
    )
    assert found.told.startswith(f"iOS {used} gives an app ")
    assert (found.plain, found.entitled) == limits(phone, used)[:2]


def test_known_versions_have_no_such_warning():
    for phone, version in (("iphone-15-pro", "26.4.1"), ("iphone-14", "16"), ("iphone-14", "26")):
        assert "no limit is known" not in limits(phone, version)[2]


def test_a_phone_whose_limit_is_known_only_with_the_entitlement():
    plain, entitled, warnings = limits("iphone-17-pro")
    assert (plain, entitled) == (None, 6 * GB)
    assert "iPhone 17 Pro: the limit without the entitlement is not known" in warnings


def test_android_has_no_fixed_limit_before_17():
    plain, entitled, warnings = limits("galaxy-s24", "16")
    assert (plain, entitled) == (4 * GB, None)
    assert "MemAvailable" in warnings and "memory-limiter-config.xml" not in warnings
    newer = limits("galaxy-s24", "17")[2]
    assert "memory-limiter-config.xml" in newer and "MemAvailable" not in newer
    either = limits("galaxy-s24")[2]
    assert "memory-limiter-config.xml" in either and "MemAvailable" in either


def test_what_the_user_states_replaces_the_limit():
    assert limits("galaxy-s24", "17", memory=5 * GB) == (5 * GB, None, "")
    assert limits("iphone-15-pro", memory=5 * GB) == (5 * GB, None, "")


@pytest.mark.parametrize("text", ["", "abc", "26.", "26.4.1.1", "-1", "1e3", "9999"])
def test_a_version_is_numbers(text):
    with pytest.raises(UsageError, match=r"is not a version: write it like 18 or 26\.4"):
        parse_version(text)
    with pytest.raises(UsageError):
        app_memory(PHONES["galaxy-s24"], text, 5 * GB)


def test_verdicts_leave_a_fifth():
    app = AppMemory(1000, 2000, "")
    given = {800: "yes", 801: "entitled", 1600: "entitled", 1601: "tight", 2000: "tight"}
    assert {total: app.verdict(total) for total in given} == given
    assert app.verdict(2001) == "no" and app.largest == 1600
    alone = AppMemory(1000, None, "")
    assert [alone.verdict(total) for total in (800, 1000, 1001)] == ["yes", "tight", "no"]
