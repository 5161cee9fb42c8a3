"""The noise schedule, against closed forms and against the original code's numbers (golden case a)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, KarrasVeScheduler
from torch import Tensor

from diffloss_engine.errors import BundleError, InputError, ModelError
from diffloss_trt import NoiseSchedule
from diffloss_trt.objective import combine, mean_square

GOLDEN = Path(__file__).parents[1] / "data" / "a.npz"


def linear() -> Tensor:
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)


@pytest.fixture
def golden() -> dict[str, Tensor]:
    with np.load(GOLDEN) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files if file[name].dtype.kind in "fi"}


def test_golden_schedule_is_the_linear_one(golden: dict[str, Tensor]) -> None:
    torch.testing.assert_close(linear(), golden["alphas_cumprod"], rtol=1e-12, atol=0)
    # diffusers keeps its table in float32, which leaves seven digits.
    of_diffusers = NoiseSchedule.from_scheduler(DDPMScheduler(1000, beta_schedule="linear")).alphas_cumprod
    torch.testing.assert_close(of_diffusers, golden["alphas_cumprod"], rtol=2e-5, atol=0)


def test_golden_mixture(golden: dict[str, Tensor]) -> None:
    schedule = NoiseSchedule(golden["alphas_cumprod"])
    for branch in ("restored", "target"):
        noisy = schedule.add_noise(golden[branch].double(), golden["noise"].double(), golden["timesteps"])
        torch.testing.assert_close(noisy, golden[f"{branch}_t"], rtol=1e-12, atol=1e-12)


def test_golden_objective(golden: dict[str, Tensor]) -> None:
    # The UNet of this case also predicts a variance, behind the noise.
    naturalness = mean_square((golden["eps_restored"] - golden["eps_target"])[:, :3])
    semantic = mean_square(golden["h_restored"] - golden["h_target"])
    torch.testing.assert_close(naturalness, golden["naturalness"], rtol=1e-12, atol=0)
    torch.testing.assert_close(semantic, golden["semantic"], rtol=1e-12, atol=0)
    torch.testing.assert_close(
        combine(naturalness, semantic, 1e-3, 1e-6), 1e-3 * golden["naturalness"] + 1e-6 * golden["semantic"]
    )


def test_squares_are_taken_in_float32() -> None:
    difference = torch.full((1, 4), 300.0, dtype=torch.float16)
    assert mean_square(difference).item() == 90000.0  # beyond fp16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mixture_has_unit_variance_and_keeps_digits_at_the_first_timestep(dtype: torch.dtype) -> None:
    schedule = NoiseSchedule(linear())
    signal, noise = schedule.scales(torch.tensor([0, 999]), dtype)
    assert signal.shape == (2, 1, 1, 1)
    torch.testing.assert_close(signal**2 + noise**2, torch.ones_like(signal))
    # 1 - abar is exactly beta there; taken in float32, 1 - 0.9999 would have lost four digits.
    assert noise[0].item() == pytest.approx(1e-4**0.5, rel=1e-7)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_noise_is_recovered_from_each_kind_of_prediction(prediction_type: str) -> None:
    schedule = NoiseSchedule(linear(), prediction_type)
    image, noise = torch.randn(2, 3, 3, 4, 4, dtype=torch.float64)
    timesteps = torch.tensor([0, 400, 999])
    noisy = schedule.add_noise(image, noise, timesteps)
    signal_scale, noise_scale = (linear()[timesteps] ** 0.5).view(3, 1, 1, 1), (1 - linear()[timesteps]) ** 0.5
    noise_scale = noise_scale.view(3, 1, 1, 1)
    prediction = {"epsilon": noise, "v_prediction": signal_scale * noise - noise_scale * image, "sample": image}
    torch.testing.assert_close(schedule.noise_from(prediction[prediction_type], noisy, timesteps), noise)


def test_json_round_trip_is_exact() -> None:
    schedule = NoiseSchedule(linear(), "v_prediction")
    again = NoiseSchedule.from_json(schedule.to_json())
    assert torch.equal(again.alphas_cumprod, schedule.alphas_cumprod)
    assert again.prediction_type == "v_prediction"
    assert len(again) == 1000


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        {"prediction_type": "epsilon"},
        {"prediction_type": "epsilon", "alphas_cumprod": [0.9, "0.8"]},
        {"prediction_type": "epsilon", "alphas_cumprod": [0.8, 0.9]},
        {"prediction_type": "epsilon", "alphas_cumprod": []},
        {"prediction_type": "score", "alphas_cumprod": [0.9]},
        {"prediction_type": "epsilon", "alphas_cumprod": [0.9], "more": 1},
    ],
)
def test_malformed_json_is_refused(value: object) -> None:
    with pytest.raises(BundleError, match="schedule"):
        NoiseSchedule.from_json(value)


def test_bad_tables_are_refused() -> None:
    with pytest.raises(InputError, match="prediction_type is 'flow'"):
        NoiseSchedule(linear(), "flow")
    with pytest.raises(InputError, match=r"shape \[2, 2\]"):
        NoiseSchedule(torch.ones(2, 2))
    with pytest.raises(InputError, match="never rise"):
        NoiseSchedule(torch.tensor([0.5, 0.6]))
    with pytest.raises(InputError, match="contains 1"):
        NoiseSchedule(torch.tensor([1.0, 0.5]), "sample")


def test_schedulers() -> None:
    schedule = NoiseSchedule.from_scheduler(DDIMScheduler(50, prediction_type="v_prediction"))
    assert (len(schedule), schedule.prediction_type) == (50, "v_prediction")
    with pytest.raises(ModelError, match="KarrasVeScheduler has no alphas_cumprod"):
        NoiseSchedule.from_scheduler(KarrasVeScheduler())
