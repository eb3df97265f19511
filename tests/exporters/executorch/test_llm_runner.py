"""ExecuTorch's own LLM runner, which its Android and iOS packages are built on, gives our text."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import edgeforge.model.model
from edgeforge.export_options import ExportOptions
from edgeforge.generation.generate import generate
from edgeforge.model.model import open_model
from edgeforge.pipeline import export
from edgeforge.synth.synthesise import synthesise
from exporters.options import TargetOptions
from exporters.registry import find_target

PROMPTS = [
    "The function returns a list of",
    'class Error(Exception):\n    """Raised when',
    " ".join(["Install the package with apt and then"] * 30),  # more than one run takes
]
# A process of its own: the runner and the session's libraries register the same kernels.
RUNNER = """
import json, os, sys
import torch
from device_harness.executorch_worker import load_runtime
load_runtime()
from executorch.extension.llm.runner._llm_runner import GenerationConfig, TextLLMRunner
folder, count, *prompts = sys.argv[1:]
weights = [f"{folder}/model.ptd"] if os.path.exists(f"{folder}/model.ptd") else []
runner = TextLLMRunner(f"{folder}/model.pte", f"{folder}/tokenizer.json", *weights)
texts = []
for prompt in prompts:
    runner.reset()
    pieces = []
    config = GenerationConfig(
        echo=False, temperature=0.0, max_new_tokens=int(count), num_bos=1, num_eos=0
    )
    runner.generate(prompt, config, pieces.append)
    texts.append("".join(pieces))
print("RESULT" + json.dumps(texts))
"""


def write_mixture(preset: str, folder: Path) -> Path:
    """Writes a mixture of random weights whose tokens are bytes; it writes printable ones."""
    synthesise(preset, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["max_position_embeddings"] = 2048
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = load_file(folder / "model.safetensors")
    head = "lm_head" if "lm_head.weight" in tensors else "model.embed_tokens"
    for rows in (slice(0, ord(" ")), slice(ord("~") + 1, None)):
        tensors[f"{head}.weight"][rows] = 0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(
    scope="module",
    params=[
        {"weights": "internal"},
        {"weights": "external"},
        {"kv_cache": "int8"},
        {"mixture": "tiny-mixtral", "weights": "external"},
        {"mixture": "tiny-jetmoe"},
    ],
    ids=str,
)
def demo(request, cache, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    asked, out = dict(request.param), folder / "artifact"
    mixture = asked.pop("mixture", "")
    source = write_mixture(mixture, folder / "mixture") if mixture else edgeforge.model.model.DEMO
    model, context = open_model(str(source)), 2048 if mixture else 512
    options = ExportOptions("int4", context=context, target=TargetOptions(**asked))
    export(model, [find_target("executorch")], out, options)
    return out


def test_the_unmodified_runner_gives_the_text_that_run_gives(demo):
    command = [sys.executable, "-c", RUNNER, str(demo), "24", *PROMPTS]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (line,) = [row for row in done.stdout.splitlines() if row.startswith("RESULT")]
    texts = json.loads(line.removeprefix("RESULT"))
    for prompt, text in zip(PROMPTS, texts, strict=True):
        wanted = generate(demo, prompt, max_tokens=24, threads=1)
        assert wanted.text.strip() and len(wanted.tokens) == 24
        assert text == wanted.text
