"""Lines for people: one for each violation."""

from edgeforge.gate.outputs.lines import text_lines


def test_each_violation_is_one_line_with_value_interval_bound_baseline_and_place(failed):
    lines = text_lines(failed)
    assert lines[0].startswith("FAILED  out/onnx (onnx, int4): 2 of 5 checks passed (verified now")
    assert lines[1] == (
        "  VIOLATION  total.kl_mean 0.0362 [0.031, 0.041]; must be at most 0.02 "
        "(rule 1 (target onnx)); baseline 0.018; look at block 3, token 17, "
        "model.layers.2.mlp.down_proj.weight"
    )
    assert lines[2] == (
        "  VIOLATION  total.kl_mean 0.0362, +0.0182 [+0.0171, +0.0195] on the same tokens, where "
        "+0.00018 may be; baseline 0.018"
    )
    assert lines[3].endswith("about 16,000 tokens would settle it")
    assert "allowed  meaning.window  the window is 64" in lines[4]
    assert sum("VIOLATION" in line for line in lines) == len(failed.violations) == 3
    assert "note: a note" in lines


def test_what_passes_is_one_line(sound):
    assert text_lines(sound) == [
        "PASSED  out/onnx (onnx, int4): 1 of 1 checks passed (fresh report, 8,192 tokens of a "
        "text)",
        "held against the targets' own bounds (no policy); 1.2 s",
    ]
