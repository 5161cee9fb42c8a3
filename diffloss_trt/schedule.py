"""The forward diffusion process: how much of an image and of noise a timestep mixes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffloss_engine.errors import BundleError, InputError, ModelError

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


class NoiseSchedule:
    """A variance-preserving noise schedule and what the UNet predicts under it.

    `alphas_cumprod` is the cumulative product of 1 - beta, float64 [T] in [0, 1], falling
    (Ho et al., Denoising Diffusion Probabilistic Models, 2020, equation 4). `prediction_type` is
    "epsilon" (the noise), "v_prediction" (Salimans & Ho, 2022) or "sample" (the clean image).
    """

    def __init__(self, alphas_cumprod: Tensor, prediction_type: str = "epsilon") -> None:
        if prediction_type not in PREDICTION_TYPES:
            raise InputError(f"prediction_type is {prediction_type!r}; expected one of {', '.join(PREDICTION_TYPES)}")
        table = alphas_cumprod.detach().to("cpu", torch.float64)
        if table.ndim != 1 or len(table) == 0:
            raise InputError(f"alphas_cumprod has shape {list(table.shape)}; expected [T] with T >= 1")
        if not bool(((table >= 0) & (table <= 1)).all()) or bool((table.diff() > 0).any()):
            raise InputError("alphas_cumprod must lie in [0, 1] and never rise")
        if prediction_type == "sample" and bool((table == 1).any()):
            raise InputError("alphas_cumprod contains 1, where a predicted sample says nothing of the noise")
        self.alphas_cumprod = table
        self.prediction_type = prediction_type
        self._tables: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> NoiseSchedule:
        """Read the schedule off a diffusers scheduler; `ModelError` if it has no table of betas."""
        table = getattr(scheduler, "alphas_cumprod", None)
        if not isinstance(table, Tensor):
            raise ModelError(
                f"{type(scheduler).__name__} has no alphas_cumprod: a scheduler with a table of betas is needed"
            )
        prediction_type = scheduler.config.get("prediction_type", "epsilon")
        try:
            return cls(table, prediction_type)
        except InputError as error:
            raise ModelError(f"{type(scheduler).__name__}: {error}") from error

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object from which `from_json` makes exactly this schedule."""
        return {"prediction_type": self.prediction_type, "alphas_cumprod": self.alphas_cumprod.tolist()}

    @classmethod
    def from_json(cls, value: Any) -> NoiseSchedule:
        """Undo `to_json`; `BundleError` if `value` is not such an object."""
        if not isinstance(value, dict) or set(value) != {"prediction_type", "alphas_cumprod"}:
            raise BundleError("the schedule must be an object with prediction_type and alphas_cumprod alone")
        numbers = value["alphas_cumprod"]
        if not isinstance(numbers, list) or not all(type(number) in (int, float) for number in numbers):
            raise BundleError("the schedule's alphas_cumprod must be a list of numbers")
        try:
            return cls(torch.tensor(numbers, dtype=torch.float64), value["prediction_type"])
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
        signal, noise = self.tables(timesteps.device, dtype)
        return signal[index].view(-1, 1, 1, 1), noise[index].view(-1, 1, 1, 1)

    def tables(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return sqrt(abar) and sqrt(1 - abar) of every timestep, each [T]."""
        key = (device, dtype)
        if key not in self._tables:
            signal, noise = self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt()
            self._tables[key] = signal.to(device, dtype), noise.to(device, dtype)
        return self._tables[key]

    def add_noise(self, image: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return sqrt(abar) image + sqrt(1 - abar) noise; image in [-1, 1], noise standard normal, [B, C, H, W]."""
        signal_scale, noise_scale = self.scales(timesteps, image.dtype)
        return signal_scale * image + noise_scale * noise

    def noise_from(self, prediction: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """Turn what the UNet predicts at `noisy` into the noise that it takes `noisy` to hold; all [B, C, H, W]."""
        if self.prediction_type == "epsilon":
            return prediction
        signal_scale, noise_scale = self.scales(timesteps, prediction.dtype)
        if self.prediction_type == "v_prediction":
            return signal_scale * prediction + noise_scale * noisy
        return (noisy - signal_scale * prediction) / noise_scale
