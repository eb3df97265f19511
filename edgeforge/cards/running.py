"""How to run an artifact on each platform, and where its target's artifacts were not run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Final

from exporters.manifest import Manifest

_HERE: Final = Path(__file__).parent

ELSEWHERE: Final[Mapping[str, tuple[str, ...]]] = {
    "onnx": (
        "onnxruntime-genai",
        "Android phones and iPhones",
        "execution providers other than the CPU's",
    ),
    "coreml": ("iPhones and iPads", "the Neural Engine, and where Core ML places operations"),
    "executorch": ("ExecuTorch's LLM runner", "Android phones and iPhones"),
}
"""By target, where `verify` runs no artifact."""
INTERPRETED: Final[Mapping[str, str]] = {"coreml": "Apple's Core ML runtime on a Mac"}
"""By target, the runtime on this kind of machine that EdgeForge's interpreter stands in for."""

# What ExecuTorch's runner is given: its own file where there is one.
_TOKENIZERS: Final = ("executorch_tokenizer.json", "tokenizer.json")


def how_to_run(manifest: Manifest) -> str:
    """Markdown that tells how an app runs an artifact; empty for a target that has no such text."""
    name = manifest.target
    generation = manifest.options.get("opset")
    places = [_HERE / f"run-{name}{end}.md" for end in ([f"-{generation}", ""])]
    path = next((each for each in places if each.is_file()), None)
    if path is None:
        return ""
    begins = 0 if manifest.tokenizer is None else manifest.tokenizer.num_bos
    external = "model.ptd" in manifest.files
    tokenizer = next((name for name in _TOKENIZERS if name in manifest.files), _TOKENIZERS[-1])
    cpp = f'\n    "model.pte", llm::load_tokenizer("{tokenizer}")'
    kotlin = f'LlmModule("model.pte", "{tokenizer}", 0.0f'
    written = path.read_text(encoding="utf-8")
    drafts = _HERE / f"drafts-{name}.md"
    if manifest.draft_positions > 1 and drafts.is_file():
        written += "\n" + drafts.read_text(encoding="utf-8")
    return Template(written).substitute(
        positions=manifest.draft_positions,
        most=manifest.draft_positions - 1,
        num_bos=begins,
        cpp_files=cpp + (', std::vector<std::string>{"model.ptd"}' if external else ""),
        kotlin_open=kotlin + (', "model.ptd")' if external else ")"),
    )
