"""The schedule against the original code's numbers, and against the definitions of what a UNet may predict."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from diffloss_engine.errors import BundleError, InputError, InputTypeError, ModelError
from diffloss_trt import NoiseSchedule

TABLE = torch.tensor([0.9999, 0.9, 0.5, 0.01], dtype=torch.float64)


def test_linear_schedule_is_the_original_one(golden: Mapping[str, Tensor], scheduler: Any) -> None:
    schedule = NoiseSchedule.from_scheduler(scheduler)
    assert len(schedule) == 1000
    assert schedule.alphas_cumprod.dtype == torch.float64
    # diffusers multiplies the thousand factors up in float32.
    torch.testing.assert_close(schedule.alphas_cumprod, golden["alphas_cumprod"], rtol=2e-5, atol=0)


def test_mixture_is_the_original_one(golden: Mapping[str, Tensor]) -> None:
    schedule = NoiseSchedule(golden["alphas_cumprod"])
    for name in ("restored", "target"):
        noisy = schedule.add_noise(golden[name].double(), golden["noise"].double(), golden["timesteps"])
        torch.testing.assert_close(noisy, golden[f"{name}_t"], rtol=0, atol=1e-14)


def test_mixture_by_hand() -> None:
    schedule = NoiseSchedule(TABLE)
    image, noise = torch.randn(2, 4, 3, 2, 2, dtype=torch.float64)
    noisy = schedule.add_noise(image, noise, torch.tensor([3, 0, 2, 1]))
    for row, step in enumerate((3, 0, 2, 1)):
        a = float(TABLE[step])
        torch.testing.assert_close(
            noisy[row], math.sqrt(a) * image[row] + math.sqrt(1 - a) * noise[row], rtol=1e-14, atol=1e-14
        )


def test_scales_keep_their_digits_in_float32() -> None:
    """1 - abar is 1e-10 here: taken in float32 it would be zero."""
    schedule = NoiseSchedule(torch.tensor([1 - 1e-10, 0.5], dtype=torch.float64))
    signal, noise = schedule.scales(torch.tensor([0]), torch.float32)
    assert signal.dtype == noise.dtype == torch.float32
    assert signal.shape == noise.shape == (1, 1, 1, 1)
    assert noise.item() == pytest.approx(1e-5, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.float32])
def test_scales_take_any_integer_valued_timesteps(dtype: torch.dtype) -> None:
    signal, _ = NoiseSchedule(TABLE).scales(torch.tensor([2, 1], dtype=dtype), torch.float64)
    torch.testing.assert_close(signal.flatten(), TABLE[[2, 1]].sqrt())


def test_predicted_noise_is_recovered() -> None:
    """From the definitions: v = sqrt(abar) noise - sqrt(1 - abar) image (Salimans & Ho, 2022)."""
    image, noise = torch.randn(2, 4, 3, 2, 2, dtype=torch.float64)
    steps = torch.arange(4)
    a = TABLE.view(4, 1, 1, 1)
    predictions = {"epsilon": noise, "v_prediction": a.sqrt() * noise - (1 - a).sqrt() * image, "sample": image}
    for prediction_type, prediction in predictions.items():
        schedule = NoiseSchedule(TABLE, prediction_type)
        noisy = schedule.add_noise(image, noise, steps)
        torch.testing.assert_close(schedule.noise_from(prediction, noisy, steps), noise, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "scheduler",
    [
        DDPMScheduler(200, beta_schedule="squaredcos_cap_v2"),
        DDIMScheduler(1000, prediction_type="v_prediction", rescale_betas_zero_snr=True),
        EulerDiscreteScheduler(1000, prediction_type="sample"),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_any_scheduler_with_betas(scheduler: Any) -> None:
    schedule = NoiseSchedule.from_scheduler(scheduler)
    torch.testing.assert_close(schedule.alphas_cumprod, scheduler.alphas_cumprod.double(), rtol=0, atol=0)
    assert schedule.prediction_type == scheduler.config.prediction_type


@pytest.mark.parametrize("steps", [200, 1000])
@pytest.mark.parametrize("sampler", [EulerDiscreteScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_zero_terminal_snr_is_zero_whatever_a_sampler_puts_in_its_place(sampler: Any, steps: int) -> None:
    settings: dict[str, Any] = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    same = {"num_train_timesteps": steps, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
    found = NoiseSchedule.from_scheduler(sampler(**same, **settings)).alphas_cumprod
    expected = DDIMScheduler(**same, **settings).alphas_cumprod.double()
    assert float(expected[-1]) == 0
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_scheduler_without_betas() -> None:
    with pytest.raises(ModelError, match="FlowMatchEulerDiscreteScheduler has no alphas_cumprod"):
        NoiseSchedule.from_scheduler(FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ModelError, match="str has no alphas_cumprod"):
        NoiseSchedule.from_scheduler("linear")


@pytest.mark.parametrize(
    "scheduler",
    [
        EulerDiscreteScheduler(1000, timestep_type="continuous", prediction_type="v_prediction"),
        DPMSolverMultistepScheduler(1000, use_flow_sigmas=True, prediction_type="flow_prediction"),
        UniPCMultistepScheduler(1000, use_flow_sigmas=True),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_scheduler_that_does_not_use_its_betas(scheduler: Any) -> None:
    assert isinstance(scheduler.alphas_cumprod, Tensor)
    with pytest.raises(ModelError, match="is set to flow matching or to continuous noise levels"):
        NoiseSchedule.from_scheduler(scheduler)


def test_scheduler_that_does_not_say_what_is_predicted() -> None:
    with pytest.raises(ModelError, match="SimpleNamespace has no config that says what the UNet predicts"):
        NoiseSchedule.from_scheduler(SimpleNamespace(alphas_cumprod=TABLE))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (torch.ones(2, 2), r"shape \[2, 2\]; expected \[T\]"),
        (torch.ones(0), r"shape \[0\]; expected \[T\] with T >= 1"),
        (torch.tensor([0.5, 0.6]), "never rise"),
        (torch.tensor([1.5, 0.6]), r"must lie in \[0, 1\]"),
        (torch.tensor([0.5, -0.1]), r"must lie in \[0, 1\]"),
        (torch.tensor([0.5, math.nan]), r"must lie in \[0, 1\]"),
    ],
)
def test_impossible_tables(table: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        NoiseSchedule(table)


def test_tables_are_tensors() -> None:
    with pytest.raises(InputTypeError, match=r"alphas_cumprod is a list; expected a torch\.Tensor"):
        NoiseSchedule([0.9, 0.5])  # type: ignore[arg-type]
    with pytest.raises(InputTypeError, match=r"unet_timesteps is a range; expected a torch\.Tensor"):
        NoiseSchedule(TABLE, unet_timesteps=range(5))  # type: ignore[arg-type]


def test_impossible_predictions() -> None:
    with pytest.raises(InputError, match="'score'; expected one of epsilon, v_prediction, sample"):
        NoiseSchedule(TABLE, "score")
    with pytest.raises(InputError, match="contains 1, where a predicted sample"):
        NoiseSchedule(torch.tensor([1.0, 0.5]), "sample")
    unknown = DDPMScheduler(10)
    unknown.register_to_config(prediction_type="flow")
    with pytest.raises(ModelError, match="DDPMScheduler: prediction_type is 'flow'"):
        NoiseSchedule.from_scheduler(unknown)


@pytest.mark.parametrize(
    "told", [torch.zeros(TABLE.shape[0] + 1), -torch.ones_like(TABLE), TABLE * math.nan, TABLE[None]]
)
def test_impossible_timesteps_of_the_unet(told: Tensor) -> None:
    with pytest.raises(InputError, match="unet_timesteps must be"):
        NoiseSchedule(TABLE, unet_timesteps=told)


def test_what_the_unet_is_told() -> None:
    timesteps = torch.tensor([1, 0])
    assert NoiseSchedule(TABLE).told(timesteps, torch.float32) is timesteps
    told = NoiseSchedule(TABLE, unet_timesteps=250.5 * torch.arange(len(TABLE))).told(timesteps, torch.float64)
    assert told.dtype == torch.float64
    assert told.tolist() == [250.5, 0.0]


def test_json_keeps_every_digit() -> None:
    table = torch.linspace(1, 0, 7, dtype=torch.float64) ** 0.3
    for told in (None, 1000 / 3 * torch.arange(7, dtype=torch.float64)):
        schedule = NoiseSchedule(table, "v_prediction", told)
        again = NoiseSchedule.from_json(json.loads(json.dumps(schedule.to_json())))
        assert torch.equal(again.alphas_cumprod, table)
        assert again.prediction_type == "v_prediction"
        assert (again.unet_timesteps is None) == (told is None)
        if told is not None and again.unet_timesteps is not None:
            assert torch.equal(again.unet_timesteps, told)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([0.5], "must be an object"),
        ({"alphas_cumprod": [0.5]}, "only prediction_type, alphas_cumprod and"),
        ({"alphas_cumprod": [0.5], "prediction_type": "epsilon", "betas": []}, "must be an object of only"),
        ({"alphas_cumprod": 0.5, "prediction_type": "epsilon"}, "a list of numbers"),
        ({"alphas_cumprod": [0.5, "0.4"], "prediction_type": "epsilon"}, "a list of numbers"),
        ({"alphas_cumprod": [True], "prediction_type": "epsilon"}, "a list of numbers"),
        ({"alphas_cumprod": [], "prediction_type": "epsilon"}, "not usable"),
        ({"alphas_cumprod": [10**400], "prediction_type": "epsilon"}, "not usable"),
        ({"alphas_cumprod": [math.nan], "prediction_type": "epsilon"}, "not usable"),
        ({"alphas_cumprod": [0.5], "prediction_type": ["epsilon"]}, "not usable"),
        ({"alphas_cumprod": [0.5], "prediction_type": "epsilon", "unet_timesteps": None}, "a list of numbers"),
        ({"alphas_cumprod": [0.5], "prediction_type": "epsilon", "unet_timesteps": [1, 2]}, "not usable"),
    ],
)
def test_broken_json(value: Any, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        NoiseSchedule.from_json(value)


def test_pickle_leaves_the_device_tables_behind() -> None:
    schedule = NoiseSchedule(TABLE)
    fresh = len(pickle.dumps(schedule))
    for dtype in (torch.float32, torch.float64):
        schedule.scales(torch.tensor([1]), dtype)
    assert len(pickle.dumps(schedule)) == fresh
    signal, _ = pickle.loads(pickle.dumps(schedule)).scales(torch.tensor([1]), torch.float64)
    assert signal.item() == math.sqrt(0.9)
