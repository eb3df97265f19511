"""Orthogonal matrices that spread outliers over all coordinates, and are cheap to apply.

QuaRot (arXiv 2404.00456) and SpinQuant (arXiv 2405.16406) rotate what flows between a model's
linears by a Hadamard matrix with random signs. Folded into the weights on both sides it changes no
output, but it mixes columns of different size, so that a few large ones no longer set the scale of
a whole group.

A rotation of ``n`` coordinates is ``diag(signs) (F1 x F2 x ...)``, a Kronecker product of small
orthogonal factors, so that a matrix is rotated by a few small products instead of one of ``n``
columns.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache

import torch

ROTATION_VERSION = 1

# Sylvester's matrices beyond this order are products of smaller ones: fewer multiplications.
_LARGEST_SYLVESTER = 64


@dataclass(frozen=True)
class Rotation:
    """An orthogonal matrix ``Q``, the same but for signs in every block of its diagonal.

    Attributes:
        signs: float64 ``[width]`` of 1 and -1.
        factors: orthogonal float64 matrices, whose Kronecker product is one block.
    """

    signs: torch.Tensor
    factors: tuple[torch.Tensor, ...]

    @property
    def width(self) -> int:
        """Number of coordinates."""
        return len(self.signs)

    @property
    def block(self) -> int:
        """Number of coordinates that are mixed with each other."""
        return math.prod(len(factor) for factor in self.factors)

    def rotate_columns(self, weight: torch.Tensor) -> torch.Tensor:
        """``W Q``: float64 ``[rows, width]`` of any float ``[rows, width]``."""
        rotated = (weight.double() * self.signs).reshape(-1, *map(len, self.factors))
        for factor in self.factors:  # each takes the first axis and appends its own: a full turn
            rotated = torch.tensordot(rotated, factor, dims=([1], [0]))
        return rotated.reshape(weight.shape)

    def rotate_rows(self, weight: torch.Tensor) -> torch.Tensor:
        """``Q^T W``: float64 ``[width, columns]`` of any float ``[width, columns]``."""
        return self.rotate_columns(weight.t()).t()

    def part(self, start: int, stop: int) -> Rotation:
        """The rotation of coordinates ``start`` to ``stop``, which are whole blocks."""
        assert start % self.block == stop % self.block == 0
        return Rotation(self.signs[start:stop], self.factors)

    def repeated(self, times: int) -> Rotation:
        """Every block as often as this, one after the other: what query heads of a group read."""
        blocks = self.signs.reshape(-1, 1, self.block)
        return Rotation(blocks.expand(-1, times, -1).reshape(-1), self.factors)


def random_hadamard(width: int, seed: str, blocks: int = 1) -> Rotation:
    """A Hadamard rotation with random signs.

    A width that no known Hadamard matrix has takes the discrete Hartley transform for its odd part:
    orthogonal too, its entries at most the square root of two times as large.

    Args:
        width: coordinates of a block.
        seed: decides the signs; the same on every machine.
        blocks: how many blocks there are, with signs of their own.

    >>> q = random_hadamard(12, "seed").rotate_columns(torch.eye(12))
    >>> torch.allclose(q @ q.t(), torch.eye(12, dtype=torch.float64))
    True
    >>> sorted({round(float(x), 4) for x in q.abs().flatten() * 12**0.5})
    [1.0]
    """
    drawn = hashlib.shake_256(seed.encode()).digest(width * blocks)
    bits = torch.tensor(list(drawn), dtype=torch.float64) % 2
    return Rotation(1 - 2 * bits, _factors(width))


@lru_cache(maxsize=16)
def _factors(width: int) -> tuple[torch.Tensor, ...]:
    """Orthogonal matrices whose orders multiply to a width."""
    power = (width & -width).bit_length() - 1
    odd = width >> power
    core: list[torch.Tensor] = []
    if odd > 1:
        orders = [(odd << twos, twos) for twos in range(2, power + 1)]
        found = next(((order, twos) for order, twos in orders if _paley_prime(order)), None)
        if found is None:
            core = [hartley(odd)]
        else:
            order, twos = found
            core, power = [paley(order) / math.sqrt(order)], power - twos
    sylvester = []
    while power:
        twos = min(power, _LARGEST_SYLVESTER.bit_length() - 1)
        power -= twos
        sylvester.append(_sylvester(twos) / math.sqrt(1 << twos))
    return (*sylvester, *core) or (torch.ones(1, 1, dtype=torch.float64),)


def _sylvester(twos: int) -> torch.Tensor:
    """The Hadamard matrix of order ``2 ** twos``."""
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(twos):
        matrix = torch.kron(matrix, pair)
    return matrix


def paley(order: int) -> torch.Tensor:
    """A Hadamard matrix of 1 and -1 by Paley's constructions (1933): float64 ``[order, order]``.

    Raises:
        ValueError: neither of them gives one of this order.
    """
    prime = _paley_prime(order)
    if not prime:
        raise ValueError(f"there is no Paley matrix of order {order}")
    squares = {value * value % prime for value in range(1, prime)}
    character = [0, *(1 if value in squares else -1 for value in range(1, prime))]
    bordered = torch.ones(prime + 1, prime + 1, dtype=torch.float64)
    bordered[0, 0] = 0
    index = torch.arange(prime)
    differences = (index.unsqueeze(1) - index) % prime
    bordered[1:, 1:] = torch.tensor(character, dtype=torch.float64)[differences]
    identity = torch.eye(prime + 1, dtype=torch.float64)
    if prime % 4 == 3:
        bordered[1:, 0] = -1
        return bordered + identity
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    turned = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(bordered, pair) + torch.kron(identity, turned)


def _paley_prime(order: int) -> int:
    """The prime that a Paley matrix of an order is made from, 0 when there is none."""
    if order % 4 == 0 and _is_prime(order - 1):
        return order - 1
    half = order // 2 - 1
    return half if order % 4 == 0 and half % 4 == 1 and _is_prime(half) else 0


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % d for d in range(2, math.isqrt(number) + 1))


def hartley(order: int) -> torch.Tensor:
    """The discrete Hartley transform, orthogonal at any order: float64 ``[order, order]``."""
    index = torch.arange(order, dtype=torch.float64)
    turns = (index.unsqueeze(1) * index % order) * (2 * math.pi / order)
    return (turns.cos() + turns.sin()) / math.sqrt(order)
