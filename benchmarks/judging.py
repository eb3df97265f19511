"""Measures how far quantized weights lie from FLOAT on a text: figures with intervals, also paired.

The reference operators compute the FLOAT and QUANTIZED logits; no runtime takes part. Tokens of one
block of text are not independent, so intervals come from a bootstrap over blocks: it draws blocks
with replacement, `RESAMPLES` times, and the middle 95 % of the draws' results is the interval. The
draws are the same for all contenders, so the ratio of two contenders has an interval too. It is
narrow, because a block that is hard for one is hard for the other.
"""

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np
import torch

from edgeforge.calibration.fill import fill_calibrated
from edgeforge.calibration.text import Calibration, CalibrationRun
from edgeforge.model.model import Model
from edgeforge.model.trace import trace
from edgeforge.reference.walk import ReferenceRunner, store_reader
from edgeforge.tokenizer import Tokenizer, read_text
from edgeforge.verification.metrics import Scored
from quant.plans.plan import QuantPlan
from quant.program.program import Program
from quant.program.rewrite import quantize_program
from quant.store.partial import partial_store
from quant.store.store import WeightStore

BLOCK: Final = 256
RESAMPLES: Final = 1000


@dataclass(frozen=True)
class Figure:
    """A number and its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def margin(self) -> float:
        """Half the interval's width."""
        return (self.high - self.low) / 2

    def show(self, digits: int, scale: float = 1.0) -> str:
        """The number and its margin, divided by ``scale``.

        >>> Figure(0.5, 0.4, 0.6).show(2)
        '0.50 ±0.10'
        """
        return f"{self.value / scale:.{digits}f} ±{self.margin / scale:.{digits}f}"


@dataclass(frozen=True)
class Scores:
    """A contender's scores, block by block.

    Attributes:
        kl: KL(FLOAT || contender) of every token, nats, ``[blocks, BLOCK]``.
        excess: negative log likelihood above FLOAT's, nats per token, ``[blocks]``.
        top1: share of tokens with the same likeliest next token as FLOAT's, ``[blocks]``.
    """

    kl: np.ndarray
    excess: np.ndarray
    top1: np.ndarray

    @cached_property
    def _draws(self) -> np.ndarray:
        blocks = len(self.kl)
        return np.random.default_rng(0).integers(0, blocks, (RESAMPLES, blocks))

    def _figure(self, of: Callable[[np.ndarray], float]) -> Figure:
        found = [of(draw) for draw in self._draws]
        low, high = np.quantile(found, [0.025, 0.975])
        return Figure(of(np.arange(len(self.kl))), float(low), float(high))

    @cached_property
    def kl_mean(self) -> Figure:
        """Mean divergence, nats per token."""
        means = self.kl.mean(1)
        return self._figure(lambda draw: float(means[draw].mean()))

    @cached_property
    def kl_p99(self) -> Figure:
        """The 99th percentile of tokens' divergences, nats."""
        return self._figure(lambda draw: float(np.quantile(self.kl[draw], 0.99)))

    @cached_property
    def perplexity_ratio(self) -> Figure:
        """Perplexity divided by FLOAT's."""
        return self._figure(lambda draw: float(np.exp(self.excess[draw].mean())))

    @cached_property
    def agreement(self) -> Figure:
        """Share of tokens with the same likeliest next token as FLOAT's."""
        return self._figure(lambda draw: float(self.top1[draw].mean()))

    def kl_above(self, other: "Scores") -> Figure:
        """The mean divergence's excess over another contender's, as a share of the other's.

        The same judge must have judged both.
        """
        mine, theirs = self.kl.mean(1), other.kl.mean(1)
        return self._figure(lambda draw: float(mine[draw].mean() / theirs[draw].mean() - 1))


class Judge:
    """Runs FLOAT on blocks of text once and compares quantized weights with it.

    Args:
        model: an opened model.
        blocks: `BLOCK` tokens each; a text of its own each.
        context: context of the traced program in tokens, raised to `BLOCK` if smaller.
        front: how many tokens at the front of each block the tokenizer added.
        program: the model's program in the float dialect, if it is there already.
    """

    def __init__(
        self,
        model: Model,
        blocks: Sequence[torch.Tensor],
        context: int = BLOCK,
        front: int = 0,
        program: Program | None = None,
    ) -> None:
        self._blocks = list(blocks)
        self.model = model
        self.program = program or trace(model.spec, max(BLOCK, context))
        self.tokens = (BLOCK - front) * len(self._blocks)
        self._wanted = [Scored(logits) for logits in self._logits({}, {})]
        self._likelihood = [
            _likelihood(scored, block)
            for scored, block in zip(self._wanted, self._blocks, strict=True)
        ]
        mean = float(np.mean(self._likelihood))
        self.perplexity = float(np.exp(-mean))

    @classmethod
    def of_text(cls, model: Model, text: Path, tokens: int, context: int = BLOCK) -> "Judge":
        """Returns a judge on the first tokens of a text file, rounded down to whole blocks.

        Raises:
            SystemExit: the text has fewer than two blocks of tokens.
        """
        blocks, front = text_blocks(model, text, tokens)
        return cls(model, blocks, context, front)

    def title(self) -> str:
        """Returns the line above a table: what is measured."""
        return (
            f"{self.tokens} held-out tokens in {len(self._blocks)} blocks; FLOAT perplexity "
            f"{self.perplexity:.4f}; ± is half a 95 % interval by bootstrap over blocks"
        )

    def judge(
        self,
        replaced: Mapping[str, torch.Tensor],
        looked_up: Mapping[str, torch.Tensor] | None = None,
    ) -> Scores:
        """Returns the scores of the model with some weights replaced by other values.

        Args:
            replaced: the values by weight.
            looked_up: the values of an embedding where tokens are looked up; None for the same. A
                tied embedding's other use is the head.
        """
        return self._scores(self._logits(replaced, replaced if looked_up is None else looked_up))

    def judge_store(self, program: Program, plan: QuantPlan, store: WeightStore) -> Scores:
        """Returns the scores of a filled store.

        Args:
            program: the program in the float dialect that reads the stored weights.
            plan: the store's plan.
            store: the filled store.
        """
        runner = ReferenceRunner(quantize_program(program, plan), store_reader(store))
        return self._scores(runner.logits(self._blocks))

    def _logits(
        self, replaced: Mapping[str, torch.Tensor], looked_up: Mapping[str, torch.Tensor]
    ) -> Iterator[torch.Tensor]:
        weights = self.model.weights

        def read(name: str) -> torch.Tensor:
            return replaced[name] if name in replaced else weights.float_weight(name)

        def rows(name: str, tokens: torch.Tensor) -> torch.Tensor:
            found = looked_up.get(name)
            return weights.float_rows(name, tokens) if found is None else found[tokens]

        runner = ReferenceRunner(self.program, lambda given: read(given.name), rows)
        yield from runner.logits(self._blocks)

    def _scores(self, found: Iterable[torch.Tensor]) -> Scores:
        kl, excess, top1 = [], [], []
        for block, wanted, before, logits in zip(
            self._blocks, self._wanted, self._likelihood, found, strict=True
        ):
            scored = Scored(logits)
            one, other = wanted.log_probabilities, scored.log_probabilities
            kl.append((one.exp() * (one - other)).sum(-1).clamp_min(0).double().numpy())
            excess.append(before - _likelihood(scored, block))
            top1.append(float((wanted.choice == scored.choice).double().mean()))
        return Scores(np.stack(kl), np.array(excess), np.array(top1))


def text_blocks(model: Model, text: Path, tokens: int) -> tuple[list[torch.Tensor], int]:
    """Returns blocks of a text's first tokens, and how many tokens the tokenizer adds to each.

    Args:
        model: an opened model.
        text: a text file.
        tokens: how many of its tokens to use, rounded down to whole blocks.

    Raises:
        SystemExit: the text has fewer than two blocks of tokens.
    """
    tokenizer = Tokenizer(
        model.checkpoint.tokenizer_files.get("tokenizer.json"), model.checkpoint.source
    )
    head = list(tokenizer.added()[0])  # as `edgeforge verify` begins its blocks
    step = BLOCK - len(head)
    found = tokenizer.encode(read_text(text), special=False)[:tokens]
    starts = range(0, len(found) - step + 1, step)
    if len(starts) < 2:
        raise SystemExit(f"{text} has {len(found)} tokens; two blocks of {step} are needed")
    return [torch.tensor(head + found[at : at + step]) for at in starts], len(head)


def _likelihood(scored: Scored, block: torch.Tensor) -> float:
    """Returns the mean log likelihood of a block's tokens, without the first."""
    chosen = scored.log_probabilities[:-1].gather(-1, block[1:, None])
    return float(chosen.double().mean())


@dataclass(frozen=True)
class Filled:
    """A filled store, and the seconds that filling took."""

    store: WeightStore
    seconds: float


@contextmanager
def filled_store(
    model: Model, program: Program, plan: QuantPlan, calibration: Calibration
) -> Iterator[Filled]:
    """Quantizes a model into a temporary store, which is removed at the end of the block.

    Args:
        model: an opened model.
        program: the model's program in the float dialect; its context is no shorter than the
            calibration's sequences.
        plan: the format and algorithm of each weight.
        calibration: the calibration text, for the weights whose quantizers need one.
    """
    run = CalibrationRun(model, calibration, lambda: program)
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        with partial_store(Path(folder), "store", plan, model.weights.shapes()) as partial:
            fill_calibrated(run, plan, partial, None, lambda stage, done, size: None)
        seconds = time.perf_counter() - begun
        yield Filled(WeightStore(Path(folder) / "store"), seconds)
