"""Term weights that change during training: callables from the training step, counted from 0, to a weight.

    schedule = Cosine(1e-3, 1e-4, steps=100_000)
    loss_fn.naturalness_weight = schedule(step)

A weight that will grow must not start at zero, not even for one step: without a term another graph runs, which has to
be loaded and, with TensorRT, built. Before step 0 a weight is what it is at step 0, so a schedule can be delayed:
`schedule(step - delay)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from diffloss_trt.inputs import check_steps, check_weight


@dataclass(frozen=True)
class Constant:
    """The same weight at every step."""

    weight: float

    def __post_init__(self) -> None:
        check_weight("weight", self.weight)

    def __call__(self, step: int) -> float:
        return self.weight


@dataclass(frozen=True)
class WarmUp:
    """A weight that grows linearly: weight / steps at the first step, `weight` from the last of `steps` on."""

    weight: float
    steps: int

    def __post_init__(self) -> None:
        check_weight("weight", self.weight)
        check_steps(self.steps)

    def __call__(self, step: int) -> float:
        return self.weight * min(1.0, (max(step, 0) + 1) / self.steps)


@dataclass(frozen=True)
class Cosine:
    """A weight that follows half a period of the cosine, from `start` at step 0 to `end` from step `steps` on."""

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        check_weight("start", self.start)
        check_weight("end", self.end)
        check_steps(self.steps)

    def __call__(self, step: int) -> float:
        done = min(max(step / self.steps, 0.0), 1.0)
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * done)) / 2
