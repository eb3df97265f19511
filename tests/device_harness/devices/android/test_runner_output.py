"""Figures of other runners, in the forms that these print.

The line of ExecuTorch's runner follows its stats.h, and the tables are of llama-bench's own README.
"""

from __future__ import annotations

import json
import random
import time

import pytest

from device_harness.devices.android.runner_output import EXECUTORCH, LLAMA_BENCH, read_figures

OBSERVED = {
    "prompt_tokens": 5,
    "generated_tokens": 122,
    "model_load_start_ms": 1753000000000,
    "model_load_end_ms": 1753000001500,
    "inference_start_ms": 1753000001501,
    "inference_end_ms": 1753000005601,
    "prompt_eval_end_ms": 1753000001601,
    "first_token_ms": 1753000001611,
    "aggregate_sampling_time_ms": 250,
    "SCALING_FACTOR_UNITS_PER_SECOND": 1000,
}
ROWS = [
    {
        "build_commit": "8cf427ff",
        "backends": "CPU",
        "model_type": "qwen2 7B Q4_K - Medium",
        "n_threads": 8,
        "n_prompt": 512,
        "n_gen": 0,
        "n_depth": 0,
        "avg_ts": 7100.002165,
        "stddev_ts": 140.34152,
        "samples_ts": [6863.1, 7147.55],
    },
    {"n_prompt": 0, "n_gen": 128, "avg_ts": 118.881588, "stddev_ts": 1.04, "samples_ts": [119.03]},
    {"n_prompt": 64, "n_gen": 16, "avg_ts": 200.5},
]


def observed(**changed):
    return f"text it generated\nPyTorchObserver {json.dumps(OBSERVED | changed)}\n"


def test_executorchs_runner():
    (found,) = read_figures(observed())
    assert found.source == EXECUTORCH
    assert (found.prompt_tokens, found.output_tokens) == (5, 122)
    assert found.load_seconds == 1.5 and found.first_token_seconds == pytest.approx(0.11)
    assert found.prefill_tokens_per_second == pytest.approx(5 / 0.1)
    assert found.decode_tokens_per_second == pytest.approx(122 / 4.0)
    assert found.more == {"sampling_seconds": "0.25"}
    assert len(read_figures(observed() + observed())) == 2


@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_llama_bench_as_json(form):
    text = json.dumps(ROWS, indent=2) if form == "json" else "\n".join(map(json.dumps, ROWS))
    prompt, output, both = read_figures(f"ggml_cpu_init: [1]\n{text}\n")
    assert prompt.source == LLAMA_BENCH and prompt.model == "qwen2 7B Q4_K - Medium"
    assert (prompt.prompt_tokens, prompt.output_tokens) == (512, None)
    assert prompt.prefill_tokens_per_second == 7100.002165 and prompt.spread == 140.34152
    assert prompt.decode_tokens_per_second is None and prompt.samples == (6863.1, 7147.55)
    assert prompt.more["n_threads"] == "8" and prompt.more["build_commit"] == "8cf427ff"
    assert output.decode_tokens_per_second == 118.881588 and output.output_tokens == 128
    # The rate of a prompt with generation is of neither.
    assert both.prefill_tokens_per_second is None and both.decode_tokens_per_second is None
    assert both.more == {"tokens_per_second_of_both": "200.5"}


def test_llama_bench_as_csv():
    text = (
        "build_commit,build_number,backends,model_type,n_threads,n_prompt,n_gen,n_depth,avg_ts,"
        'stddev_ts\n"8cf427ff","5163","CPU","qwen2 7B, Q4_K","8","512","0","0","7285.67","100.06"\n'
        '"8cf427ff","5163","CPU","qwen2 7B, Q4_K","8","0","128","0","119.91","0.43"\n'
    )
    prompt, output = read_figures(text)
    assert prompt.prefill_tokens_per_second == 7285.67 and prompt.model == "qwen2 7B, Q4_K"
    assert output.decode_tokens_per_second == 119.91 and output.spread == 0.43


def test_llama_bench_as_it_prints_by_default():
    text = """
| model                          |       size |     params | backend    | threads | test          |                  t/s |
| ------------------------------ | ---------: | ---------: | ---------- | ------: | ------------: | -------------------: |
| llama 7B mostly Q4_0           |   3.56 GiB |     6.74 B | CPU        |       4 | pp 64         |         23.18 ± 0.06 |
| llama 7B mostly Q4_0           |   3.56 GiB |     6.74 B | CPU        |       4 | tg128 @ d512  |        116.71 ± 0.60 |
| llama 7B mostly Q4_0           |   3.56 GiB |     6.74 B | CPU        |       4 | pp64+tg16     |                 9.50 |

build: 8cf427ff (5163)
"""  # noqa: E501
    prompt, output, both = read_figures(text)
    assert prompt.prefill_tokens_per_second == 23.18 and prompt.spread == 0.06
    assert prompt.more == {"backends": "CPU", "n_threads": "4", "n_depth": "0"}
    assert output.decode_tokens_per_second == 116.71 and output.more["n_depth"] == "512"
    assert (both.prompt_tokens, both.output_tokens) == (64, 16)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no figures",
        "PyTorchObserver {",
        "PyTorchObserver {}",
        'PyTorchObserver {"prompt_tokens": 1e999}',
        observed(SCALING_FACTOR_UNITS_PER_SECOND=0),
        observed(inference_end_ms=None),
        observed(model_load_end_ms="NaN"),
        "[" * 100_000,
        json.dumps([{"n_prompt": 512, "n_gen": 0, "avg_ts": "inf"}]),
        json.dumps([{"n_prompt": -1, "n_gen": 0, "avg_ts": 5}]),
        json.dumps([{"n_prompt": 0, "n_gen": 0, "avg_ts": 5}]),
        json.dumps([{"n_prompt": 1.5, "n_gen": 0, "avg_ts": 5}]),
        json.dumps([{"n_prompt": True, "n_gen": 0, "avg_ts": 5}]),
        json.dumps([{"n_prompt": 1, "n_gen": 0, "avg_ts": 1e300}]),
        "build_commit,n_prompt,n_gen,avg_ts\n1,2\n",
        "| test | t/s |\n| pp9999999999999 | 1 |\n| pp1 | 1.2.3 |\n",
    ],
)
def test_what_is_no_measurement_is_left_out(text):
    assert read_figures(text) == []


def test_times_that_run_backwards_give_no_speed():
    (found,) = read_figures(observed(inference_end_ms=1753000001000, first_token_ms=0))
    assert found.decode_tokens_per_second is None and found.first_token_seconds is None


@pytest.mark.parametrize("seed", range(4))
def test_no_text_makes_the_readers_fail_or_slow(seed):
    chosen = random.Random(seed)
    words = ["PyTorchObserver {", '"n_gen":', "|", " t/s ", " test ", "\n", "[", "{", "}", "9", '"']
    text = "".join(chosen.choice(words) for _ in range(300_000))
    started = time.monotonic()
    read_figures(text)
    assert time.monotonic() - started < 20


def test_noise_in_front_and_behind_and_escape_codes_are_passed_over():
    noise = "\x1b[31m" + "x" * 1000 + "\x00\n"
    (found,) = read_figures((noise + observed() + noise).encode() + b"\xff\xfe")
    assert found.output_tokens == 122
