"""What a user must be told of an export, because the artifact will not do what one expects."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from edgeforge.checkpoint.adapters import inner_adapters
from edgeforge.checkpoint.json_text import MAX_INDEX_BYTES, parse_object, read_small_file
from edgeforge.checkpoint.layout import VOCABULARY_FILES
from edgeforge.export_options import ExportRun
from edgeforge.families.spec import ModelSpec
from edgeforge.model.rope import uses_long_set
from edgeforge.tokenizer import Tokenizer
from exporters.checks import not_applied
from exporters.target import Lowered, Target
from exporters.tokenizer_files import chat_template, kinds, read

_TOKENIZER: Final = "tokenizer.json"
_CONFIG: Final = "tokenizer_config.json"


def warnings_of(run: ExportRun) -> tuple[str, ...]:
    """Returns what is known before any work, one sentence each.

    Args:
        run: the export after all decisions.

    Raises:
        CheckpointError: the checkpoint's ``tokenizer.json`` cannot be read.
    """
    spec, context = run.model.spec, run.facts.context
    found = (
        *run.model.checkpoint.warnings,
        *_of_adapters(run.model.checkpoint.path),
        *_of_tokenizer(run.model.checkpoint.tokenizer_files, spec),
        *_of_ends(run.model.eos),
        *_of_longrope(spec, context),
        *run.planned.warnings,
        *(() if run.calibration is None else run.calibration.notes),
    )
    return tuple(dict.fromkeys(found))


def warnings_of_target(run: ExportRun, target: Target, lowered: Lowered) -> tuple[str, ...]:
    """Returns what concerns one target alone, one sentence each.

    Args:
        run: the export after all decisions.
        target: the target that wrote the artifact.
        lowered: what the target wrote.
    """
    return (*not_applied(run.options.target, target), *lowered.warnings)


def _of_adapters(folder: Path) -> tuple[str, ...]:
    inside = inner_adapters(folder)
    if not inside:
        return ()
    return (
        f"the checkpoint's folder holds adapters in {', '.join(inside[:5])}, which the exported "
        f"model does not have: to have one, merge it and export the merged model",
    )


def _of_tokenizer(files: Mapping[str, Path], spec: ModelSpec) -> tuple[str, ...]:
    vocabularies = sorted(files.keys() & set(VOCABULARY_FILES))
    if not vocabularies:
        return (
            "the checkpoint has no tokenizer, so the artifact has none: `run` cannot read a prompt "
            "and `verify` no text; export again with --tokenizer PATH",
        )
    if _TOKENIZER not in files:
        return (
            f"the checkpoint's tokenizer is {', '.join(vocabularies)}, without {_TOKENIZER}: the "
            f"files are copied for apps, but `run` cannot read a prompt and `verify` no text; "
            f"export again with --tokenizer and a folder that has {_TOKENIZER}",
        )
    tokenizer = Tokenizer(files[_TOKENIZER], str(files[_TOKENIZER].parent))
    added = (*_of_added_tokens(files, tokenizer), *_of_class(files))
    largest = tokenizer.largest_id
    if largest < spec.vocab_size:
        return added
    return (
        *added,
        f"the tokenizer has tokens up to {largest}, but the model has {spec.vocab_size}, counted "
        f"from 0: a text that holds a token from {spec.vocab_size} on cannot be given to the model",
    )


def _of_added_tokens(files: Mapping[str, Path], tokenizer: Tokenizer) -> tuple[str, ...]:
    """Tells of a ``tokenizer_config.json`` that contradicts the tokenizer itself."""
    if _CONFIG not in files:
        return ()
    content = read_small_file(files[_CONFIG], MAX_INDEX_BYTES)
    config = parse_object(content, str(files[_CONFIG]), strict=False)
    told = []
    for key, where, tokens in zip(
        ("add_bos_token", "add_eos_token"),
        ("in front of", "behind"),
        tokenizer.added(),
        strict=True,
    ):
        if config.get(key) is (not tokens):
            does = f"puts {', '.join(map(str, tokens))}" if tokens else "puts nothing"
            told.append(
                f"{_CONFIG} sets {key} to {str(config[key]).lower()}, but {_TOKENIZER} {does} "
                f"{where} a text: {_TOKENIZER} is followed, as in transformers; an app's own "
                f"tokenizer may follow {key}"
            )
    return tuple(told)


def _of_class(files: Mapping[str, Path]) -> tuple[str, ...]:
    """Tells of a class for which transformers builds another tokenizer than the file describes."""
    name = str(read(files, _CONFIG).get("tokenizer_class")).removesuffix("Fast")
    if name != "LlamaTokenizer" or chat_template(files) is None:
        return ()
    if "Prepend" not in kinds(read(files, _TOKENIZER).get("normalizer")):
        return ()
    return (
        f"transformers 5 does not follow the {_TOKENIZER} of a {name}: in conversations it puts no "
        f"space in front of text behind special tokens, as the file and transformers 4 do; the "
        f"file is followed here",
    )


def _of_ends(eos: tuple[int, ...]) -> tuple[str, ...]:
    if eos:
        return ()
    return (
        "the checkpoint names no token that ends a text (eos_token_id): generation goes on until "
        "the limit of tokens",
    )


def _of_longrope(spec: ModelSpec, context: int) -> tuple[str, ...]:
    if spec.rope is None or not uses_long_set(spec.rope, context):
        return ()
    short = spec.rope.original_context
    return (
        f"longrope: the long factors apply at every position, because the declared context of "
        f"{context} tokens is longer than the original context of {short}; texts of at most "
        f"{short} tokens are computed with the short factors by transformers, so they come out "
        f"differently here: for such texts export with --context {short}",
    )
