"""The forward diffusion process: how much of an image and of noise a timestep mixes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffloss_engine.errors import BundleError, InputError, InputTypeError, ModelError

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


class Tables(NamedTuple):
    """sqrt(abar), sqrt(1 - abar), and what the UNet is told (None: the timestep itself), of every timestep, [T]."""

    signal: Tensor
    noise: Tensor
    unet_timesteps: Tensor | None


class NoiseSchedule:
    """A variance-preserving noise schedule and what the UNet predicts under it.

    `alphas_cumprod` is the cumulative product of 1 - beta, float64 [T] in [0, 1], falling
    (Ho et al., Denoising Diffusion Probabilistic Models, 2020, equation 4). `prediction_type` is
    "epsilon" (the noise), "v_prediction" (Salimans & Ho, 2022) or "sample" (the clean image).
    `unet_timesteps` [T] is what the UNet is told at each timestep, where that is not its index: on a schedule that
    keeps some of the steps that the UNet was trained on, or whose steps are counted in another unit.
    """

    def __init__(
        self, alphas_cumprod: Tensor, prediction_type: str = "epsilon", unet_timesteps: Tensor | None = None
    ) -> None:
        if prediction_type not in PREDICTION_TYPES:
            raise InputError(f"prediction_type is {prediction_type!r}; expected one of {', '.join(PREDICTION_TYPES)}")
        _expect_tensor("alphas_cumprod", alphas_cumprod)
        table = alphas_cumprod.detach().to("cpu", torch.float64)
        if table.ndim != 1 or len(table) == 0:
            raise InputError(f"alphas_cumprod has shape {list(table.shape)}; expected [T] with T >= 1")
        if not bool(((table >= 0) & (table <= 1)).all()) or bool((table.diff() > 0).any()):
            raise InputError("alphas_cumprod must lie in [0, 1] and never rise")
        if prediction_type == "sample" and bool((table == 1).any()):
            raise InputError("alphas_cumprod contains 1, where a predicted sample says nothing about the noise")
        if unet_timesteps is not None:
            _expect_tensor("unet_timesteps", unet_timesteps)
            unet_timesteps = unet_timesteps.detach().to("cpu", torch.float64)
            usable = unet_timesteps.isfinite() & (unet_timesteps >= 0)
            if unet_timesteps.shape != table.shape or not bool(usable.all()):
                raise InputError(f"unet_timesteps must be {len(table)} finite numbers >= 0, one for each timestep")
        self.alphas_cumprod = table
        self.prediction_type = prediction_type
        self.unet_timesteps = unet_timesteps
        self._tables: dict[tuple[torch.device, torch.dtype], Tables] = {}

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> NoiseSchedule:
        """Read the schedule off a diffusers scheduler; `ModelError` if the UNet was not trained on a table of betas."""
        table = getattr(scheduler, "alphas_cumprod", None)
        config = getattr(scheduler, "config", None)
        if not isinstance(table, Tensor):
            raise ModelError(
                f"{type(scheduler).__name__} has no alphas_cumprod: a scheduler with a table of betas is needed"
            )
        if not isinstance(config, Mapping):
            raise ModelError(f"{type(scheduler).__name__} has no config that says what the UNet predicts")
        # These keep a table that they do not use.
        if config.get("use_flow_sigmas") or config.get("timestep_type") == "continuous":
            raise ModelError(
                f"{type(scheduler).__name__} is set to flow matching or to continuous noise levels, whose UNets "
                "take other timesteps; expected a scheduler with discrete timesteps"
            )
        prediction_type = config.get("prediction_type", "epsilon")
        if config.get("rescale_betas_zero_snr") and float(table[-1]) == 2**-24:
            # Samplers that divide by the last, which is zero, put this there; it may be above the one before it
            # (diffusers 0.42).
            table = torch.cat([table[:-1], table.new_zeros(1)])
        try:
            return cls(table, prediction_type)
        except InputError as error:
            raise ModelError(f"{type(scheduler).__name__}: {error}") from error

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object from which `from_json` makes exactly this schedule."""
        told = {} if self.unet_timesteps is None else {"unet_timesteps": self.unet_timesteps.tolist()}
        return {"prediction_type": self.prediction_type, "alphas_cumprod": self.alphas_cumprod.tolist(), **told}

    @classmethod
    def from_json(cls, value: Any) -> NoiseSchedule:
        """Undo `to_json`; `BundleError` if `value` is not such an object."""
        if not isinstance(value, dict) or set(value) - {"unet_timesteps"} != {"prediction_type", "alphas_cumprod"}:
            raise BundleError(
                "the schedule must be an object of only prediction_type, alphas_cumprod and, optionally, unet_timesteps"
            )
        tables = {name: numbers for name, numbers in value.items() if name != "prediction_type"}
        for name, numbers in tables.items():
            if not isinstance(numbers, list) or not all(type(number) in (int, float) for number in numbers):
                raise BundleError(f"the schedule's {name} must be a list of numbers")
        try:
            return cls(
                prediction_type=value["prediction_type"],
                **{name: torch.tensor(numbers, dtype=torch.float64, device="cpu") for name, numbers in tables.items()},
            )
        except (InputError, OverflowError) as error:
            raise BundleError(f"the schedule is not usable: {error}") from error

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": {}}

    def scales(self, timesteps: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return sqrt(abar) and sqrt(1 - abar) at `timesteps` (integer valued, [B]), each [B, 1, 1, 1] of `dtype`.

        The roots are taken in float64, so that 1 - abar keeps its digits at small timesteps.
        """
        index = timesteps.long()
        tables = self.tables(timesteps.device, dtype)
        return tables.signal[index].view(-1, 1, 1, 1), tables.noise[index].view(-1, 1, 1, 1)

    def told(self, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        """Return what the UNet is told at `timesteps` (integer valued, [B]): these themselves, or [B] in `dtype`."""
        table = self.tables(timesteps.device, dtype).unet_timesteps
        return timesteps if table is None else table[timesteps.long()]

    def tables(self, device: torch.device, dtype: torch.dtype) -> Tables:
        """Return what depends on the timestep alone."""
        key = (device, dtype)
        if key not in self._tables:
            told = self.unet_timesteps
            self._tables[key] = Tables(
                self.alphas_cumprod.sqrt().to(device, dtype),
                (1 - self.alphas_cumprod).sqrt().to(device, dtype),
                None if told is None else told.to(device, dtype),
            )
        return self._tables[key]

    def add_noise(self, image: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return sqrt(abar) image + sqrt(1 - abar) noise; image in [-1, 1], noise standard normal, [B, C, H, W]."""
        signal_scale, noise_scale = self.scales(timesteps, image.dtype)
        return signal_scale * image + noise_scale * noise

    def noise_from(self, prediction: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """Turn what the UNet predicts at `noisy` into the noise in `noisy` that this implies; all [B, C, H, W]."""
        if self.prediction_type == "epsilon":
            return prediction
        signal_scale, noise_scale = self.scales(timesteps, prediction.dtype)
        if self.prediction_type == "v_prediction":
            return signal_scale * prediction + noise_scale * noisy
        return (noisy - signal_scale * prediction) / noise_scale


def _expect_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise InputTypeError(f"{name} is a {type(value).__name__}; expected a torch.Tensor")
