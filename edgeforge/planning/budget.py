"""`Budget`: what a mixed plan may cost, in bits, bytes or divergence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from edgeforge.errors import UsageError

MIXED: Final = {"mixed": None, "mixed-gptq": "gptq-order"}
"""The recipes, each with the calibrated algorithm that fills the formats chosen, if any."""


@dataclass(frozen=True)
class Budget:
    """What a mixed plan may take: one of three.

    Attributes:
        bits_per_weight: stored bits over parameters, scales and norms included.
        max_size: bytes of all stored weights.
        max_kl: KL divergence from FLOAT on the calibration text, nats a token.
    """

    bits_per_weight: float | None = None
    max_size: int | None = None
    max_kl: float | None = None

    def given(self) -> dict[str, float]:
        """The bounds that are set, by the option that sets them."""
        every = {
            "--bits-per-weight": self.bits_per_weight,
            "--max-size": self.max_size,
            "--max-kl": self.max_kl,
        }
        return {option: value for option, value in every.items() if value is not None}

    def check(self, recipe: str) -> None:
        """Refuses a budget that the recipe has no use for, and a mixed recipe without one.

        Raises:
            UsageError: says which.
        """
        given = self.given()
        if recipe not in MIXED:
            if given:
                raise UsageError(
                    f"{next(iter(given))} is a budget for the recipes {', '.join(MIXED)}; {recipe} "
                    f"has fixed formats: leave it out, or take --recipe mixed"
                )
            return
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise UsageError(
                f"recipe {recipe} needs one budget, found {found}: give --bits-per-weight 4.5, "
                f"--max-size 1.8GB or --max-kl 0.02"
            )
        (option, value) = next(iter(given.items()))
        if not 0 < value < float("inf"):
            raise UsageError(f"{option} {value:g} is not possible: it must be above zero")
