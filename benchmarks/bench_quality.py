"""Measures every quality table on the three models and writes docs/benchmarks/quality.md.

``make bench-quality`` runs this. The models and the texts are those of `yardstick`, the contenders
those of `contenders`. What was measured is kept under ``build/quality/measured`` with the facts on
which it depends, so an interrupted run goes on where it stopped. What is not asked for is taken
from there as it is, and ``--rewrite`` writes the page without measuring anything.
"""

import argparse
import io
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import redirect_stderr
from pathlib import Path

import contenders
from contenders import BUDGETS, MATCHED, PEER, Contender
from demo_tables import DEMO_TABLES, write_demo_table
from measurements import Kept, Measurement
from quality_tables import TABLES, write_table
from tables import line_up
from yardstick import CHAT, HELD_OUT, MODELS, ROOT, Yardstick, find_models

HEADER = ["", "bits", "KL mean", "perplexity x", "top-1 %", "seconds"]
WIDTHS = [38, 7, 17, 15, 13, 8]
QUICK_TOKENS = 1024
# What takes longest and is left out of a quick run.
SLOW = ("hqq", "k_quant", "bytes", "mixed at", "int4-g32-signed-gptq")


def main() -> None:
    """Reads the arguments, measures, writes."""
    options = arguments().parse_args()
    for chatty in ("onnxruntime", "neural_compressor", "torchao", "torch.utils._pytree"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    begun = time.perf_counter()
    shared = [name for name in options.tables if name in TABLES]
    options.kinds = {kind for name in shared for kind in TABLES[name].needs}
    asked = [] if options.rewrite else options.models
    sources = find_models(asked if shared else [], options.folder, options.llama)
    found = {}
    for model in MODELS:
        known = measured(model, sources.get(model), options)
        if known:
            found[model] = known
    if not options.no_page:
        for name in shared:
            write_table(name, found)
        for name in options.tables:
            if name in DEMO_TABLES and not options.rewrite:
                write_demo_table(name)
    print(f"{time.perf_counter() - begun:.0f} seconds")


def arguments() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    tables = [*TABLES, *DEMO_TABLES]
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS])
    parser.add_argument("--tables", nargs="+", choices=tables, default=tables)
    parser.add_argument("--tokens", type=int, default=2048, help="of the held-out text")
    parser.add_argument("--chat-tokens", type=int, default=1024, help="of the conversations")
    parser.add_argument(
        "--quick", action="store_true", help="half the tokens, and no contender that takes minutes"
    )
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
    return parser


def measured(model: str, source: str | None, options: argparse.Namespace) -> dict[str, Measurement]:
    """Returns a model's measurements by contender.

    Args:
        model: of `MODELS`.
        source: the model's folder; None to measure nothing and take what is kept.
        options: of the command line.
    """
    tokens = {HELD_OUT: options.tokens, CHAT: options.chat_tokens}
    if options.quick:
        tokens = {text: min(count, QUICK_TOKENS) for text, count in tokens.items()}
    kept = Kept(options.folder / "measured" / model / "-".join(map(str, tokens.values())))
    yardstick = None
    if source is not None:
        yardstick = Yardstick(model, source, tokens)
        sizes = ", ".join(f"{text.tokens} tokens of {n}" for n, text in yardstick.texts.items())
        print(f"\n{yardstick.title}: {sizes}\n{line_up(HEADER, WIDTHS)}", flush=True)
    found: dict[str, Measurement] = {}
    for contender in every_contender(found, options.folder):
        if yardstick is None or not is_asked(contender, options):
            known = kept.read(contender.name)
        else:
            known = kept.read(contender.name, contender.depends_on(yardstick))
            if known is None:
                with redirect_stderr(io.StringIO()):  # peers draw bars of progress and warn
                    known = contender.measure(yardstick)
                kept.write(known)
            show(known)
        if known is not None:
            found[contender.name] = known
    return found


def every_contender(found: Mapping[str, Measurement], folder: Path) -> Iterator[Contender]:
    """Yields the contenders; mixed plans at a peer's bytes once the peer is among those found."""
    yield from contenders.recipes()
    yield from contenders.peers(folder)
    matched = {}
    for file_type in MATCHED:
        peer = found.get(f"llama.cpp {file_type}")
        if peer is not None and not peer.refused:
            matched[f"{file_type}'s bytes"] = peer.bits
    budgets = {f"{bits} bits": bits for bits in BUDGETS}
    for title, bits in {"4.5 bits": 4.5, **matched}.items():
        yield contenders.mixed_at("mixed", bits, f"mixed at {title}")
    for title, bits in {**budgets, **matched}.items():
        yield contenders.mixed_at("mixed-gptq", bits, f"mixed-gptq at {title}")


def is_asked(contender: Contender, options: argparse.Namespace) -> bool:
    """Whether a contender is to be measured."""
    skipped = [*options.skip, *(SLOW if options.quick else ())]
    return (
        (PEER if contender.kind == PEER else "own") in options.kinds
        and any(part in contender.name for part in options.only)
        and not any(part in contender.name for part in skipped)
    )


def show(known: Measurement) -> None:
    """Prints a row for people who watch."""
    if known.refused:
        print(f"{known.contender}: left out: {known.refused}", flush=True)
    for name, text in known.texts.items():
        scores = text.scores
        cells = [
            known.contender if name == HELD_OUT else f"  {name}",
            f"{known.bits:.4f}",
            scores.kl_mean.show(5),
            scores.perplexity_ratio.show(4),
            scores.agreement.show(2, 0.01),
            f"{known.seconds:.0f}" if name == HELD_OUT else "",
        ]
        print(line_up(cells, WIDTHS), flush=True)


if __name__ == "__main__":
    main()
