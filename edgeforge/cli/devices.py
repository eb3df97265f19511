"""The commands of `edgeforge devices`: what is reachable, set-up, counts, and own programs."""

from __future__ import annotations

from dataclasses import asdict

import typer

from edgeforge.cli import device_options as option
from edgeforge.cli import options as shared
from edgeforge.cli.printable import json_text, printable, printable_lines
from edgeforge.cli.runner import runner

devices = typer.Typer(
    help="List where artifacts can run, and what is missing for the rest; nothing is started.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    suggest_commands=False,
)

devices.command()(runner)


@devices.callback(invoke_without_command=True)
def list_devices(context: typer.Context, json: shared.Json = False) -> None:
    """List where artifacts can run, and what is missing for the rest; nothing is started."""
    if context.invoked_subcommand is not None:
        return
    from device_harness.devices.registry import find_devices

    found = find_devices()
    if json:
        print(json_text([asdict(each) for each in found]))
        return
    width = max(len(printable(each.name)) for each in found)
    for each in found:
        state = "ready" if each.ready else "not reachable"
        print(printable(f"{each.name:<{width}}  {state}: {each.what}"))
        if cure := each.cure.rstrip("."):  # in messages a cure is the end of a sentence
            print(printable(f"{'':<{width}}  {cure[:1].upper()}{cure[1:]}."))


@devices.command()
def setup(
    device: option.SetUpDevice,
    executorch: option.SetUpExecutorch = False,
    quiet: shared.Quiet = False,
) -> None:
    """Set up what a device needs on this machine, once: downloads, checked by digest."""
    from edgeforge.cli.progress import Reporter
    from edgeforge.errors import UsageError

    if device != "arm64":
        raise UsageError(f"there is nothing to set up for {device!r}: only arm64 has a set-up")
    from device_harness.devices.arm64.setup import set_up

    with Reporter(quiet) as progress:
        root = set_up(progress, executorch)
    for name, version in root.replaced.items():
        print(printable(f"{name}: Debian replaced the pinned version, and {version} was taken"))
    print(printable(str(root.folder)))


@devices.command()
def instructions(
    folders: option.Counted,
    device: option.CountingDevice = "arm64:cortex-a76",
    prompt: option.CountedPrompt = 16,
    output: option.CountedOutput = 24,
    kleidiai: option.CountedKleidiai = None,
    json: shared.Json = False,
    quiet: shared.Quiet = False,
) -> None:
    """Count the instructions of artifacts on an emulated core: a cost to compare, no latency."""
    from device_harness.devices.arm64.instructions import count_instructions
    from device_harness.devices.registry import kind_of
    from device_harness.registry import taken_options
    from edgeforge.cli.instruction_table import instruction_lines
    from edgeforge.cli.progress import Reporter
    from edgeforge.errors import UsageError
    from edgeforge.verification.artifacts import find_artifacts
    from exporters.manifest import Manifest

    if kind_of(device) != "arm64":
        raise UsageError(f"instructions are counted on emulated cores, and {device} is none")
    if kleidiai not in (None, "on", "off"):
        raise UsageError(f"--kleidiai is {kleidiai!r} here: give on or off")
    artifacts = find_artifacts(folders)
    core, found = device.partition(":")[2], []
    with Reporter(quiet) as progress:
        for at, artifact in enumerate(artifacts):
            progress("counting instructions", at, len(artifacts))
            options = taken_options(Manifest.read(artifact).target, {"kleidiai": kleidiai})
            found.append(count_instructions(artifact, prompt, output, core, options))
        progress("counting instructions", len(artifacts), len(artifacts))
    names = [str(artifact) for artifact in artifacts]
    if json:
        rows = [{"artifact": name, **asdict(each)} for name, each in zip(names, found, strict=True)]
        print(json_text(rows))
    else:
        print(printable_lines(instruction_lines(names, found)))
