"""Orthogonal matrices that spread outliers over all coordinates and are cheap to apply.

QuaRot (arXiv 2404.00456) and SpinQuant (arXiv 2405.16406) rotate the activations between a model's
linears by a Hadamard matrix with random signs. Folded into the weights on both sides, the rotation
changes no output. But it mixes columns of different magnitude, so that a few large columns no
longer set the scale of a whole group.

A rotation of ``n`` coordinates is ``diag(signs) (F1 x F2 x ...)``, where the second factor is a
Kronecker product of small orthogonal matrices. A few small products therefore rotate a matrix,
instead of one product with an ``n`` by ``n`` matrix.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache

import torch

ROTATION_VERSION = 1

# Larger Sylvester matrices are applied as Kronecker products of smaller ones, which takes fewer
# multiplications.
_LARGEST_SYLVESTER = 64


@dataclass(frozen=True)
class Rotation:
    """A block-diagonal orthogonal matrix ``Q``, whose blocks differ only in their signs.

    Attributes:
        signs: float64 ``[width]``, every element 1 or -1.
        factors: orthogonal float64 matrices whose Kronecker product is one block without signs.
    """

    signs: torch.Tensor
    factors: tuple[torch.Tensor, ...]

    @property
    def width(self) -> int:
        """Number of coordinates."""
        return len(self.signs)

    @property
    def block(self) -> int:
        """Number of coordinates in a block; only coordinates of one block mix."""
        return math.prod(len(factor) for factor in self.factors)

    def rotate_columns(self, weight: torch.Tensor) -> torch.Tensor:
        """Returns ``W Q``, float64 ``[rows, width]``, for any float ``[rows, width]``."""
        rotated = (weight.double() * self.signs).reshape(-1, *map(len, self.factors))
        # Each product removes axis 1 and appends the new axis; after all, the order is as before.
        for factor in self.factors:
            rotated = torch.tensordot(rotated, factor, dims=([1], [0]))
        return rotated.reshape(weight.shape)

    def rotate_rows(self, weight: torch.Tensor) -> torch.Tensor:
        """Returns ``Q^T W``, float64 ``[width, columns]``, for any float ``[width, columns]``."""
        return self.rotate_columns(weight.t()).t()

    def part(self, start: int, stop: int) -> Rotation:
        """Returns the rotation of coordinates ``start`` to ``stop``, which must be whole blocks."""
        assert start % self.block == stop % self.block == 0
        return Rotation(self.signs[start:stop], self.factors)

    def repeated(self, times: int) -> Rotation:
        """Returns the rotation with every block repeated ``times`` times in a row.

        With grouped queries several query heads read the values of one key/value head.
        """
        blocks = self.signs.reshape(-1, 1, self.block)
        return Rotation(blocks.expand(-1, times, -1).reshape(-1), self.factors)


def random_hadamard(width: int, seed: str, blocks: int = 1) -> Rotation:
    """Returns a Hadamard rotation with random signs.

    Where the constructions here give no Hadamard matrix of the width, the discrete Hartley
    transform takes the place of its odd part: it is orthogonal too, and its entries are at most the
    square root of two times as large.

    Args:
        width: number of coordinates in a block.
        seed: determines the signs; a seed gives the same signs on every machine.
        blocks: number of blocks; each has its own signs.

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
    """Returns orthogonal matrices whose orders multiply to ``width``."""
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
    """Returns Sylvester's Hadamard matrix of order ``2 ** twos``."""
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(twos):
        matrix = torch.kron(matrix, pair)
    return matrix


def paley(order: int) -> torch.Tensor:
    """Returns a Hadamard matrix by Paley's constructions (1933): float64 ``[order, order]``.

    Its entries are 1 and -1.

    Raises:
        ValueError: neither construction gives a matrix of this order.
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
    """Returns the prime from which a Paley matrix of this order is built; 0 when there is none."""
    if order % 4 == 0 and _is_prime(order - 1):
        return order - 1
    half = order // 2 - 1
    return half if order % 4 == 0 and half % 4 == 1 and _is_prime(half) else 0


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % d for d in range(2, math.isqrt(number) + 1))


def hartley(order: int) -> torch.Tensor:
    """Returns the orthogonal discrete Hartley transform of an order: float64 ``[order, order]``."""
    index = torch.arange(order, dtype=torch.float64)
    turns = (index.unsqueeze(1) * index % order) * (2 * math.pi / order)
    return (turns.cos() + turns.sin()) / math.sqrt(order)
