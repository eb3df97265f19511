"""Measure the trained checkpoint, write its model card and lay out the folder that ships.

Everything is measured on the files as they ship: weights rounded to bfloat16, maths in float32.

Usage::

    python card.py --data build --model build/model --out ../../edgeforge/demo
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import textwrap
from pathlib import Path

import torch
from model import (
    OpenELM,
    greedy,
    load,
    negative_log_likelihood,
    sampled,
    unigram_perplexity,
)
from tokenizers import Tokenizer
from torch import Tensor

SHIPPED = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
PROMPTS = (
    "If the file does not exist,",
    "If the string contains",
    "If the connection is closed by the client,",
)
GREEDY_TOKENS, SAMPLED_TOKENS = 48, 100
TEMPERATURE, TOP_P, SEED = 0.8, 0.9, 1


def training_counts(data: Path, tokenizer: Tokenizer) -> Tensor:
    """How often each token occurs in the training documents, int64[vocab]."""
    counts = torch.zeros(tokenizer.get_vocab_size(), dtype=torch.int64)
    with (data / "train.jsonl").open(encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
        counts += torch.bincount(torch.tensor(encoding.ids), minlength=len(counts))
    return counts


def fill(text: str) -> str:
    """Lay out a paragraph in lines of at most 100 columns."""
    return textwrap.fill(" ".join(text.split()), 100, break_on_hyphens=False)


def quote(prompt: str, continuation: str) -> str:
    """Lay out a prompt and what the model made of it as a Markdown quotation."""
    return f"> **{prompt}**{continuation.rstrip()}".replace("\n", "\n> ")


def samples(model: OpenELM, tokenizer: Tokenizer) -> tuple[str, str]:
    """Continue every prompt greedily and by sampling; return both as Markdown quotations."""
    likeliest, drawn = [], []
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt).ids
        likeliest.append(quote(prompt, tokenizer.decode(greedy(model, ids, GREEDY_TOKENS))))
        tokens = sampled(model, ids, SAMPLED_TOKENS, TEMPERATURE, TOP_P, SEED)
        drawn.append(quote(prompt, tokenizer.decode(tokens)))
    return "\n\n".join(likeliest), "\n\n".join(drawn)


def measure(data: Path, folder: Path, threads: int) -> dict[str, float]:
    """Perplexities over the whole held-out text."""
    torch.set_num_threads(threads)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = load(folder)
    text = (data / "heldout.txt").read_text(encoding="utf-8")
    tokens = torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids)
    total, count = negative_log_likelihood(model, tokens, model.shape.max_context_length)
    unigram = unigram_perplexity(training_counts(data, tokenizer), tokens)
    own = unigram_perplexity(torch.bincount(tokens, minlength=tokenizer.get_vocab_size()), tokens)
    return {
        "tokens": count,
        "bytes": len(text.encode()),
        "perplexity": math.exp(total / count),
        "bits_per_byte": total / math.log(2) / len(text.encode()),
        "unigram_perplexity": unigram,
        "own_unigram_perplexity": own,
        "ratio": unigram / math.exp(total / count),
    }


def card(data: Path, folder: Path, facts: dict[str, float]) -> str:
    """Return the model card (Markdown with a YAML head)."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = load(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    run = json.loads((data / "training.json").read_text(encoding="utf-8"))
    sources = json.loads((data / "sources.json").read_text(encoding="utf-8"))["sources"]
    sources_table = "\n".join(
        f"| {s['title']} | `{s['package']}` {s['version']} | {s['licence']} | {s['documents']} |"
        f" {s['characters'] / 1e6:.2f} M | {s['heldout_documents']} |"
        for s in sources
    )
    heldout_names = (data / "heldout_documents.txt").read_text(encoding="utf-8").split()
    likeliest, drawn = samples(model, tokenizer)
    what_it_is = fill(
        f"""A language model of {run["parameters"]:,} parameters with OpenELM's architecture,
        trained from nothing on software documentation. It is small enough to ship with the package
        and truly trained, so that what quantization does to it can be measured. It writes in the
        manner of a manual; it knows nothing reliable and is of no use for anything else."""
    )
    how_measured = fill(
        f"""The weights are the bfloat16 ones of `model.safetensors`, the maths float32. The text is
        cut into windows of {config["max_context_length"] - 1} tokens, each after one `<s>`, and
        every token is predicted once. A unigram model that had counted the held-out text itself
        would reach {facts["own_unigram_perplexity"]:.1f}."""
    )
    how_trained = fill(
        f"""{run["minutes"]:.0f} minutes on {run["processes"]} CPU cores shared with other work:
        {run["steps"]:,} steps of {run["recipe"]["tokens_per_step"]:,} tokens,
        {run["tokens_trained_on"] / 1e6:.1f} M tokens in all, {run["passes"]:.1f} passes over
        {run["training_tokens"] / 1e6:.2f} M. Muon for the layers' matrices (peak rate
        {run["recipe"]["matrix_rate"]}), AdamW for the embedding and the norms
        ({run["recipe"]["embedding_rate"]}), rates falling linearly to zero; matrix products in
        bfloat16. Windows of 512 tokens, for the last fifth of the time of
        {config["max_context_length"]}. On other pages, kept aside to watch the run, the perplexity
        is {run["validation_perplexity"]:.2f} over {run["validation_tokens"]:,} tokens."""
    )
    return f"""---
language: en
license: apache-2.0
library_name: edgeforge
pipeline_tag: text-generation
tags: [openelm, demo]
---

# EdgeForge demo model

{what_it_is}

## Measured on the held-out text

| | |
|---|---|
| held-out text | {facts["tokens"]:,} tokens of {len(heldout_names)} documents |
| perplexity per token | **{facts["perplexity"]:.2f}** |
| perplexity of the unigram model (training counts) | {facts["unigram_perplexity"]:.1f} |
| ratio | **{facts["ratio"]:.1f}** |
| bits per byte ({facts["bytes"]:,} bytes) | {facts["bits_per_byte"]:.3f} |

{how_measured}

Greedy text, {GREEDY_TOKENS} tokens after the prompt in bold. It speaks the
text's language; being small, it repeats itself after a sentence or two:

{likeliest}

Sampled text, {SAMPLED_TOKENS} tokens at temperature {TEMPERATURE} and top-p {TOP_P}, seed {SEED}:

{drawn}

## Dimensions

| | |
|---|---|
| layers | {config["num_transformer_layers"]} |
| model width | {config["model_dim"]} |
| query heads by layer | {config["num_query_heads"]} of {config["head_dim"]} |
| key and value heads by layer | {config["num_kv_heads"]} |
| FFN widths by layer | {model.shape.ffn_dims} |
| vocabulary | {config["vocab_size"]}, byte-level BPE, head tied to the embedding |
| context | {config["max_context_length"]} tokens |

RMSNorm before attention and FFN, RMSNorm on every query and key head before rotary positions
(theta 10000), SiLU-gated FFN, no biases. `<pad>` is 0, `<s>` (in front of every text) 1, `</s>` 2.

## Training

{how_trained}

`examples/demo_model` in the source tree rebuilds text, tokenizer and model.

## Text

| Source | Debian package | Licence of the text | Pages | Characters | Held out |
|---|---|---|---|---|---|
{sources_table}

Pages were reduced to their paragraphs, lists and signatures; code listings and tables were dropped.
`heldout.txt` is made of whole pages, chosen by a hash of their name; paragraphs that occur in it
were removed from the training text. `calibration.txt` is what quantization looks at activations
on: training pages of the same six packages, chosen by another hash. Both texts remain under the
licences above, whose notices are in `heldout_licences.txt`; the held-out pages by package:

{heldout_list(heldout_names)}
"""


def heldout_list(names: list[str]) -> str:
    """The held-out pages, grouped by package."""
    groups: dict[str, list[str]] = {}
    for name in names:
        package, _, path = name.partition("/")
        page = path.partition("/html/")[2] or path.partition("/sqlite3/")[2] or path
        groups.setdefault(package, []).append(page.partition("manual/en/")[2] or page)
    return "\n".join(f"- `{package}`: {', '.join(pages)}" for package, pages in groups.items())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Measure the demo model and write its card.")
    parser.add_argument("--data", type=Path, default=Path("build"))
    parser.add_argument("--model", type=Path, default=Path("build/model"))
    parser.add_argument("--out", type=Path, default=Path("build/demo"))
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    facts = measure(arguments.data, arguments.model, arguments.threads)
    print(json.dumps(facts, indent=2))
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in SHIPPED:
        shutil.copyfile(arguments.model / name, arguments.out / name)
    for name in ("calibration.txt", "heldout.txt", "heldout_licences.txt"):
        shutil.copyfile(arguments.data / name, arguments.out / name)
    text = card(arguments.data, arguments.model, facts)
    (arguments.out / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
