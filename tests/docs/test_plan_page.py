"""The page about plans: its example is what the command prints, its tables are the profiles'."""

import json
import re
import sys
from pathlib import Path

import pytest

from edgeforge.cli import entry as cli
from edgeforge.forecast.profiles import Figure, Phone, load_profiles
from edgeforge.synth.synthesise import PRESETS

PAGE = (Path(__file__).parents[2] / "docs" / "plan.md").read_text("utf-8")
PROFILES = load_profiles()


def test_the_example_is_what_the_command_prints(tmp_path, monkeypatch, capfd):
    (block,) = re.findall(r"```console\n\$ edgeforge (plan meta-llama.*?)```", PAGE, re.DOTALL)
    command, *shown = block.splitlines()
    folder = tmp_path / "meta-llama" / "Llama-3.2-1B"
    folder.mkdir(parents=True)
    config = PRESETS["llama-3.2-1b"].config_json("bfloat16")
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["edgeforge", *command.split()])
    cli.main()
    printed = iter([line.rstrip() for line in "".join(capfd.readouterr()[::-1]).splitlines()])
    for line in shown:
        if line != "...":
            assert line in printed, f"the command does not print, in this order: {line!r}"


def cell(figure: Figure | None) -> str:
    if figure is None:
        return "not found"
    value = figure.value if isinstance(figure.value, str) else f"{figure.value:g}"
    return f"{value} ({', '.join(figure.sources)})"


def limit_cell(phone: Phone) -> str:
    return (
        "; ".join(
            f"{limit.nbytes / 1e9:g}{' entitled' if limit.entitlement else ''} since {limit.since}"
            f"{f' until {limit.until}' if limit.until else ''} ({', '.join(limit.sources)})"
            for limit in phone.limits
        )
        or "none before Android 17 (android-17)"
    )


def tables() -> dict[str, list[str]]:
    """The rows that the page must have."""
    phones = [
        f"| `{phone.name}` | {cell(phone.soc)} | {cell(phone.memory)} | {cell(phone.bandwidth)} | "
        f"{cell(phone.npu)} | {limit_cell(phone)} |"
        for phone in PROFILES.phones.values()
    ]
    measured = [
        f"| `{each.phone}` | {each.model}, {each.weights} | {each.runtime} | {each.decode:g} | "
        f"{each.read_bytes / 1e9:.2f} GB: {each.read_from} | {share(each):.0%} | "
        f"{', '.join(each.sources)} |"
        for each in PROFILES.published
    ]
    sources = []
    for key, source in PROFILES.sources.items():
        title = source.title if source.url is None else f"[{source.title}]({source.url})"
        sources.append(f"| {key} | {source.kind} | {title} |")
    return {"phones": phones, "measured": measured, "sources": sources}


def share(each) -> float:
    bandwidth = PROFILES.phones[each.phone].bandwidth.number * 1e9
    return each.decode * each.read_bytes / bandwidth


@pytest.mark.parametrize("name", ["phones", "measured", "sources"])
def test_the_tables_are_the_profiles(name):
    part = PAGE.partition(f"<!-- begin {name} -->")[2].partition(f"<!-- end {name} -->")[0]
    rows = [line for line in part.splitlines() if line.startswith("|")][2:]
    assert rows == tables()[name]
