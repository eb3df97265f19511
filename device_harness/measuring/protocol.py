"""The protocol: fresh processes, warm-up, cool-down, and arms that take turns.

It knows no kind of device. A cell of one artifact is an A/B with one arm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from device_harness.measuring.bench import ArmRatio
from device_harness.measuring.lane import Arm, Lane, Site
from device_harness.measuring.record import Cell, Figure
from device_harness.measuring.statistics import paired_ratio
from device_harness.measuring.sustained import sustain

Tell = Callable[[int, int], None]
"""Is told how many runs are done, and of how many."""
_RATIOS: Final[tuple[Figure, ...]] = ("prefill", "decode")


@dataclass(frozen=True)
class Turns:
    """What some arms gave at one point of the grid.

    Attributes:
        cells: one for each arm, in order; their texts are not checked yet.
        ratios: of the others to the first.
    """

    cells: tuple[Cell, ...]
    ratios: tuple[ArmRatio, ...]


def measure_point(
    site: Site, arms: Sequence[Arm], prompt: int, output: int, tell: Tell = lambda done, of: None
) -> Turns:
    """Measures arms at one length of prompt and of output, run by run in turns.

    Each arm has a process of its own for all of its runs: a cold run, warm-up, and the runs that
    count. Of these one arm runs first in one round and last in the next, as who runs second finds
    a warmer device. A run that fails is kept, and its arm begins again in a fresh process; after
    two failures in a row the others go on without it.

    Args:
        site: where.
        arms: what; ratios are to the first.
        prompt: tokens of the prompt.
        output: tokens to generate.
        tell: is told of each round.
    """
    lanes = [Lane(site, arm, prompt, output) for arm in arms]
    try:
        for lane in lanes:
            lane.begin()
        rounds = site.rules.runs
        for number in range(rounds):
            tell(number, rounds)
            for lane in lanes if number % 2 == 0 else reversed(lanes):
                lane.run_round(number)
        if site.rules.minutes:
            for lane in lanes:
                points = sustain(lane, tell)  # a failure in it changes the cell, too
                lane.cell = replace(lane.cell, sustained=points)
        tell(rounds, rounds)
    finally:
        for lane in lanes:
            lane.close()
    first, *others = lanes
    ratios = [found for lane in others for found in arm_ratios(lane, first)]
    return Turns(tuple(lane.cell for lane in lanes), tuple(ratios))


def arm_ratios(lane: Lane, first: Lane) -> list[ArmRatio]:
    """The ratios of one arm to the first, by rounds in which both runs count."""
    found = []
    for figure in _RATIOS:
        pairs = []
        for number in lane.rounds.keys() & first.rounds.keys():
            own, other = lane.rounds[number], first.rounds[number]
            if own.outcome != "counted" or other.outcome != "counted":
                continue
            one, two = (run.figure(figure, lane.cell.prompt) for run in (own, other))
            if one is not None and two is not None:
                pairs.append((one, two))
        ratio = paired_ratio(pairs)
        if ratio is not None:
            found.append(
                ArmRatio(
                    figure=figure,
                    device=lane.site.name,
                    prompt=lane.cell.prompt,
                    output=lane.cell.output,
                    of=lane.cell.artifact.manifest,
                    of_folder=lane.cell.artifact.folder,
                    against=first.cell.artifact.manifest,
                    against_folder=first.cell.artifact.folder,
                    value=ratio.value,
                    low=ratio.low,
                    high=ratio.high,
                    pairs=ratio.pairs,
                )
            )
    return found
