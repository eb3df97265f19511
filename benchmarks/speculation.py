"""Compares speculative decoding by prompt lookup with plain decoding, on artifacts with drafts.

Every prompt is continued greedily by both, one after the other, several times, so that other load
on the machine affects both; the fastest run of each counts. Two kinds of prompts: plain text, which
is continued, and text that is begun once more, as an assistant does that corrects or summarises.
The script prints tokens a step, the ratio of decoding speeds, and how many texts
are those of plain decoding, token for token.
"""

import argparse
import json
import os
import statistics
from collections.abc import Iterator
from pathlib import Path

from measured_process import pin
from pages import add_page_option, write_block
from tables import print_rows

from device_harness.registry import open_session
from device_harness.session import Session
from edgeforge.generation.drafters import NGRAM, PromptLookup
from edgeforge.generation.sampling import Generation
from edgeforge.generation.speculation import SpeculativeGeneration
from edgeforge.model.model import HELDOUT
from edgeforge.tokenizer import Tokenizer
from exporters.manifest import Manifest

KINDS = ("continued", "given again")


def main() -> None:
    """Reads the arguments, runs every artifact, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifacts", type=Path, nargs="+", help="exported with --draft-positions")
    parser.add_argument("--prompts", type=int, default=6, help="of each kind")
    parser.add_argument("--tokens", type=int, default=96, help="to generate")
    parser.add_argument("--ngram", type=int, default=NGRAM)
    parser.add_argument("--draft", type=int, help="always as many; by default more or fewer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    add_page_option(parser)
    options = parser.parse_args()
    pin(options.threads)
    rows = [["artifact", "prompts", "tokens a step", "speed / plain decoding", "same text"]]
    found = []
    for folder in options.artifacts:
        for kind, runs in measure(folder, options).items():
            found.append({"artifact": str(folder), "kind": kind, "runs": runs})
            speeds = sorted(run["speed_up"] for run in runs)
            rows.append(
                [
                    f"{folder.parent.name}, {Manifest.read(folder).target}",
                    kind,
                    f"{statistics.mean(run['tokens_a_step'] for run in runs):.2f}",
                    f"{statistics.median(speeds):.2f} ({speeds[0]:.2f} to {speeds[-1]:.2f})",
                    f"{sum(run['same'] for run in runs)} of {len(runs)}",
                ]
            )
    about = f"{options.tokens} tokens, {options.threads} threads"
    print(f"{about}, load {os.getloadavg()[0]:.1f}")
    print_rows(rows)
    if options.page:
        write_block(options.page, rows, f"{about}.")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def measure(folder: Path, options: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Runs all prompts of an artifact, by their kind."""
    manifest = Manifest.read(folder)
    tokenizer = Tokenizer(folder / "tokenizer.json", str(folder))
    with (
        open_session(folder, manifest, options.threads) as plain,
        open_session(folder, manifest, options.threads) as other,
    ):
        return {
            kind: [
                compare(plain, other, prompt, manifest, options)
                for prompt in prompts(tokenizer, kind, options)
            ]
            for kind in KINDS
        }


def prompts(tokenizer: Tokenizer, kind: str, options: argparse.Namespace) -> Iterator[list[int]]:
    """Tokens of the prompts of a kind, cut from the held-out text."""
    text = tokenizer.encode(HELDOUT.read_text(encoding="utf-8")[:60_000])
    for at in range(options.prompts):
        part = text[at * 400 : at * 400 + 160]
        # The part is begun once more: a model goes on with what it has seen.
        yield part if kind == "continued" else [*part, *part[: 24 + at]]


def compare(
    plain: Session,
    other: Session,
    prompt: list[int],
    manifest: Manifest,
    options: argparse.Namespace,
) -> dict[str, float]:
    """Continues a prompt by plain and by speculative decoding, in turn."""
    seconds: dict[str, list[float]] = {"plain": [], "speculative": []}
    most = manifest.draft_positions - 1
    for _ in range(options.rounds):
        run = Generation(plain, prompt, options.tokens, frozenset())
        wanted = list(run)
        seconds["plain"].append(run.decode_seconds)
        drafted = SpeculativeGeneration(
            other,
            prompt,
            options.tokens,
            frozenset(),
            drafter=PromptLookup(options.ngram),
            draft=min(most, options.draft or most),
            fixed=options.draft is not None,
        )
        given = list(drafted)
        seconds["speculative"].append(drafted.decode_seconds)
    return {
        "tokens_a_step": (len(given) - 1) / drafted.steps,
        "accepted": drafted.accepted,
        "proposed": drafted.proposed,
        "run_again": drafted.run_again,
        "speed_up": min(seconds["plain"]) / min(seconds["speculative"]),
        "same": given == wanted,
    }


if __name__ == "__main__":
    main()
