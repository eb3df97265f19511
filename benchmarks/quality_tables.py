"""Tables of quality with the models side by side, from measurements."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from contenders import AS_IT_COMES, BUDGETS, CALIBRATED, DATA_FREE, MIXED, OWN_TEXT, PEER
from curve_picture import Series, write_picture
from measurements import Measurement
from pages import write_block
from yardstick import CHAT, HELD_OUT, MODELS

Found = Mapping[str, Mapping[str, Measurement]]
"""By model and contender."""
Rows = list[list[str]]
NONE: Final = "-"
INTERVALS: Final = "± is half a 95 % interval by bootstrap over blocks of 256 tokens"
FEWEST: Final = 0.7  # of a peer's bytes, for a comparison at equal bytes
PICTURE: Final = "kl-by-bits.svg"


@dataclass(frozen=True)
class Table:
    """A block of the page.

    Attributes:
        rows: makes the table, titles first.
        about: a sentence or two on how to read it.
        needs: ``peer`` and ``own``: which contenders it shows.
    """

    rows: Callable[[Found], Rows]
    about: str
    needs: tuple[str, ...] = (PEER, "own")


def write_table(name: str, found: Found) -> None:
    """Writes a table's block of the page, if anything of it was measured.

    Args:
        name: a key of `TABLES`.
        found: what was measured.
    """
    table = TABLES[name]
    rows = table.rows(found)
    if len(rows) < 2:
        print(f"{name}: nothing of it was measured, so its block stays as it is")
        return
    page = write_block(
        name,
        rows,
        f"{texts_of(found)} {table.about}",
        command=["make", "bench-quality", f"TABLES={name}"],
        measured=measured_when(found),
    )
    if name == "curves":
        write_picture(page.with_name(PICTURE), panels(found))
    print(f"{name}: written")


def measured_when(found: Found) -> str:
    """Returns when and on which machines the measurements were made."""
    every = [one for by_name in found.values() for one in by_name.values()]
    days = sorted({one.day for one in every})
    machines = " and ".join(sorted({one.machine for one in every}))
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    return f"{when} on {machines}"


def texts_of(found: Found) -> str:
    """Returns a sentence on each model's text."""
    parts = []
    for model, by_name in found.items():
        held = next((one.texts[HELD_OUT] for one in by_name.values() if one.texts), None)
        if held is not None:
            parts.append(
                f"{MODELS[model]}: {held.tokens:,} held-out tokens, FLOAT perplexity "
                f"{held.perplexity:.2f}"
            )
    return f"{'; '.join(parts)}; {INTERVALS}."


def names_of(found: Found, kinds: Sequence[str]) -> list[str]:
    """Returns the contenders of some kinds that any model has scores of, in order."""
    names: dict[str, None] = {}
    for kind in kinds:
        for by_name in found.values():
            for one in by_name.values():
                if one.kind == kind and not one.refused:
                    names[one.contender] = None
    return list(names)


def scores_rows(kinds: Sequence[str]) -> Callable[[Found], Rows]:
    """Returns a function that makes rows of all scores on the held-out text."""

    def made(found: Found) -> Rows:
        header = [""]
        for model in found:
            header += [f"{MODELS[model]}: bits", "KL mean", "top-1 %", "perplexity x"]
        rows = [header]
        for name in names_of(found, kinds):
            row = [shown(name, kinds != (PEER,))]
            for by_name in found.values():
                row += _score_cells(by_name.get(name))
            rows.append(row)
        return rows

    return made


def _score_cells(one: Measurement | None) -> list[str]:
    if one is None or one.refused:
        return [NONE] * 4
    scores = one.texts[HELD_OUT].scores
    return [
        f"{one.bits:.3f}",
        scores.kl_mean.show(_digits(scores.kl_mean.value)),
        scores.agreement.show(1, 0.01),
        scores.perplexity_ratio.show(3),
    ]


def _digits(value: float) -> int:
    return 3 if value >= 0.1 else 4 if value >= 0.01 else 5


def equal_bytes(found: Found) -> Rows:
    """Returns, for each peer, EdgeForge's best at no more bytes and how its divergence compares."""
    header = ["peer"]
    for model in found:
        header += [
            *(f"{MODELS[model]}: bits", "weights alone", "own text"),
            *("formats chosen on a text", "calibrated"),
        ]
    rows = [header]
    for name in names_of(found, (PEER,)):
        row = [name]
        for by_name in found.values():
            peer = by_name.get(name)
            if peer is None or peer.refused:
                row += [NONE] * 5
                continue
            row.append(f"{peer.bits:.3f}")
            plain = best_within(by_name, DATA_FREE, peer.bits)
            row.append(versus(plain, peer))
            for kind in (OWN_TEXT, MIXED, CALIBRATED):
                best = best_within(by_name, kind, peer.bits)
                pays = best is not None and (plain is None or _kl(best) < _kl(plain))
                row.append(versus(best if pays else None, peer))
        rows.append(row)
    return rows


def best_within(by_name: Mapping[str, Measurement], kind: str, bits: float) -> Measurement | None:
    """Returns the contender of a kind with the least divergence at about these bits, or None.

    It may take no more, and not much less: half the bytes are another question.
    """
    return min(
        (
            one
            for one in by_name.values()
            if one.kind == kind and not one.refused and FEWEST * bits <= one.bits <= bits + 1e-9
        ),
        key=_kl,
        default=None,
    )


def _kl(one: Measurement) -> float:
    return one.texts[HELD_OUT].scores.kl_mean.value


def versus(ours: Measurement | None, peer: Measurement) -> str:
    """Returns our contender and how far its divergence lies above the peer's, in percent."""
    if ours is None:
        return NONE
    above = ours.texts[HELD_OUT].scores.kl_above(peer.texts[HELD_OUT].scores)
    percent = f"{above.show(0, 0.01)} %"
    if above.value > 0:
        percent = f"**+{percent}**"
    return f"{percent} {shown(ours.contender)}"


def shown(name: str, is_own: bool = True) -> str:
    """Returns a contender's name as the page writes it.

    >>> shown("int4, ONNX"), shown("mixed at 4.5 bits"), shown("llama.cpp Q4_0", False)
    ('`int4`, ONNX', '`mixed` at 4.5 bits', 'llama.cpp Q4_0')
    """
    return re.sub(r"^[\w-]+", r"`\g<0>`", name) if is_own else name


def chat(found: Found) -> Rows:
    """Returns the divergence on chat beside that on the held-out text."""
    rows = [
        [
            *("model, contender", "bits", "held-out: KL mean", "chat: KL mean"),
            *("chat: top-1 %", "chat: perplexity x"),
        ]
    ]
    for model, by_name in found.items():
        for name in names_of({model: by_name}, (DATA_FREE, OWN_TEXT, MIXED, CALIBRATED, PEER)):
            one = by_name[name]
            if CHAT not in one.texts:
                continue
            held, talk = (one.texts[text].scores for text in (HELD_OUT, CHAT))
            rows.append(
                [
                    f"{MODELS[model]}, {shown(name, one.kind != PEER)}",
                    f"{one.bits:.3f}",
                    held.kl_mean.show(_digits(held.kl_mean.value)),
                    talk.kl_mean.show(_digits(talk.kl_mean.value)),
                    talk.agreement.show(1, 0.01),
                    talk.perplexity_ratio.show(3),
                ]
            )
    return rows


def curves(found: Found) -> Rows:
    """Returns the least divergence of each side at no more than so many bits a weight."""
    header = ["at most"]
    for model in found:
        header += [f"{MODELS[model]}: {bits} bits" for bits in BUDGETS]
    rows = [header]
    for side, is_of in SIDES.items():
        row = [side]
        for by_name in found.values():
            of_side = {name: one for name, one in by_name.items() if is_of(one)}
            row += [_least(of_side, bits) for bits in BUDGETS]
        if any(cell != NONE for cell in row[1:]):
            rows.append(row)
    return rows


def _least(by_name: Mapping[str, Measurement], bits: float) -> str:
    within = [one for one in by_name.values() if not one.refused and one.bits <= bits + 1e-9]
    if not within:
        return NONE
    best = min(within, key=lambda one: one.texts[HELD_OUT].scores.kl_mean.value)
    kl = best.texts[HELD_OUT].scores.kl_mean
    return f"{kl.show(_digits(kl.value))} {_short(best)}"


def _short(one: Measurement) -> str:
    return "" if one.kind == MIXED else shown(one.contender, one.kind != PEER)


def _begins(*starts: str) -> Callable[[Measurement], bool]:
    return lambda one: one.kind == PEER and one.contender.startswith(starts)


SIDES: Final[Mapping[str, Callable[[Measurement], bool]]] = {
    "EdgeForge, weights alone": lambda one: one.kind == DATA_FREE,
    "EdgeForge, own text": lambda one: one.kind == OWN_TEXT,
    "EdgeForge, `mixed`": lambda one: one.kind == MIXED,
    "EdgeForge, calibrated": lambda one: one.kind == CALIBRATED,
    "onnxruntime": lambda one: (
        _begins("genai", "onnxruntime")(one) and one.contender != AS_IT_COMES
    ),
    "llama.cpp": _begins("llama.cpp"),
    "torchao": _begins("torchao"),
}

_TOOL: Final = re.compile(r"^(genai builder|onnxruntime|llama\.cpp|torchao) ")
COLORS: Final = ("#1f77b4", "#41b6c4", "#6baed6", "#08306b", "#d95f02", "#1b9e77", "#7570b3")


def panels(found: Found) -> dict[str, list[Series]]:
    """Returns what the picture of the curves shows, by the model's title."""
    made = {}
    for model, by_name in found.items():
        series = []
        for (side, is_of), color in zip(SIDES.items(), COLORS, strict=True):
            points = {
                _TOOL.sub("", name): (one.bits, one.texts[HELD_OUT].scores.kl_mean.value)
                for name, one in by_name.items()
                if is_of(one) and not one.refused
            }
            ours = side.startswith("EdgeForge")
            series.append(Series(side.replace("`", ""), color, points, ours))
        made[MODELS[model]] = series
    return made


TABLES: Final = {
    "recipes": Table(
        scores_rows((DATA_FREE, OWN_TEXT, MIXED, CALIBRATED)),
        "Recipes that look at weights alone come first, then those that choose integers on what "
        "the model itself writes, then mixed plans, then those that choose integers on the "
        "calibration text. A dash was not measured: the groups of that recipe do not divide the "
        "model's rows, or the search takes too long.",
        ("own",),
    ),
    "peers": Table(
        scores_rows((PEER,)),
        "A dash was not measured: the groups of that format do not divide the rows, or the peer "
        "takes too long.",
        (PEER,),
    ),
    "equal-bytes": Table(
        equal_bytes,
        "A cell is EdgeForge's recipe with the least KL at no more bytes than the peer, and at "
        "least 0.7 of them, and its mean KL relative to the peer's: below 0, EdgeForge is nearer "
        "to FLOAT. Intervals are of the paired ratio. Under `own text` are recipes calibrated on "
        "what the model itself writes. A text that gains nothing over the weights alone has a "
        "dash.",
    ),
    "chat": Table(
        chat,
        "The conversations are in `benchmarks/conversations.json`; a model without a chat template "
        "is left out.",
    ),
    "curves": Table(
        curves,
        "A cell is the least mean KL at no more bits a weight, and what has it.",
    ),
}
