"""Continues a text with a .pte in ExecuTorch's own LLM runner, and prints it as it comes.

    python examples/executorch_runner.py out/demo/executorch --prompt "The function returns"

The runner is the C++ code that ExecuTorch's Android and iOS packages are built on, here through
the Python binding in its wheel. It reads ``model.pte`` and ``tokenizer.json``, and keeps the
tokenizer, the caches and the sampling itself. EdgeForge is not imported.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# ExecuTorch's package of the runner imports transformers, and does not ask pip for it.
INSTALL = 'pip install "edgeforge[executorch]" transformers'
KERNELS = (
    "kernels/quantized/libquantized_ops_aot_lib.*",
    "extension/llm/custom_ops/libcustom_ops_aot_lib.*",
)


def read_manifest(folder: Path) -> dict[str, Any]:
    """What the artifact says of itself."""
    path = folder / "edgeforge.json"
    if not path.is_file():
        sys.exit(f"{folder} is no EdgeForge artifact: it has no edgeforge.json")
    manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if manifest["target"] != "executorch":
        sys.exit(f"{folder} is an artifact for {manifest['target']}; this script runs executorch")
    if not (folder / "tokenizer.json").is_file():
        sys.exit(f"{folder} has no tokenizer.json, so a prompt cannot become tokens")
    return manifest


def import_runner() -> Any:
    """ExecuTorch's runner, with the kernels registered that programs call beside XNNPACK's.

    They are attention with caches and lookups in quantized embeddings; an app links the same.
    """
    try:
        import executorch
        import torch
        from executorch.extension.llm import runner
        from executorch.extension.pybindings import _portable_lib  # noqa: F401
    except ModuleNotFoundError as missing:
        sys.exit(f"{missing.name} is not installed: {INSTALL}")
    # executorch.extension.llm.custom_ops would load the same libraries, but imports the whole
    # exporter first, which takes several seconds.
    root = Path(next(iter(executorch.__path__)))
    for library in KERNELS:
        torch.ops.load_library(next(root.glob(library)))  # type: ignore[no-untyped-call]
    return runner


def generate(
    folder: Path, prompt: str, limit: int, bos_count: int, emit: Callable[[str], object]
) -> None:
    """Continues a prompt with the likeliest tokens, and gives each as text."""
    runner = import_runner()
    weights = folder / "model.ptd"  # there with --weights external
    files = [folder / "model.pte", folder / "tokenizer.json"]
    files += [weights] if weights.is_file() else []
    config = runner.GenerationConfig(
        echo=False, temperature=0.0, max_new_tokens=limit, num_bos=bos_count, num_eos=0
    )
    runner.TextLLMRunner(*map(str, files)).generate(prompt, config, emit)


def run(folder: Path, prompt: str, limit: int) -> None:
    """Prints how the prompt goes on."""
    manifest = read_manifest(folder)
    # The runner's tokenizer adds what it puts around a text only when it is told to.
    bos_count = manifest["tokenizer"]["num_bos"]
    # The runner also prints the text and its statistics itself; stdout is kept for ours. Its log
    # goes to stderr.
    text = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        generate(
            folder,
            prompt,
            limit,
            bos_count,
            lambda piece: print(piece, end="", file=text, flush=True),
        )
    except RuntimeError as error:
        sys.exit(f"ExecuTorch cannot run {folder}: {error}; its log above says why")
    print(file=text, flush=True)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="an artifact of target executorch")
    parser.add_argument("--prompt", required=True, help="the text to continue")
    parser.add_argument("--max-tokens", type=int, default=48, help="how many to add at most")
    options = parser.parse_args()
    run(options.folder, options.prompt, options.max_tokens)


if __name__ == "__main__":
    main()
