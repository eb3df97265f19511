"""Holds tokenizer, token ids and context that an artifact states against the checkpoint's."""

from __future__ import annotations

import hashlib
from pathlib import Path

from edgeforge.model.model import Model
from edgeforge.tokenizer import TOKENIZER
from edgeforge.verification.meaning.findings import Findings
from exporters.lifted import Reading
from exporters.manifest import Manifest
from quant.input_files import open_input


def hold_identity(
    folder: Path, manifest: Manifest, model: Model, reading: Reading, findings: Findings
) -> None:
    """Notes what the files state about text: which tokenizer, which ids, how long a context."""
    _tokenizer(folder, model, findings)
    spec = model.spec
    # Artifacts of before have the configuration's ends alone, without the chat template's.
    is_older = manifest.model.eos == spec.eos
    eos = spec.eos if is_older else model.eos
    wanted: dict[str, tuple[int, ...]] = {
        "bos": () if spec.bos is None else (spec.bos,),
        "eos": tuple(dict.fromkeys(eos)),
    }
    recorded = {
        "bos": () if manifest.model.bos is None else (manifest.model.bos,),
        "eos": tuple(dict.fromkeys(manifest.model.eos)),
    }
    # Runtimes that need a padding token get the first end where the checkpoint has none.
    pad = spec.pad if spec.pad is not None else next(iter(eos), None)
    wanted["pad"] = () if pad is None else (pad,)
    for name, ids in wanted.items():
        findings.fact(name, f"{name} is {list(ids)}", float(ids[0]) if len(ids) == 1 else None)
        for place, stated in (("edgeforge.json", recorded), ("the files", reading.ids)):
            if name not in stated:
                continue
            found = tuple(dict.fromkeys(stated[name]))
            findings.same(
                name,
                found == ids,
                place,
                f"{name} is {list(found)} in {place} and {list(ids)} in the checkpoint",
            )
    for place, length in reading.context.items():
        findings.same(
            "context",
            length == manifest.context,
            place,
            f"{place} is {length}; the artifact was exported for {manifest.context} tokens",
        )


def _tokenizer(folder: Path, model: Model, findings: Findings) -> None:
    """The tokenizer's own file is copied as it is; others may be changed for a runtime."""
    named = model.checkpoint.named_tokenizer
    whose = f"that of {named}" if named else "the checkpoint's"
    findings.fact("tokenizer", f"the tokenizer is {whose}")
    theirs = model.checkpoint.tokenizer_files.get(TOKENIZER)
    ours = folder / TOKENIZER
    if theirs is None and not ours.is_file():
        return
    if theirs is None or not ours.is_file():
        words = "has a tokenizer, the checkpoint none" if theirs is None else "has no tokenizer"
        findings.same("tokenizer", False, TOKENIZER, f"the artifact {words}")
        return
    digests = []
    for path in (ours, theirs):
        with open_input(path) as stream:
            digests.append(hashlib.file_digest(stream, "sha256").hexdigest())
    findings.same(
        "tokenizer",
        digests[0] == digests[1],
        TOKENIZER,
        f"{TOKENIZER} is not {whose}: its SHA-256 begins with {digests[0][:8]}, not "
        f"{digests[1][:8]}",
    )
