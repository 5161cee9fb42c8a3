"""Which timesteps the loss uses: densities over the noise schedule, and samplers that draw from them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffloss_engine.errors import InputError, InputTypeError
from diffloss_trt.inputs import check_integer, check_pair, check_steps, choose_device
from diffloss_trt.schedule import NoiseSchedule

# Weights [T], in any unit, of the timesteps: the same at every step of the training, or by its step.
Density = Tensor | Callable[[int], Tensor]
Range = tuple[int, int]


class TimestepSampler:
    """Draws a timestep for each image of a batch: `loss_fn(restored, target, timesteps=sampler(len(restored)))`.

    Training then minimises the loss's expectation under this density; the density is not divided out again.

    Args:
        density: the result of `uniform_range` or `snr_weighted`, an `Annealed`, or any other density like these.
        low_discrepancy: whether to spread the timesteps of a batch evenly over the density: one in each of B equal
            shares of it, all at the same random place in their share (Kingma et al., Variational Diffusion Models,
            2021, appendix I.1). Each timestep keeps its density, and the batch's mean has a smaller variance.
        generator: source of the random draws, on any device; by default PyTorch's global one.
        device: device of the timesteps, that of the loss.

    Raises InputError, when made and at each draw, for a density that cannot be drawn from; InputTypeError for a density
    or generator of the wrong type; and as `DiffLoss.load` does for a device that does not exist.
    """

    def __init__(
        self,
        density: Density,
        *,
        low_discrepancy: bool = False,
        generator: torch.Generator | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        if not isinstance(density, Tensor) and not callable(density):
            raise InputTypeError(
                f"density is a {type(density).__name__}; expected a tensor [T], or a callable that returns one"
            )
        if generator is not None and not isinstance(generator, torch.Generator):
            raise InputTypeError(f"generator is a {type(generator).__name__}; expected a torch.Generator")
        self.density = density
        self.low_discrepancy = low_discrepancy
        self.generator = generator
        self.device = choose_device(device)
        self._distribution(0)

    def __call__(self, batch: int, step: int | None = None) -> Tensor:
        """Return integers [batch] in [0, T), in random order.

        `step`, the training step, is needed by a density that changes with it, such as `Annealed`: InputError without.
        """
        check_integer("batch", batch, 1)
        distribution = self._distribution(step)
        place = self.generator.device if self.generator is not None else None
        level = torch.rand(
            1 if self.low_discrepancy else batch, generator=self.generator, device=place, dtype=torch.float64
        )
        if self.low_discrepancy:
            level = (torch.randperm(batch, generator=self.generator, device=place) + level) / batch
        # Rounding may bring the last share's level to 1, at which no timestep is left.
        level = level.cpu().clamp(max=1 - 2**-53)
        return torch.searchsorted(distribution, level, right=True).to(self.device)

    def _distribution(self, step: int | None) -> Tensor:
        """Return the share of the density up to and with each timestep, [T], rising to exactly 1."""
        if step is not None:
            check_integer("step", step, otherwise=", or None")
        if isinstance(self.density, Tensor):
            density = self.density
        elif step is None:
            raise InputError(
                "step is None; expected the training step, with which this density changes: sampler(batch, step)"
            )
        else:
            density = self.density(step)
        cumulative = _checked(density).cumsum(0)
        return cumulative / cumulative[-1]


def uniform_range(schedule: NoiseSchedule, low: int = 0, high: int | None = None) -> Tensor:
    """Return the uniform density, [T], over the timesteps in [low, high); by default over all of the schedule.

    Raises InputError for a range outside of the schedule, InputTypeError for bounds that are not integers.
    """
    bounds = check_integer("low", low), len(schedule) if high is None else check_integer("high", high)
    return _inside(torch.ones(len(schedule), dtype=torch.float64), bounds)


def balanced(snr: Tensor) -> Tensor:
    """Return snr / (1 + snr)^2 = abar (1 - abar): largest where there is as much signal as noise."""
    return 1 / (snr + 2 + 1 / snr)  # in this form right at zero and at infinity too


def snr_weighted(schedule: NoiseSchedule, weight: Callable[[Tensor], Tensor] = balanced) -> Tensor:
    """Return the density, [T], proportional to a function of the signal-to-noise ratio, SNR = abar / (1 - abar).

    `weight` maps SNR [T], falling, float64 in [0, inf], to weights >= 0. The weight of min-SNR (Hang et al., 2023), for
    example, is `lambda snr: snr.clamp(max=5)`. Raises InputError unless weights are finite, >= 0 and not all zero.
    """
    abar = schedule.alphas_cumprod
    return _checked(weight(abar / (1 - abar)))


@dataclass(frozen=True, eq=False)
class Annealed:
    """A density whose range moves, timestep by timestep, from [low, high) `start` to `end` in `steps` training steps.

    Within the range, `density` [T] keeps its proportions. Raises InputError for a range outside of the schedule or
    without density, InputTypeError for a density, a range of integers or a number of steps of the wrong type.
    """

    density: Tensor
    start: Range
    end: Range
    steps: int

    def __post_init__(self) -> None:
        check_steps(self.steps)
        _checked(self.density)
        for name, bounds in (("start", self.start), ("end", self.end)):
            check_pair(name, bounds)
            for bound in bounds:
                check_integer(f"a bound of {name}", bound)
        for step in (0, self.steps):
            _checked(self(step))

    def __call__(self, step: int) -> Tensor:
        """Return the density at a training step, [T]; before 0 and beyond `steps` it does not change."""
        done = min(max(step / self.steps, 0.0), 1.0)
        # Halves are rounded up. `round` takes them to the nearest even number, 1.5 and 2.5 both to 2: an empty range.
        low, high = (
            math.floor(first + done * (last - first) + 0.5) for first, last in zip(self.start, self.end, strict=True)
        )
        return _inside(self.density, (low, high))


def _inside(density: Tensor, bounds: Range) -> Tensor:
    low, high = bounds
    if not 0 <= low < high <= len(density):
        raise InputError(f"the range of timesteps is [{low}, {high}); expected 0 <= low < high <= {len(density)}")
    index = torch.arange(len(density), device=density.device)
    return density * ((index >= low) & (index < high))


def _checked(density: Tensor) -> Tensor:
    if not isinstance(density, Tensor):
        raise InputTypeError(f"a density over timesteps is a {type(density).__name__}; expected a torch.Tensor [T]")
    if density.ndim != 1 or not bool((density.isfinite() & (density >= 0)).all()) or not bool(density.any()):
        raise InputError("a density over timesteps must be [T], finite, >= 0, and not zero everywhere")
    return density.detach().to("cpu", torch.float64)
