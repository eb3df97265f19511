"""Inner blocks: what they keep, and who sees inside."""

from __future__ import annotations

import torch

from device_harness.coreml_interpreter.limits import Limits, limited, spent
from device_harness.coreml_interpreter.ops.control_flow import cond
from device_harness.coreml_interpreter.steps import InnerBlock, Program, Result, Step, run_program


def step(run, slot: int, dynamic=(), **fixed) -> Step:
    result = Result(slot, torch.float32, False, None)
    return Step(run, fixed, list(dynamic), [result], (), False, f"in step {slot}", False)


def two_branches() -> tuple[Program, list[Step]]:
    """Slot 0 is the condition, 1 the result; 2 and 3 are the first block's, 4 the second's."""
    program = Program(initial=[None] * 5)
    large = step(lambda: torch.ones(1 << 20), 2)
    total = step(lambda x: x.sum().reshape(1), 3, [("x", 2, None)])
    other = step(lambda: torch.zeros(1), 4)
    blocks = [
        InnerBlock(program, [large, total], [], [3]),
        InnerBlock(program, [other], [], [4]),
    ]
    program.steps = [step(cond, 1, [("pred", 0, bool)], blocks=blocks)]
    return program, [large, total, other]


def test_a_block_keeps_nothing_and_only_the_chosen_one_runs():
    program, (large, total, other) = two_branches()
    for chosen, ran, result in ((True, [large, total], 1 << 20), (False, [other], 0)):
        seen: list[Step] = []
        slots = [torch.tensor(chosen), None, None, None, None]
        with limited(Limits()):
            run_program(program, slots, lambda each, given, made, seen=seen: seen.append(each))
            # 4 MiB were held while the block ran.
            assert spent()._held < 1 << 10
        assert seen == [*ran, program.steps[0]]
        assert slots[1].item() == result and slots[2:] == [None] * 3
