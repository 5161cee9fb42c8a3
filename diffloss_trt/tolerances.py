"""How far a result may be from float64, per sample: one table for `verify`, for exports and for the tests.

The difference form is held to its figures for restored images at 20 to 50 dB over the whole schedule.

The plain form subtracts two nearly equal results, so what it can promise depends on how far apart they are. Its
figures are for restored images at 20 dB or less and the first half of the schedule. At its end next to nothing
is left of the images, and with it of their difference (0.6 % of it at the last of 1000 linear steps): rounding, which
goes with the features and not with their difference, weighs a hundred times more there. Single features have no such
trouble and are compared over the whole schedule.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

PLAIN_DB: Final = 20.0


@dataclass(frozen=True)
class Tolerance:
    """Upper bounds of errors, and the lower bound of the gradient's cosine.

    term: |a - b| / b of naturalness and of semantic.
    gradient: ||a - b|| / ||b|| of the gradient with respect to the restored image.
    """

    term: float
    gradient: float
    cosine: float


PLAIN: Final = {
    "fp32": Tolerance(term=1e-4, gradient=2e-3, cosine=0.9999),
    "fp16": Tolerance(term=1e-1, gradient=1e-1, cosine=0.99),
    "bf16": Tolerance(term=1.0, gradient=0.6, cosine=0.9),
}
# Timesteps at which the plain form is compared, as fractions of the last one.
PLAIN_PLACES: Final = {"fp32": (0.0, 0.01, 0.1, 0.5), "fp16": (0.01, 0.1, 0.5), "bf16": (0.01, 0.1, 0.5)}


def timestep_at(place: float, count: int) -> int:
    """Return the timestep at a fraction of a schedule's last one; only 0 is the first, however short the schedule."""
    last = count - 1
    return min(last, max(1, round(place * last))) if place else 0


DIFFERENCE: Final = {
    "fp32": Tolerance(term=1e-5, gradient=1e-4, cosine=0.99999),
    "fp16": Tolerance(term=2e-3, gradient=1e-2, cosine=0.9999),
    "bf16": Tolerance(term=2e-2, gradient=6e-2, cosine=0.998),
}

# max |a - b| / max |b| of a tensor that the encoder or the noise head returns.
FEATURE: Final = {"fp32": 2e-5, "fp16": 5e-3, "bf16": 2e-2}
