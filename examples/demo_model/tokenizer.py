"""Train the demo model's tokenizer: byte-level BPE, GPT-2's word splitting, `<s>` in front.

Usage::

    python tokenizer.py --text build/train.jsonl --out build/model
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
SPECIAL_TOKENS = (PAD, BOS, EOS)  # ids 0, 1, 2
VOCAB_SIZE = 3072


def documents(path: Path) -> Iterator[str]:
    """Yield the text of every document of a `train.jsonl`."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["text"]


def train(texts: Iterator[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """Train the tokenizer; it encodes any text and decodes it back byte for byte."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, 1)]
    )
    return tokenizer


def tokenizer_config(context_length: int) -> dict[str, object]:
    """Return `tokenizer_config.json`: what transformers and onnxruntime-genai read."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": False,
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_length,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train the demo model's tokenizer.")
    parser.add_argument("--text", type=Path, default=Path("build/train.jsonl"))
    parser.add_argument("--out", type=Path, default=Path("build/model"))
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--vocab-size", type=int, default=VOCAB_SIZE)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    tokenizer = train(documents(arguments.text), arguments.vocab_size)
    tokenizer.save(str(arguments.out / "tokenizer.json"))
    config = json.dumps(tokenizer_config(arguments.context), indent=2) + "\n"
    (arguments.out / "tokenizer_config.json").write_text(config, encoding="utf-8")


if __name__ == "__main__":
    main()
