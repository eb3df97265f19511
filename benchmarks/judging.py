"""How far quantized weights lie from FLOAT on a text: figures with intervals, contenders in pairs.

FLOAT and QUANTIZED logits of the reference operators; no runtime takes part. Tokens of one block of
text are not independent, so intervals come from a bootstrap over blocks: blocks are drawn with
replacement, `RESAMPLES` times, and the middle 95 % of what each draw gives is the interval. The
draws are the same for all contenders, so differences between two of them have intervals too, and
narrow ones: a block that is hard for one is hard for the other.
"""

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
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
    """What a contender's logits were, block by block.

    Attributes:
        kl: KL(FLOAT || contender) of every token, nats, ``[blocks, BLOCK]``.
        excess: negative log likelihood above FLOAT's, nats a token, ``[blocks]``.
        top1: share of tokens whose likeliest successor is FLOAT's, ``[blocks]``.
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
        """Mean divergence, nats a token."""
        means = self.kl.mean(1)
        return self._figure(lambda draw: float(means[draw].mean()))

    @cached_property
    def kl_p99(self) -> Figure:
        """The 99th percentile of tokens' divergences."""
        return self._figure(lambda draw: float(np.quantile(self.kl[draw], 0.99)))

    @cached_property
    def perplexity_ratio(self) -> Figure:
        """Perplexity over FLOAT's."""
        return self._figure(lambda draw: float(np.exp(self.excess[draw].mean())))

    @cached_property
    def agreement(self) -> Figure:
        """Share of tokens with the same likeliest successor."""
        return self._figure(lambda draw: float(self.top1[draw].mean()))

    def kl_above(self, other: "Scores") -> Figure:
        """How far this mean divergence lies above another contender's, as a share of the other's.

        Both were judged by the same judge.
        """
        mine, theirs = self.kl.mean(1), other.kl.mean(1)
        return self._figure(lambda draw: float(mine[draw].mean() / theirs[draw].mean() - 1))


class Judge:
    """FLOAT on a text, against which quantized weights are held.

    Args:
        model: opened.
        text: a file.
        tokens: how many of its tokens to use; whole blocks of them are taken.
        context: of the traced program, `BLOCK` at least.
    """

    def __init__(self, model: Model, text: Path, tokens: int, context: int = BLOCK) -> None:
        tokenizer = Tokenizer(
            model.checkpoint.tokenizer_files.get("tokenizer.json"), model.checkpoint.source
        )
        head = [] if model.spec.bos is None else [model.spec.bos]
        step = BLOCK - len(head)
        found = tokenizer.encode(read_text(text), special=False)[:tokens]
        starts = range(0, len(found) - step + 1, step)
        if len(starts) < 2:
            raise SystemExit(f"{text} has {len(found)} tokens; two blocks of {step} are needed")
        self._blocks = [torch.tensor(head + found[at : at + step]) for at in starts]
        self.model, self.program = model, trace(model.spec, max(BLOCK, context))
        self.tokens = step * len(starts)
        self._wanted = [Scored(logits) for logits in self._logits({})]
        self._likelihood = [
            _likelihood(scored, block)
            for scored, block in zip(self._wanted, self._blocks, strict=True)
        ]
        mean = float(np.mean(self._likelihood))
        self.perplexity = float(np.exp(-mean))

    def title(self) -> str:
        """What is measured, for the line above a table."""
        return (
            f"{self.tokens} held-out tokens in {len(self._blocks)} blocks; FLOAT perplexity "
            f"{self.perplexity:.4f}; ± is half a 95 % interval by bootstrap over blocks"
        )

    def judge(self, replaced: Mapping[str, torch.Tensor]) -> Scores:
        """The scores of a model some of whose weights have other values."""
        return self._scores(self._logits(replaced))

    def judge_store(self, program: Program, plan: QuantPlan, store: WeightStore) -> Scores:
        """The scores of a filled store.

        Args:
            program: in the float dialect, of the weights that were stored.
            plan: of the store.
            store: filled.
        """
        runner = ReferenceRunner(quantize_program(program, plan), store_reader(store))
        return self._scores(runner.logits(self._blocks))

    def _logits(self, replaced: Mapping[str, torch.Tensor]) -> Iterator[torch.Tensor]:
        def read(name: str) -> torch.Tensor:
            return replaced[name] if name in replaced else self.model.weights.float_weight(name)

        runner = ReferenceRunner(
            self.program,
            lambda given: read(given.name),
            lambda name, tokens: read(name)[tokens],
        )
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


def _likelihood(scored: Scored, block: torch.Tensor) -> float:
    """Mean log likelihood of a block's tokens but the first."""
    chosen = scored.log_probabilities[:-1].gather(-1, block[1:, None])
    return float(chosen.double().mean())


@dataclass(frozen=True)
class Filled:
    """A store, and what filling it took, seconds."""

    store: WeightStore
    seconds: float


@contextmanager
def filled_store(
    model: Model, program: Program, plan: QuantPlan, calibration: Calibration
) -> Iterator[Filled]:
    """Quantizes a model into a store that lasts as long as the context.

    Args:
        model: opened.
        program: its, in the float dialect, of a context no shorter than the calibration's.
        plan: what to make of each weight.
        calibration: for the weights whose quantizers need one.
    """
    run = CalibrationRun(model, calibration, lambda: program)
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        with partial_store(Path(folder), "store", plan, model.weights.shapes()) as partial:
            fill_calibrated(run, plan, partial, None, lambda stage, done, size: None)
        seconds = time.perf_counter() - begun
        yield Filled(WeightStore(Path(folder) / "store"), seconds)
