"""How far two models' logits are apart, token by token."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log likelihood; ``tokens`` predictions."""

    value: float
    tokens: int


@dataclass(frozen=True)
class Divergence:
    """A candidate's logits against a reference's, over the same tokens.

    Attributes:
        tokens: positions compared.
        kl_mean: Kullback-Leibler divergence KL(reference || candidate), nats a token.
        kl_p99: its 99th percentile.
        kl_max: its maximum.
        top1_agreement: share of positions whose most likely token is the same.
        top5_overlap: mean share of the reference's five likeliest that the candidate has too.
        max_difference: largest absolute difference of two logits.
        rms_difference: root of the mean square difference.
        logits_range: largest minus smallest logit of the reference: the unit of the two above.
    """

    tokens: int
    kl_mean: float
    kl_p99: float
    kl_max: float
    top1_agreement: float
    top5_overlap: float
    max_difference: float
    rms_difference: float
    logits_range: float

    @property
    def relative_difference(self) -> float:
        """``max_difference`` as a share of the logits' range."""
        return self.max_difference / self.logits_range if self.logits_range else 0.0


class Scored:
    """Logits ``float32[t, vocab]`` with what several comparisons need of them, computed once."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    @classmethod
    def of(cls, logits: Tensor | Scored) -> Scored:
        """The given logits, wrapped if they are not."""
        return logits if isinstance(logits, Scored) else cls(logits)

    @cached_property
    def log_probabilities(self) -> Tensor:
        """``float32[t, vocab]``."""
        return self.logits.log_softmax(-1)

    @cached_property
    def top(self) -> Tensor:
        """The likeliest five tokens, best first: ``int64[t, 5]`` (fewer of a tiny vocabulary)."""
        return self.logits.topk(min(5, self.logits.shape[-1]), -1).indices

    @cached_property
    def is_finite(self) -> bool:
        """Whether no logit is NaN or infinite."""
        low, high = self.logits.aminmax()  # both are NaN where any logit is
        return math.isfinite(float(low)) and math.isfinite(float(high))

    @cached_property
    def bad_positions(self) -> list[int]:
        """The positions of which a logit is NaN or infinite."""
        if self.is_finite:
            return []
        return [int(at) for at in (~self.logits.isfinite()).any(-1).nonzero()]

    @cached_property
    def choice(self) -> Tensor:
        """The likeliest token, ``int64[t]``."""
        return self.logits.argmax(-1)


@dataclass
class PerplexityMeter:
    """Adds up negative log likelihoods."""

    total: float = 0.0
    tokens: int = 0

    def add(self, logits: Tensor | Scored, targets: Tensor) -> Tensor:
        """Adds ``float32[t, v]`` logits and the tokens after them, ``int64[t]`` or fewer.

        Returns:
            What was added: negative log likelihoods, nats, ``float32`` of the targets' shape.
        """
        rows = Scored.of(logits).log_probabilities[: len(targets)]
        losses = -rows.gather(-1, targets[:, None])[:, 0]
        self.total += float(losses.double().sum())
        self.tokens += len(targets)
        return losses

    def result(self) -> Perplexity:
        """The perplexity so far."""
        if not self.tokens:
            return Perplexity(math.nan, 0)
        mean = self.total / self.tokens
        return Perplexity(math.exp(mean) if mean < 700 else math.inf, self.tokens)


@dataclass
class DivergenceMeter:
    """Compares logits block by block, keeping one number a token."""

    # One buffer that grows: a small tensor a block would lie between blocks of logits, and the
    # allocator could not give the room that they leave to the next.
    _kl: array[float] = field(default_factory=lambda: array("f"))
    _top1: int = 0
    _top5: float = 0.0
    _max: float = 0.0
    _squares: float = 0.0
    _count: int = 0
    _low: float = math.inf
    _high: float = -math.inf

    def add(self, reference: Tensor | Scored, candidate: Tensor | Scored) -> Tensor:
        """Adds two ``float32[t, v]``.

        Returns:
            What was added of each position, ``float32[t, 3]``: the divergence in nats, whether the
            most likely token is the same, and the share of the five likeliest that is.
        """
        one, other = Scored.of(reference), Scored.of(candidate)
        # torch's kl_div(input, target) is KL(target || input), element by element.
        kl = torch.nn.functional.kl_div(
            other.log_probabilities, one.log_probabilities, reduction="none", log_target=True
        ).sum(-1)
        # A divergence is never negative; what rounding leaves below zero is noise around it.
        kl = kl.clamp_min(0)
        self._kl.frombytes(kl.numpy().tobytes())
        same = (one.choice == other.choice).float()
        self._top1 += int(same.sum())
        shared = (one.top[..., :, None] == other.top[..., None, :]).any(-1).float().mean(-1)
        self._top5 += float(shared.sum())
        difference = one.logits - other.logits
        low, high = difference.aminmax()
        self._max = max(self._max, -float(low), float(high))
        # A row's sum is short enough for float32; the sum of rows is not.
        self._squares += float(difference.square_().sum(-1).double().sum())
        self._count += difference.numel()
        low, high = one.logits.aminmax()
        self._low, self._high = min(self._low, float(low)), max(self._high, float(high))
        return torch.stack((kl, same, shared), -1)

    def result(self) -> Divergence:
        """The comparison so far."""
        kl = torch.tensor(self._kl, dtype=torch.float64)
        return Divergence(
            tokens=len(kl),
            kl_mean=float(kl.mean()),
            kl_p99=float(torch.quantile(kl, 0.99)) if len(kl) < 1 << 24 else float(kl.max()),
            kl_max=float(kl.max()),
            top1_agreement=self._top1 / len(kl),
            top5_overlap=self._top5 / len(kl),
            max_difference=self._max,
            rms_difference=math.sqrt(self._squares / self._count),
            logits_range=self._high - self._low,
        )
