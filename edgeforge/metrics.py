"""How far two models' logits are apart, token by token."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

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


@dataclass
class PerplexityMeter:
    """Adds up negative log likelihoods."""

    total: float = 0.0
    tokens: int = 0

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """Adds ``float32[t, v]`` logits whose next tokens are ``int64[t]``."""
        loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        self.total += float(loss)
        self.tokens += len(targets)

    def result(self) -> Perplexity:
        """The perplexity so far."""
        mean = self.total / self.tokens if self.tokens else math.nan
        return Perplexity(math.exp(mean) if mean < 700 else math.inf, self.tokens)


@dataclass
class DivergenceMeter:
    """Compares logits block by block, keeping one number a token."""

    _kl: list[Tensor] = field(default_factory=list)
    _top1: int = 0
    _top5: float = 0.0
    _max: float = 0.0
    _squares: float = 0.0
    _count: int = 0
    _low: float = math.inf
    _high: float = -math.inf

    def add(self, reference: Tensor, candidate: Tensor) -> None:
        """Adds two ``float32[t, v]``."""
        log_p = reference.log_softmax(-1)
        log_q = candidate.log_softmax(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        # A divergence is never negative; what rounding leaves below zero is noise around it.
        self._kl.append(kl.clamp_min(0))
        self._top1 += int((reference.argmax(-1) == candidate.argmax(-1)).sum())
        k = min(5, reference.shape[-1])
        top = reference.topk(k, -1).indices
        found = candidate.topk(k, -1).indices
        shared = (top[..., :, None] == found[..., None, :]).any(-1)
        self._top5 += float(shared.float().mean(-1).sum())
        difference = (reference - candidate).abs()
        self._max = max(self._max, float(difference.max()))
        self._squares += float(difference.double().square().sum())
        self._count += difference.numel()
        self._low = min(self._low, float(reference.min()))
        self._high = max(self._high, float(reference.max()))

    def result(self) -> Divergence:
        """The comparison so far."""
        kl = torch.cat(self._kl).double()
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
