"""Timestep samplers: what they draw has the density that they name, by statistics that a wrong one fails."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor

from diffloss_engine.errors import InputError, InputTypeError
from diffloss_trt import NoiseSchedule
from diffloss_trt.sampling import Annealed, Density, TimestepSampler, balanced, snr_weighted, uniform_range
from exports import make_schedule

SCHEDULE = make_schedule()
COUNT = len(SCHEDULE)


def draw(
    density: Density, batch: int = 50, batches: int = 400, step: int | None = None, low_discrepancy: bool = False
) -> Tensor:
    """Return [batches, batch] timesteps of one seeded sampler."""
    sampler = TimestepSampler(density, low_discrepancy=low_discrepancy, generator=torch.Generator().manual_seed(0))
    return torch.stack([sampler(batch, step) for _ in range(batches)])


def has_density(timesteps: Tensor, density: Tensor, bins: int = 20) -> bool:
    """Pearson's chi-squared test at about five standard deviations, on bins of equal probability."""
    cumulative = density.cumsum(0) / density.sum()
    bin_of = (cumulative * bins - 1e-9).ceil().clamp(1, bins).long() - 1
    expected = torch.zeros(bins, dtype=torch.float64).index_add(0, bin_of, density / density.sum()) * timesteps.numel()
    found = torch.bincount(bin_of[timesteps.flatten()], minlength=bins)
    used = expected > 0
    statistic = ((found - expected)[used] ** 2 / expected[used]).sum()
    freedom = int(used.sum()) - 1
    outside = bool((density[timesteps] == 0).any())
    return not outside and float(statistic) <= freedom + 5 * math.sqrt(2 * freedom)


DENSITIES = {
    "uniform": uniform_range(SCHEDULE),
    "range": uniform_range(SCHEDULE, 100, 350),
    "one timestep": uniform_range(SCHEDULE, 999),
    "SNR": snr_weighted(SCHEDULE),
    "min-SNR": snr_weighted(SCHEDULE, lambda snr: snr.clamp(max=5)),
}


@pytest.mark.parametrize("low_discrepancy", [False, True])
@pytest.mark.parametrize("name", DENSITIES)
def test_samples_have_the_density_and_no_other(name: str, low_discrepancy: bool) -> None:
    found = draw(DENSITIES[name], low_discrepancy=low_discrepancy)
    assert found.dtype == torch.int64
    assert [other for other, density in DENSITIES.items() if has_density(found, density)] == [name]


def test_bounds_of_a_range_are_drawn_and_nothing_beyond() -> None:
    assert set(draw(uniform_range(SCHEDULE, 5, 8)).unique().tolist()) == {5, 6, 7}
    assert set(draw(uniform_range(SCHEDULE, 0, 1)).unique().tolist()) == {0}


def shares_met(timesteps: Tensor) -> bool:
    """Whether every batch has one timestep in each of its equal shares of [0, COUNT)."""
    batch = timesteps.shape[1]
    shares = (timesteps * batch / COUNT).floor().long().sort(1).values
    return bool((shares == torch.arange(batch)).all())


def test_low_discrepancy_batches_are_even_at_a_random_offset_in_random_order() -> None:
    even, independent = (draw(uniform_range(SCHEDULE), batch=20, low_discrepancy=each) for each in (True, False))
    assert shares_met(even)
    assert not shares_met(independent)
    gaps = even.sort(1).values.diff()
    assert ((gaps - COUNT / 20).abs() <= 1).all()  # equally spaced, up to the rounding to whole timesteps
    assert len((even.amin(1)).unique()) > 40  # of 50 places
    # The image at one place in the batch sees all noise levels.
    assert has_density(even[:, 0], uniform_range(SCHEDULE), bins=10)
    assert not has_density(even.sort(1).values[:, 0], uniform_range(SCHEDULE), bins=10)


def test_low_discrepancy_makes_batch_means_less_random() -> None:
    deviations = [
        draw(uniform_range(SCHEDULE), batch=8, low_discrepancy=each).double().mean(1).std() for each in (True, False)
    ]
    # Theory: COUNT / sqrt(12) / 8 and COUNT / sqrt(12 * 8).
    assert float(deviations[0]) == pytest.approx(COUNT / math.sqrt(12) / 8, rel=0.1)
    assert float(deviations[1]) == pytest.approx(COUNT / math.sqrt(12 * 8), rel=0.1)


def test_snr_weighting_is_the_documented_function_of_the_schedule() -> None:
    abar = SCHEDULE.alphas_cumprod
    torch.testing.assert_close(snr_weighted(SCHEDULE), abar * (1 - abar), rtol=1e-12, atol=0)
    snr = abar / (1 - abar)
    torch.testing.assert_close(balanced(snr), snr / (1 + snr) ** 2, rtol=1e-12, atol=0)
    assert (snr[snr_weighted(SCHEDULE).argmax()] - 1).abs() < 0.01


def test_schedules_that_begin_without_noise_and_end_without_signal() -> None:
    schedule = NoiseSchedule(torch.tensor([1.0, 0.5, 0.0]))
    assert snr_weighted(schedule).tolist() == [0.0, 0.25, 0.0]
    assert draw(snr_weighted(schedule)).unique().tolist() == [1]
    assert snr_weighted(schedule, lambda snr: snr.clamp(max=5)).tolist() == [5.0, 1.0, 0.0]
    with pytest.raises(InputError, match="finite"):
        snr_weighted(schedule, lambda snr: snr)


def test_annealing_narrows_the_range_with_the_step() -> None:
    density = Annealed(uniform_range(SCHEDULE), start=(0, COUNT), end=(100, 300), steps=1000)
    for step, low, high in ((0, 0, 1000), (500, 50, 650), (1000, 100, 300), (5000, 100, 300), (-1, 0, 1000)):
        expected = uniform_range(SCHEDULE, low, high)
        assert torch.equal(density(step), expected)
        assert has_density(draw(density, step=step), expected)
    assert not has_density(draw(density, step=500), uniform_range(SCHEDULE))
    assert not has_density(draw(density, step=0), density(500))


def test_a_range_that_moves_is_never_empty() -> None:
    """Nor is one of constant width ever wider or narrower: both its bounds are rounded alike."""
    density = uniform_range(SCHEDULE)
    for steps, width, first, last in product(range(1, 9), (1, 2), (1, 2, 9), (1, 2, 4, 7)):
        annealed = Annealed(density, (first, first + width), (last, last + width), steps)
        assert [int(annealed(step).count_nonzero()) for step in range(steps + 1)] == [width] * (steps + 1)


def test_annealing_keeps_proportions_inside_the_range() -> None:
    weighted = snr_weighted(SCHEDULE)
    density = Annealed(weighted, start=(0, COUNT), end=(200, 400), steps=10)(10)
    assert torch.equal(density[200:400], weighted[200:400])
    assert density.count_nonzero() == 200


def test_a_density_is_where_it_is_whatever_the_default_device() -> None:
    weighted = snr_weighted(SCHEDULE)
    expected = Annealed(weighted, start=(0, COUNT), end=(200, 400), steps=10)(10)
    with torch.device("meta"):
        assert torch.equal(Annealed(weighted, start=(0, COUNT), end=(200, 400), steps=10)(10), expected)


def test_draws_come_from_the_generator_alone() -> None:
    for low_discrepancy in (False, True):
        state = torch.get_rng_state()
        first, again = (draw(uniform_range(SCHEDULE), low_discrepancy=low_discrepancy) for _ in range(2))
        assert torch.equal(first, again)
        assert len(first.unique(dim=0)) == len(first)
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(1)
        seeded = TimestepSampler(uniform_range(SCHEDULE), low_discrepancy=low_discrepancy)(9)
        torch.manual_seed(1)
        assert torch.equal(TimestepSampler(uniform_range(SCHEDULE), low_discrepancy=low_discrepancy)(9), seeded)


def test_the_last_share_does_not_leave_the_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    # The largest number that torch.rand can return, at which (batch - 1 + level) / batch rounds to 1.
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor([1 - 2**-53], dtype=torch.float64))
    found = TimestepSampler(uniform_range(SCHEDULE), low_discrepancy=True)(3000)
    assert found.max() == COUNT - 1


@pytest.mark.gpu
def test_timesteps_are_where_the_loss_is() -> None:
    sampler = TimestepSampler(
        snr_weighted(SCHEDULE), low_discrepancy=True, generator=torch.Generator("cuda"), device="cuda"
    )
    assert sampler(4).device.type == "cuda"


@pytest.mark.parametrize(
    "make",
    [
        partial(uniform_range, SCHEDULE, -1),
        partial(uniform_range, SCHEDULE, 0, COUNT + 1),
        partial(uniform_range, SCHEDULE, 7, 7),
        partial(snr_weighted, SCHEDULE, lambda snr: -snr),
        partial(snr_weighted, SCHEDULE, lambda snr: 0 * snr),
        partial(snr_weighted, SCHEDULE, lambda snr: snr.log()[:, None]),
        partial(TimestepSampler, torch.tensor([1.0, math.nan])),
        partial(TimestepSampler, lambda _: torch.zeros(3)),
        partial(Annealed, uniform_range(SCHEDULE), (0, COUNT), (0, 10), 0),
        partial(Annealed, uniform_range(SCHEDULE), (0, COUNT), (0, 0), 5),
        partial(Annealed, uniform_range(SCHEDULE, 500), (0, COUNT), (0, 100), 5),
        partial(Annealed, uniform_range(SCHEDULE, 500), (0, 100), (0, COUNT), 1),
        partial(Annealed, uniform_range(SCHEDULE), (0, COUNT), (0, 10), math.inf),  # type: ignore[arg-type]
        lambda: TimestepSampler(uniform_range(SCHEDULE))(0),
        partial(TimestepSampler, uniform_range(SCHEDULE), device="bogus"),
        partial(TimestepSampler, uniform_range(SCHEDULE), device="meta"),
    ],
)
def test_what_cannot_be_drawn_from(make: Callable[[], object]) -> None:
    with pytest.raises(InputError, match=r"expected|must be"):
        make()


def test_what_is_no_density_or_generator_is_named() -> None:
    with pytest.raises(InputTypeError, match=r"density is a list; expected a tensor \[T\], or a callable"):
        TimestepSampler([1.0, 2.0])  # type: ignore[arg-type]
    with pytest.raises(InputTypeError, match=r"a density over timesteps is a list; expected a torch\.Tensor \[T\]"):
        TimestepSampler(lambda _: [1.0, 2.0])  # type: ignore[arg-type, return-value]
    with pytest.raises(InputTypeError, match=r"generator is a int; expected a torch\.Generator"):
        TimestepSampler(torch.ones(3), generator=0)  # type: ignore[arg-type]


def test_a_density_that_changes_is_not_drawn_from_without_a_step() -> None:
    sampler = TimestepSampler(Annealed(uniform_range(SCHEDULE), (0, COUNT), (0, 10), 5))
    with pytest.raises(InputError, match="step is None; expected the training step"):
        sampler(2)
    assert sampler(2, 5).max() < 10
    assert TimestepSampler(uniform_range(SCHEDULE))(2, 5).shape == (2,)  # as a loop that is written for both does


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: TimestepSampler(uniform_range(SCHEDULE))(2.5), "batch is a float"),  # type: ignore[arg-type]
        (lambda: TimestepSampler(uniform_range(SCHEDULE))("a"), "batch is a str"),  # type: ignore[arg-type]
        (lambda: TimestepSampler(uniform_range(SCHEDULE))(2, "a"), "step is a str"),  # type: ignore[arg-type]
        (partial(Annealed, [1, 2], (0, 2), (0, 1), 5), "a density over timesteps is a list"),  # type: ignore[arg-type]
        (partial(Annealed, uniform_range(SCHEDULE), (0, 2), (0, 1), "x"), "steps is 'x', a str"),  # type: ignore[arg-type]
        (partial(Annealed, uniform_range(SCHEDULE), 5, (0, 1), 5), r"start is 5; expected \(low, high\)"),  # type: ignore[arg-type]
        (partial(Annealed, uniform_range(SCHEDULE), (0, 2), (0, 1, 2), 5), r"end is \(0, 1, 2\); expected \(low, high"),  # type: ignore[arg-type]
        (partial(Annealed, uniform_range(SCHEDULE), (0, 2), (0, 1.5), 5), "a bound of end is a float"),  # type: ignore[arg-type]
        (partial(uniform_range, SCHEDULE, 2.5, 7), "low is a float"),  # type: ignore[arg-type]
        (partial(uniform_range, SCHEDULE, 2, 7.5), "high is a float"),  # type: ignore[arg-type]
    ],
)
def test_arguments_of_another_type_are_named(make: Callable[[], object], named: str) -> None:
    with pytest.raises(InputTypeError, match=named):
        make()
