"""How far a result may be from float64, per sample: one table for `verify`, for exports and for the tests.

The plain form subtracts two nearly equal results, so what it can promise depends on how far apart they are.
These figures are for restored images at 20 dB or less and the first half of the schedule. At its end next to nothing
is left of the images, and with it of their difference (0.6 % of it at the last of 1000 linear steps): rounding, which
goes with the features and not with their difference, weighs a hundred times more there. Single features have no such
trouble and are compared over the whole schedule.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

RESTORED_DB: Final = 20.0


@dataclass(frozen=True)
class Tolerance:
    """Upper bounds of errors, the lower bound of the gradient's cosine, and where they hold.

    feature: max |a - b| / max |b| of a tensor that a graph returns.
    term: |a - b| / b of naturalness and of semantic.
    gradient: ||a - b|| / ||b|| of the gradient with respect to the restored image.
    places: timesteps at which the loss is compared, as fractions of the last one.
    """

    feature: float
    term: float
    gradient: float
    cosine: float
    places: tuple[float, ...]


PLAIN: Final = {
    "fp32": Tolerance(feature=2e-5, term=1e-4, gradient=2e-3, cosine=0.9999, places=(0.0, 0.01, 0.1, 0.5)),
    "fp16": Tolerance(feature=5e-3, term=1e-1, gradient=1e-1, cosine=0.99, places=(0.01, 0.1, 0.5)),
    "bf16": Tolerance(feature=2e-2, term=1.0, gradient=0.6, cosine=0.9, places=(0.01, 0.1, 0.5)),
}
