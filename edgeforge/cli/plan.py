"""The command `plan`."""

from __future__ import annotations

import sys

from edgeforge.cli import export_options
from edgeforge.cli import options as shared
from edgeforge.cli import plan_options as option
from edgeforge.cli.printable import json_text, printable_lines, table_console


def plan(
    model: option.Sized,
    device: option.PlannedDevice,
    context: export_options.Context = None,
    target: option.PlannedTargets = None,
    recipe: option.PlannedRecipes = None,
    os: option.SystemVersion = None,
    memory: option.AppMemory = None,
    kv_cache: export_options.KvCache = None,
    profile: export_options.Profile = None,
    chunk: export_options.Chunk = None,
    opset: export_options.Opset = None,
    exit_layer: export_options.ExitLayer = None,
    adapter: option.PlannedAdapters = None,
    revision: export_options.Revision = None,
    ignore_config: export_options.IgnoreConfig = None,
    json: shared.Json = False,
) -> None:
    """Tell what a model would take on a phone, recipe by recipe; nothing is exported."""
    from edgeforge import api
    from edgeforge.cli.exits import one_line
    from edgeforge.cli.forecast_report import foot_lines, head_lines, target_lines, target_table
    from edgeforge.sizes import parse_size

    found = api.plan(
        model,
        device,
        context=context,
        targets=None if target is None else [name.strip() for name in target.split(",")],
        recipes=recipe or (),
        os=os,
        memory=None if memory is None else parse_size(memory),
        kv_cache=kv_cache,
        profile=profile,
        chunk=chunk,
        opset=opset,
        exit_layer=exit_layer,
        adapters=adapter or (),
        revision=revision,
        ignore_config=ignore_config or (),
    )
    for warning in found.warnings:
        print(one_line(f"warning: {warning}"), file=sys.stderr)
    if json:
        print(json_text(found.to_json()))
        return
    print(printable_lines(head_lines(found)))
    for made in found.targets:
        if made.rows:
            table_console().print(target_table(found, made))
        print(printable_lines(target_lines(made)))
    print(printable_lines(foot_lines(found)))
