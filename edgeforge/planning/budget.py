"""`Budget`: the limit of a mixed plan, in bits, bytes or divergence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from edgeforge.errors import UsageError

MIXED: Final = {"mixed": None, "mixed-gptq": "gptq-descent"}
"""The mixed recipes, each with the calibrated algorithm for the chosen formats, or None."""


@dataclass(frozen=True)
class Budget:
    """The limit of a mixed plan; exactly one of the three is set for a mixed recipe.

    Attributes:
        bits_per_weight: stored bits divided by parameters, scales and norms included.
        max_size: bytes of all stored weights.
        max_kl: KL divergence from FLOAT on the calibration text, nats per token.
    """

    bits_per_weight: float | None = None
    max_size: int | None = None
    max_kl: float | None = None

    def given(self) -> dict[str, float]:
        """Returns the limits that are set, by the option that sets them."""
        every = {
            "--bits-per-weight": self.bits_per_weight,
            "--max-size": self.max_size,
            "--max-kl": self.max_kl,
        }
        return {option: value for option, value in every.items() if value is not None}

    def check(self, recipe: str) -> None:
        """Refuses a budget for a recipe that is not mixed, and a mixed recipe without a budget.

        Raises:
            UsageError: the message names the option or the recipe.
        """
        given = self.given()
        if recipe not in MIXED:
            if given:
                raise UsageError(
                    f"{next(iter(given))} is a budget for the recipes {', '.join(MIXED)}; {recipe} "
                    f"has fixed formats: leave the option out, or take --recipe mixed"
                )
            return
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise UsageError(
                f"recipe {recipe} needs one budget, found {found}: give one option such as "
                f"--bits-per-weight 4.5, --max-size 1.8GB or --max-kl 0.02"
            )
        (option, value) = next(iter(given.items()))
        if not 0 < value < float("inf"):
            raise UsageError(f"{option} {value:g} is not possible: it must be above zero")
