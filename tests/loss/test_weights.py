"""Weight schedules: where they begin and end, and what is refused."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffloss_engine.errors import InputError, InputTypeError
from diffloss_trt import DiffLoss, NoiseSchedule
from diffloss_trt.weights import Constant, Cosine, WarmUp


def test_constant() -> None:
    assert [Constant(0.5)(step) for step in (0, 1, 10**9)] == [0.5] * 3


def test_warm_up_never_is_zero_and_ends_at_the_weight() -> None:
    schedule = WarmUp(2.0, 4)
    assert [schedule(step) for step in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert WarmUp(2.0, 1)(0) == 2.0


@pytest.mark.parametrize(("start", "end"), [(1.0, 0.2), (0.0, 3.0)])
def test_cosine(start: float, end: float) -> None:
    schedule = Cosine(start, end, 100)
    assert schedule(0) == start
    assert schedule(50) == pytest.approx((start + end) / 2)
    assert [schedule(step) for step in (100, 101, 10**6)] == [end] * 3
    assert schedule(25) == pytest.approx(start + (end - start) * (1 - math.cos(math.pi / 4)) / 2)
    steps = [schedule(step) for step in range(101)]
    assert steps == sorted(steps, reverse=start > end)


def test_before_the_first_step_a_weight_is_that_of_the_first_step() -> None:
    for schedule in (Constant(1.0), WarmUp(1.0, 10), Cosine(1.0, 0.0, 10), Cosine(0.0, 1.0, 10)):
        assert [schedule(step) for step in (-1, -5, -1000)] == [schedule(0)] * 3


def test_schedules_pickle() -> None:
    for schedule in (Constant(1.0), WarmUp(1.0, 5), Cosine(1.0, 0.0, 5)):
        assert pickle.loads(pickle.dumps(schedule)) == schedule


@pytest.mark.parametrize(
    "make",
    [
        partial(Constant, -1.0),
        partial(WarmUp, math.nan, 3),
        partial(WarmUp, 1.0, 0),
        partial(Cosine, math.inf, 0.0, 3),
        partial(Cosine, 1.0, -0.1, 3),
        partial(Cosine, 1.0, 0.0, 0),
        partial(Cosine, 1.0, 0.0, math.nan),  # type: ignore[arg-type]
        partial(WarmUp, 1.0, math.inf),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_a_schedule(make: Callable[[], object]) -> None:
    with pytest.raises(InputError, match="expected"):
        make()
    with pytest.raises(InputTypeError, match="steps is 'x', a str; expected a number"):
        WarmUp(1.0, "x")  # type: ignore[arg-type]


def test_the_loss_takes_a_schedules_weight_at_the_next_call(
    exported: tuple[Path, Any, NoiseSchedule], make_batch: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
) -> None:
    restored, target, noise, timesteps = make_batch(dtype=torch.float32)
    loss_fn = DiffLoss.load(exported[0], device="cpu", semantic_weight=0.0, value_range=(-1.0, 1.0))
    schedule, found = WarmUp(1.0, 4), []
    for step in range(5):
        loss_fn.naturalness_weight = schedule(step)
        leaf = restored.clone().requires_grad_()
        loss = loss_fn(leaf, target, timesteps=timesteps, noise=noise)
        loss.backward()
        assert leaf.grad is not None
        found.append((loss.item(), leaf.grad.norm().item()))
    for step, pair in enumerate(found):
        assert pair == pytest.approx([number * schedule(step) for number in found[-1]], rel=1e-4)
