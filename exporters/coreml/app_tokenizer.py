"""The tokenizer's files for apps on Apple's systems, which read them by swift-transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from exporters.tokenizer_files import (
    CONFIG,
    TOKENIZER,
    chat_template,
    copy_files,
    model_kind,
    read,
    write,
)

# By the tokenizer's algorithm, the class whose name swift-transformers knows for it. The names that
# it knows besides are of the same classes, but Llama's, which replaces what the file says.
_CLASSES: Final = {
    "BPE": "PreTrainedTokenizer",
    "Unigram": "T5Tokenizer",
    "WordPiece": "BertTokenizer",
}


def write_tokenizer(files: Mapping[str, Path], folder: Path) -> None:
    """Copies the tokenizer's files and writes a configuration that swift-transformers can use.

    It refuses a ``tokenizer_class`` that it does not know, guesses one from the model's type where
    there is none, and takes ``LlamaTokenizer`` as a reason not to follow ``tokenizer.json``. Its
    releases before the one that reads ``chat_template.jinja`` look for the chat template in
    ``tokenizer_config.json``, so it is written there too.
    """
    copy_files(files, folder)
    if TOKENIZER not in files:
        return
    config = read(files, CONFIG)
    config["tokenizer_class"] = _CLASSES.get(model_kind(read(files, TOKENIZER)), _CLASSES["BPE"])
    template = chat_template(files)
    if template is not None:
        config["chat_template"] = template
    write(config, folder / CONFIG)
