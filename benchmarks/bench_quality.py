"""Measures every quality table on the three models and writes docs/benchmarks/quality.md.

``make bench-quality`` runs this. The models and the texts are those of `yardstick`, the contenders
those of `contenders`. What was measured is kept under ``build/quality/measured`` with the facts on
which it depends, so an interrupted run goes on where it stopped, and ``--rewrite`` writes the page
from what is there without measuring.
"""

import argparse
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import contenders
import quality_tables
from contenders import BUDGETS, MATCHED, Contender
from demo_tables import DEMO_TABLES, run_demo_table
from measurements import Kept, Measurement
from tables import line_up
from yardstick import CHAT, HELD_OUT, MODELS, ROOT, Yardstick, find_models

WIDTHS = [38, 7, 17, 15, 13, 8]
HEADER = ["", "bits", "KL mean", "perplexity x", "top-1 %", "seconds"]


def main() -> None:
    """Reads the arguments, measures, writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    tables = [*quality_tables.TABLES, *DEMO_TABLES]
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS])
    parser.add_argument("--tables", nargs="+", choices=tables, default=tables)
    parser.add_argument("--tokens", type=int, default=2048, help="of the held-out text")
    parser.add_argument("--chat-tokens", type=int, default=2048, help="of the conversations")
    parser.add_argument("--quick", action="store_true", help="1,024 tokens of each, fewer rows")
    parser.add_argument(
        "--only", nargs="+", default=[""], help="contenders whose names contain one of these texts"
    )
    parser.add_argument("--skip", nargs="+", default=[], help="the opposite of --only")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "quality")
    parser.add_argument(
        "--llama",
        type=Path,
        default=ROOT / "build" / "llama" / "model",
        help="folder of the second model",
    )
    parser.add_argument("--rewrite", action="store_true", help="measure nothing: write the page")
    parser.add_argument("--no-page", action="store_true", help="measure, and write no page")
    options = parser.parse_args()
    for chatty in ("onnxruntime", "torchao", "torch.utils._pytree"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    found: dict[str, dict[str, Measurement]] = {}
    shared = [name for name in options.tables if name in quality_tables.TABLES]
    if shared:
        for name, source in find_models(options.models, options.folder, options.llama).items():
            found[name] = measured(name, source, options)
    if not options.no_page:
        for table in shared:
            quality_tables.write(table, found)
    if not options.rewrite:
        for table in options.tables:
            if table in DEMO_TABLES:
                run_demo_table(table, options.quick)


def measured(name: str, source: str, options: argparse.Namespace) -> dict[str, Measurement]:
    """Returns what is known of a model's contenders, measuring what is not known yet."""
    tokens = {HELD_OUT: options.tokens, CHAT: options.chat_tokens}
    if options.quick:
        tokens = {text: min(count, 1024) for text, count in tokens.items()}
    label = "-".join(str(count) for count in tokens.values())
    kept = Kept(options.folder / "measured" / name / label)
    yardstick = Yardstick(name, source, tokens)
    sizes = ", ".join(f"{t.tokens} tokens of {n} text" for n, t in yardstick.texts.items())
    print(f"\n{yardstick.title}: {sizes}", flush=True)
    print(line_up(HEADER, WIDTHS))
    found: dict[str, Measurement] = {}
    for contender in wanted(options, found):
        known = kept.read(contender.name, contender.depends_on(yardstick))
        if known is None and options.rewrite:
            known = kept.read(contender.name)
            if known is None:
                continue
            print(f"{contender.name}: measured with other code or text than today's")
        if known is None:
            known = contender.measure(yardstick)
            kept.write(known)
        found[contender.name] = known
        show(known)
    return found


def wanted(
    options: argparse.Namespace, found: Mapping[str, Measurement]
) -> Iterator[Contender]:
    """Yields the contenders; those at a peer's bytes when the peer is measured."""

    def is_wanted(contender: Contender) -> bool:
        return any(part in contender.name for part in options.only) and not any(
            part in contender.name for part in options.skip
        )

    first = [*contenders.recipes(), *contenders.peers(options.folder)]
    yield from filter(is_wanted, first)
    budgets = {f"{bits} bits": bits for bits in BUDGETS}
    for file_type in MATCHED:
        peer = found.get(f"llama.cpp {file_type}")
        if peer is not None and not peer.refused and not options.quick:
            budgets[f"{file_type}'s bytes"] = peer.bits
    for title, bits in budgets.items():
        for recipe in ("mixed", "mixed-gptq"):
            made = contenders.mixed_at(recipe, bits, f"{recipe} at {title}")
            if is_wanted(made):
                yield made


def show(known: Measurement) -> None:
    """Prints a row for people who watch."""
    if known.refused:
        print(f"{known.contender}: left out: {known.refused}", flush=True)
        return
    for name, text in known.texts.items():
        scores = text.scores
        cells = [
            known.contender if name == HELD_OUT else f"  {name}",
            f"{known.bits:.4f}",
            scores.kl_mean.show(5),
            scores.perplexity_ratio.show(4),
            scores.agreement.show(2, 0.01),
            f"{known.seconds:.0f}",
        ]
        print(line_up(cells, WIDTHS), flush=True)


if __name__ == "__main__":
    begun = time.perf_counter()
    main()
    print(f"{time.perf_counter() - begun:.0f} seconds", file=sys.stderr)
