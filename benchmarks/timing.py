"""Times of several ways to do one thing, taken in turn: a slow minute of the machine is then slow for all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import track


@dataclass(frozen=True)
class Timing:
    """Median and quartiles of one way's times, in seconds."""

    median: float
    quartiles: tuple[float, float]

    @classmethod
    def of(cls, seconds: Iterable[float]) -> Timing:
        """Summarise two or more times."""
        first, median, third = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(median, (first, third))

    def to_json(self) -> dict[str, Any]:
        """Return both in milliseconds, to four digits."""
        first, third = self.quartiles
        return {
            "median_ms": _digits(self.median * 1e3),
            "quartiles_ms": [_digits(first * 1e3), _digits(third * 1e3)],
        }


def _digits(number: float) -> float:
    return float(f"{number:.4g}")


def interleaved(steps: Mapping[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, Timing]:
    """Run every step once in each of `rounds` >= 2 rounds; they have to be warm.

    On a GPU a step is run once more just before, untimed: the step before it may have left the clocks and caches, and
    PyTorch's allocator, in another state.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in track(range(rounds), "measuring"):
        for name, step in steps.items():
            if device.type == "cuda":
                step()
            wait(device)
            started = time.perf_counter()
            step()
            wait(device)
            seconds[name].append(time.perf_counter() - started)
    return {name: Timing.of(values) for name, values in seconds.items()}


def wait(device: torch.device) -> None:
    """Wait until the GPU, if `device` is one, has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
