"""Exports the shape of Mixtral-8x7B (46.7 billion parameters) whole, on a small machine.

The checkpoint is a ``pytorch_model.bin`` whose tensors are views of one storage: random numbers of
true magnitude that take 0.3 GB on disk. Store and artifact are written whole, 53 GB together with
`--layers 32`. What does not fit in memory cannot be run here: digests of all weights, the meaning
of the graphs and the streamed references are checked instead. All folders are removed at the end.
"""

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path

import torch
from measured_process import edgeforge, folder_bytes, high_water_mark, pin, run, say, work_folder
from pages import add_page_option, markdown, write_block

HIDDEN, WIDTH, EXPERTS, VOCABULARY = 4096, 14336, 8, 32000
KEYS = HIDDEN // 4  # 8 of 32 heads
REFERENCE_TOKENS = 256
TITLES = ["stage", "seconds", "peak memory, MB", "result"]
ABOUT = (
    "The shape of Mixtral-8x7B, exported by `edgeforge export --target onnx --recipe int4`. Each "
    "stage runs in a process of its own. Peak memory is that of resident pages, those of mapped "
    "files too."
)


def main() -> None:
    """Reads the arguments, exports, checks, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32, help="Mixtral-8x7B has 32")
    parser.add_argument("--target", default="onnx", choices=["onnx", "coreml", "executorch"])
    parser.add_argument("--context", type=int, default=512, help="tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workdir", type=Path, help="where the folders are made and removed")
    parser.add_argument("--references", nargs=2, type=Path, help=argparse.SUPPRESS)
    add_page_option(parser)
    options = parser.parse_args()
    pin(options.threads)
    if options.references:
        check(*options.references)
        return
    with work_folder(options.workdir, "huge-mixture-") as root:
        rows = measure(root, options)
    print(*markdown(rows), sep="\n")
    if options.page:
        write_block(options.page, rows, ABOUT)


def measure(root: Path, options: argparse.Namespace) -> list[list[str]]:
    """Returns the table's rows; nothing of the work is left."""
    model, out = root / "model", root / "artifact"
    os.environ["EDGEFORGE_CACHE"] = str(root / "cache")
    try:
        parameters = write_source(model, options.layers)
        needed = parameters * 9 // 8  # 4.5 bits in the store, and again in the artifact
        free = shutil.disk_usage(root).free
        if free < needed * 1.05:
            raise SystemExit(
                f"{root} has {free / 1e9:.0f} GB free and {needed / 1e9:.0f} GB are needed: give "
                f"fewer --layers"
            )
        say(f"{parameters / 1e9:.1f} billion parameters in {folder_bytes(model) / 1e9:.2f} GB")
        command = [edgeforge(), "export", model, "--target", options.target, "--recipe", "int4"]
        command += ["--context", str(options.context), "--threads", str(options.threads)]
        done = run([*command, "--out", out, "-q"])
        size = f"{folder_bytes(out) / 1e9:.2f} GB of {parameters / 1e9:.1f} billion parameters"
        rows = [TITLES, ["export", f"{done.wall:.0f}", f"{done.peak / 1e6:.0f}", size]]
        say(" | ".join(rows[-1]))
        done = run([sys.executable, __file__, "--references", out, model])
        for row in done.json():
            rows.append([str(cell) for cell in row])
            say(" | ".join(rows[-1]))
        return rows
    finally:
        for folder in (model, out, root / "cache"):
            shutil.rmtree(folder, ignore_errors=True)


def check(artifact: Path, source: Path) -> None:
    """Holds an artifact against its manifest, its checkpoint and its store, without running it."""
    from edgeforge.model.model import open_model
    from edgeforge.verification.meaning.check import check_meaning
    from edgeforge.verification.references import references
    from edgeforge.verification.stored_weights import require_recorded_weights, unlike_store
    from exporters.manifest import Manifest

    rows = []

    def row(stage: str, began: float, result: str) -> None:
        seconds = f"{time.perf_counter() - began:.0f}"
        rows.append([stage, seconds, f"{high_water_mark() / 1e6:.0f}", result])

    manifest, model, began = Manifest.read(artifact), open_model(str(source)), time.perf_counter()
    require_recorded_weights(artifact, manifest)
    row("digests", began, f"all {len(manifest.weights):,} weights are as recorded")
    began = time.perf_counter()
    checks = check_meaning(artifact, manifest, model)
    wrong = [each.message for each in checks if each.verdict != "passed"]
    if wrong:
        raise SystemExit("; ".join(wrong))
    row("meaning", began, f"{len(checks)} facts")
    began = time.perf_counter()
    held = references(manifest, model, lambda stage, done, size: None)
    if unlike_store(manifest, held.store):
        raise SystemExit("the artifact's weights are not the store's")
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCABULARY, (REFERENCE_TOKENS,), generator=draw)
    quantized = next(held.quantized.logits([tokens]))
    row("QUANTIZED", began, f"{REFERENCE_TOKENS} tokens")
    began = time.perf_counter()
    original = next(held.original.logits([tokens])).log_softmax(-1)
    kl = (original.exp() * (original - quantized.log_softmax(-1))).sum(-1).mean()
    row("FLOAT", began, f"KL of QUANTIZED {float(kl):.3g} nats a token (random weights)")
    print(json.dumps(rows))


def write_source(folder: Path, layers: int) -> int:
    """Writes the checkpoint and returns the number of its parameters."""
    folder.mkdir(parents=True)
    config = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    shift, shifts = 4096, 997  # each matrix begins elsewhere in the storage
    draw = torch.Generator().manual_seed(0)
    count = VOCABULARY * HIDDEN + shift * shifts
    storage = torch.empty(count, dtype=torch.bfloat16).normal_(std=0.02, generator=draw)
    tensors: dict[str, torch.Tensor] = {}

    def add(name: str, rows: int, columns: int) -> None:
        begin = shift * (len(tensors) % shifts)
        tensors[name] = storage[begin : begin + rows * columns].view(rows, columns)

    add("model.embed_tokens.weight", VOCABULARY, HIDDEN)
    add("lm_head.weight", VOCABULARY, HIDDEN)
    for layer in range(layers):
        at = f"model.layers.{layer}."
        for name, rows in (("q", HIDDEN), ("k", KEYS), ("v", KEYS), ("o", HIDDEN)):
            add(f"{at}self_attn.{name}_proj.weight", rows, HIDDEN)
        add(f"{at}block_sparse_moe.gate.weight", EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            for name, rows, columns in (
                ("1", WIDTH, HIDDEN),
                ("2", HIDDEN, WIDTH),
                ("3", WIDTH, HIDDEN),
            ):
                add(f"{at}block_sparse_moe.experts.{expert}.w{name}.weight", rows, columns)
        for name in ("input", "post_attention"):
            tensors[f"{at}{name}_layernorm.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
    tensors["model.norm.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
    torch.save(tensors, folder / "pytorch_model.bin")
    return sum(tensor.numel() for tensor in tensors.values())


if __name__ == "__main__":
    main()
