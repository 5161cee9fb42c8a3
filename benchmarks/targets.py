"""What a step of the loss was meant to reach, and what it did."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

Row = dict[str, Any]
EAGER: Final = "eager PyTorch"
UNFROZEN: Final = "eager PyTorch, nothing frozen"
COMPILE: Final = "torch.compile"
OURS: Final = "diffloss-trt, "  # and the backend: value and gradient from the engine
# The distance of restored and target, in dB, at which errors are held against targets.
DECIBELS: Final = "30"


@dataclass(frozen=True)
class Target:
    """A quantity of the rows of one batch size, and its bound; `measured` returns None where a row of it is missing."""

    what: str
    bound: float
    measured: Callable[[list[Row]], float | None]
    at_most: bool = False

    def is_met(self, value: float) -> bool:
        return value <= self.bound if self.at_most else value >= self.bound


@dataclass(frozen=True)
class Targets:
    """The targets of one configuration at one batch size on one type of device."""

    configuration: str
    device_type: str
    batch_size: int
    targets: tuple[Target, ...]


def select(
    rows: Iterable[Row], way: str, precision: str | None = None, terms: str = "both", error_below: float = float("inf")
) -> list[Row]:
    """Return the rows that were run, of one way or of all that are `OURS`, fastest first."""
    found = [
        row
        for row in rows
        if "median_ms" in row
        and way in (row["way"], OURS)
        and row["way"].startswith(way)
        and precision in (None, row["precision"])
        and row["terms"] == terms
        and row["gradient_error"][DECIBELS] < error_below
    ]
    return sorted(found, key=lambda row: row["median_ms"])


def ratio(over: list[Row], under: list[Row], key: str = "median_ms") -> float | None:
    """Return how many times as large `key` is in the first of `over` as in the first of `under`."""
    return float(over[0][key] / under[0][key]) if over and under else None


def _error_ratio(rows: list[Row]) -> float | None:
    ours = select(rows, OURS, "fp16")
    others = [*select(rows, COMPILE, "fp16"), *select(rows, UNFROZEN)[:1]]
    if not ours or not others:
        return None
    return float(min(row["gradient_error"][DECIBELS] for row in others) / ours[0]["gradient_error"][DECIBELS])


def _of_ceiling(rows: list[Row]) -> float | None:
    ours = select(rows, OURS, "fp16")
    return float(ours[0]["of_ceiling"]) if ours else None


_RIGHT: Final = 3e-2  # a gradient error that does not disturb training
TARGETS: Final = (
    Targets(
        "cifar10",
        "cpu",
        4,
        (
            Target(
                "ONNX Runtime in fp32, times eager fp32",
                1.35,
                lambda rows: ratio(select(rows, EAGER, "fp32"), select(rows, f"{OURS}onnxruntime", "fp32")),
            ),
            Target(
                "its semantic term alone, times eager fp32 (both terms)",
                4,
                lambda rows: ratio(select(rows, EAGER, "fp32"), select(rows, f"{OURS}onnxruntime", "fp32", "semantic")),
            ),
            Target(
                f"our fastest in bf16 with an error below {_RIGHT:g} at {DECIBELS} dB, times eager fp32",
                2.1,
                lambda rows: ratio(select(rows, EAGER, "fp32"), select(rows, OURS, "bf16", error_below=_RIGHT)),
            ),
            Target(
                "the same, times bf16 autocast",
                1.25,
                lambda rows: ratio(
                    select(rows, EAGER, "bf16 autocast"), select(rows, OURS, "bf16", error_below=_RIGHT)
                ),
            ),
        ),
    ),
    Targets(
        "adm256",
        "cuda",
        8,
        (
            Target(
                "our fastest in fp16, times torch.compile in fp16",
                1.25,
                lambda rows: ratio(select(rows, COMPILE, "fp16"), select(rows, OURS, "fp16")),
            ),
            Target(
                "the same, times eager with nothing frozen",
                5,
                lambda rows: ratio(select(rows, UNFROZEN), select(rows, OURS, "fp16")),
            ),
            Target(f"the smaller of their gradient errors at {DECIBELS} dB, divided by ours", 10, _error_ratio),
            Target(
                "our semantic term alone in fp16, times both terms",
                3,
                lambda rows: ratio(select(rows, OURS, "fp16"), select(rows, OURS, "fp16", "semantic")),
            ),
            Target("our fastest in fp16, share of the matmul rate", 0.5, _of_ceiling),
            Target(
                "its peak memory, relative to eager fp16",
                0.6,
                lambda rows: ratio(select(rows, OURS, "fp16"), select(rows, EAGER, "fp16"), "peak_memory_bytes"),
                at_most=True,
            ),
        ),
    ),
)
