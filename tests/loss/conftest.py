"""Images for the loss, the paper's published schedule, and one small exported bundle."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from diffloss_export.models import LoadedModel
from diffloss_export.pipeline import export_bundle
from diffloss_trt import NoiseSchedule
from exports import Once
from unets import make_unet

Batch = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(scope="session")
def golden() -> Mapping[str, Tensor]:
    """Inputs and float64 results of the original guided-diffusion code on a random ADM network."""
    with np.load(Path(__file__).parents[1] / "data" / "a.npz") as archive:
        return {name: torch.from_numpy(archive[name]) for name in archive if archive[name].dtype.kind in "fi"}


@pytest.fixture(scope="session")
def scheduler() -> Any:
    """The linear schedule of 1000 steps from 1e-4 to 0.02 (Ho et al., 2020)."""
    return DDPMScheduler(1000, beta_schedule="linear")


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., Batch]:
    """(size=16, count=3, channels=3, dtype=float64) -> restored, target, noise, timesteps; images in [-1, 1]."""

    def make_batch(
        size: int = 16, count: int = 3, channels: int = 3, dtype: torch.dtype = torch.float64
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(7)
        shape = (count, channels, size, size)
        target = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1
        restored = target + 0.2 * torch.randn(shape, generator=generator, dtype=torch.float64)
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        timesteps = torch.tensor([400, 3, 90, 700, 250])[:count]
        return restored.to(dtype), target.to(dtype), noise.to(dtype), timesteps

    return make_batch


@pytest.fixture
def batch(make_batch: Callable[..., Batch]) -> Batch:
    """Three images of 16x16 in float64: restored, target, noise, timesteps."""
    return make_batch()


@pytest.fixture(scope="session")
def exported(once: Once) -> tuple[Path, Any, NoiseSchedule]:
    """A bundle of batch 4 of a UNet that predicts v, the UNet in float64, and the schedule."""
    unet = make_unet("one_level", dtype=torch.float32)
    reference = copy.deepcopy(unet).double()
    schedule = NoiseSchedule.from_scheduler(DDPMScheduler(1000, prediction_type="v_prediction"))

    def make(folder: Path) -> Path:
        export_bundle(LoadedModel(unet, schedule, "test", ()), folder / "bundle", batch_size=4)
        return folder / "bundle"

    return once("loss", make), reference, schedule
