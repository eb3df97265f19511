"""A card as Markdown, with the header that the hub reads."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Final

import yaml

from edgeforge.cards.card import Card, Measure, Verified
from edgeforge.cards.figures import number, ratio, share, with_interval
from edgeforge.cards.plain_text import code, plain, visible
from edgeforge.cards.running import ELSEWHERE, INTERPRETED, how_to_run
from edgeforge.output_folder.generated_cards import CARD, MARKS
from edgeforge.sizes import size_text
from exporters.manifest import Manifest

_LICENCE_ID: Final = re.compile(r"[a-z0-9][a-z0-9.-]{0,60}")
_TAG: Final = re.compile(r"[A-Za-z0-9][\w.-]{0,60}")
_NO_FIGURE: Final = "not verified yet"


def markdown(card: Card) -> str:
    """The text of ``CARD.md``."""
    return "\n".join([*_lines(card), ""])


def _lines(card: Card) -> Iterator[str]:
    manifest, origin, found = card.manifest, card.provenance, card.verified
    yield f"---\n{yaml.safe_dump(_header(card), sort_keys=False, allow_unicode=True)}---"
    yield MARKS[CARD]
    yield ""
    yield f"# {plain(origin.title)}, {code(manifest.recipe)} for {code(manifest.target)}"
    yield ""
    yield from _verdict(found)
    yield ""
    yield "## How close it is to the checkpoint"
    yield ""
    yield from _figures(card)
    yield ""
    yield "## What was verified where"
    yield ""
    yield from _places(card)
    yield ""
    yield "## What it is"
    yield ""
    yield from _facts(card)
    yield ""
    yield "## How to run it"
    yield ""
    yield "### Here, with EdgeForge"
    yield ""
    extra = "" if manifest.target == "coreml" else f"[{manifest.target}]"
    yield "```console"
    yield f'$ pip install "edgeforge{extra}"'
    yield '$ edgeforge run . --prompt "The function returns"'
    yield "```"
    if usage := how_to_run(manifest):
        yield ""
        yield usage.rstrip()
    yield ""
    yield "## How to repeat the figures"
    yield ""
    yield "```console"
    yield "$ edgeforge verify . --checkpoint CHECKPOINT"
    yield "```"
    yield ""
    yield (
        f"`CHECKPOINT` is a folder or a hub id of the checkpoint with the SHA-256 "
        f"`{manifest.source.sha256[:16]}...` ({CARD} is written anew then)."
    )


def _header(card: Card) -> dict[str, object]:
    """The metadata that the hub reads; what is not known is left out."""
    manifest, origin = card.manifest, card.provenance
    header: dict[str, object] = {}
    if _LICENCE_ID.fullmatch(card.licence_id):
        header["license"] = card.licence_id
        if card.licence_id == "other" and origin.licence != card.licence_id:
            header["license_name"] = visible(origin.licence)
    elif origin.licence:
        header |= {"license": "other", "license_name": visible(origin.licence)}
    if origin.hub_id:
        header |= {"base_model": visible(origin.hub_id), "base_model_relation": "quantized"}
    header["pipeline_tag"] = "text-generation"
    family = str(manifest.model.summary.get("model_type", ""))
    names = ("edgeforge", manifest.target, family, manifest.recipe)
    header["tags"] = [name for name in dict.fromkeys(names) if _TAG.fullmatch(name)]
    return header


def _verdict(found: Verified | None) -> Iterator[str]:
    if found is None:
        yield (
            "**Not verified yet**: nothing below was measured. `edgeforge verify` runs this "
            "artifact beside its checkpoint and writes the figures here."
        )
        return
    if found.problems:
        yield f"**Not sound.** A verification found {len(found.problems)} faults:"
        yield ""
        yield from (f"- {plain(problem)}" for problem in found.problems)
    else:
        bits = "every stored weight equals the quantized one, bit for bit"
        weights = bits if found.stored_weights_equal else "the weights are as the manifest records"
        yield (
            f"**Sound**: {weights}, all logits are finite numbers, and {found.passed} figures and "
            f"facts keep to their bounds."
        )
    if found.routing:
        yield ""
        yield plain(f"Experts: {found.routing}.")
    if found.doubtful:
        yield ""
        names = ", ".join(map(code, found.doubtful))
        yield f"Doubtful, as the sample is too small to tell: {names}."


def _figures(card: Card) -> Iterator[str]:
    found = card.verified
    forms: dict[str, tuple[str, Callable[[float | None], str]]] = {
        "kl": ("KL from the checkpoint, nats a token", number),
        "quantization_kl": ("of it, what rounding the weights costs", number),
        "lowering_kl": ("what the runtime's arithmetic adds", number),
        "perplexity_ratio": ("perplexity over the checkpoint's", ratio),
        "top1": ("same likeliest token as the checkpoint", share),
    }
    yield "| figure | value | 95 % interval |"
    yield "|---|---|---|"
    for field, (name, form) in forms.items():
        value, interval = _NO_FIGURE, ""
        if found is not None:
            each: Measure = getattr(found, field)
            value = form(each.value)
            interval = with_interval(each.value, each.low, each.high, form)[len(value) + 1 :]
            interval = interval.strip("[]").replace(", ", " to ") or "none: too little text"
        yield f"| {name} | {value} | {interval} |"
    if found is not None:
        yield ""
        of = "" if found.tokens >= found.text_tokens else f" of {found.text_tokens:,}"
        yield f"Of {found.tokens:,}{of} tokens of {plain(found.text)}."


def _places(card: Card) -> Iterator[str]:
    target, found = card.manifest.target, card.verified
    yield "| where | how |"
    yield "|---|---|"
    if found is None:
        yield "| anywhere | not run |"
    else:
        yield f"| {plain(found.runtime)}, on {plain(found.processor)} | {found.how} |"
        for each in found.elsewhere:
            sound = f"measured, lowering error {number(each.lowering_kl.value)}"
            sound = "measured, **not sound there**" if each.problems else sound
            emulated = ", an emulated processor" if each.emulated else ""
            yield (
                f"| {plain(each.runtime)}, on {plain(each.model)} ({plain(each.device)})"
                f"{emulated} | {sound} |"
            )
        if found.how == "interpreted" and target in INTERPRETED:
            yield f"| {INTERPRETED[target]} | not run |"
        yield from (f"| {place} | not run |" for place in ELSEWHERE.get(target, ()))
    yield ""
    yield (
        "*Measured*: the target's own runtime ran the files. *Interpreted*: EdgeForge's "
        "interpreter stood in for it. *Not run*: nobody ran them there for this card."
    )
    if found is not None and found.limits:
        yield ""
        yield "What the interpreter cannot know:"
        yield ""
        yield from (f"- {plain(limit)}" for limit in found.limits)


def _facts(card: Card) -> Iterator[str]:
    manifest, origin = card.manifest, card.provenance
    parameters = manifest.model.summary.get("num_parameters")
    calibration, rotation = manifest.calibration, manifest.rotation
    text = "none: no text was looked at"
    if calibration is not None:
        text = f"{calibration.tokens:,} tokens of {_file_name(calibration.source)}"
    rows = [
        ("source", plain(origin.hub_id) or f"a folder, {plain(origin.title)}"),
        ("revision", code(manifest.source.revision or "") or "not known"),
        ("SHA-256 of the checkpoint", code(manifest.source.sha256)),
        ("author", plain(origin.author) or "not stated"),
        ("licence", plain(origin.licence) or "not stated by the checkpoint: ask its author"),
        ("family", code(str(manifest.model.summary.get("model_type", "")))),
        ("parameters", f"{parameters:,}" if isinstance(parameters, int) else "not known"),
        ("recipe", code(manifest.recipe)),
        ("bits a weight", f"{manifest.bits_per_weight:.3f}"),
        ("size of all files", size_text(card.bytes)),
        ("context", f"{manifest.context:,} tokens"),
        *_cut(manifest),
        *_adapters(manifest),
        ("calibration", text),
        ("rotation", "none" if rotation is None else code(rotation.name)),
        ("made by", plain(", ".join(f"{name} {v}" for name, v in manifest.tools.items()))),
    ]
    yield "| | |"
    yield "|---|---|"
    yield from (f"| {name} | {value} |" for name, value in rows)
    yield ""
    yield "| weight format | weights | bytes |"
    yield "|---|---|---|"
    for each in card.formats:
        yield f"| {code(each.format)} | {each.weights:,} | {each.bytes:,} |"
    for title, told in (("Warnings", manifest.warnings), ("Notes", manifest.notes)):
        if told:
            yield ""
            yield f"{title}:"
            yield ""
            yield from (f"- {plain(each)}" for each in told)


def _cut(manifest: Manifest) -> list[tuple[str, str]]:
    layer, layers = manifest.model.exit_layer, manifest.model.checkpoint_layers
    cut = [] if layer is None else [("cut after layer", f"{layer} of {layers}")]
    drafts = manifest.draft_positions
    return cut if drafts == 1 else [*cut, ("drafts", f"logits of {drafts} positions a call")]


def _adapters(manifest: Manifest) -> list[tuple[str, str]]:
    rows = []
    for record in manifest.adapters:
        times = "" if record.weight == 1 else f" times {record.weight:g}"
        how = f"in {code(record.file)}" if record.file else "merged into the weights"
        digest = code(record.sha256[:16])
        rows.append(("adapter", f"{code(record.name)}{times}, {how}, SHA-256 {digest}..."))
    return rows


def _file_name(source: str) -> str:
    """What to call a calibration text: a path of somebody's machine tells a reader nothing."""
    if source == "demo":
        return "EdgeForge's calibration text"
    if source == "self":
        return "what the model itself writes"
    return code(source.replace("\\", "/").rpartition("/")[2])
