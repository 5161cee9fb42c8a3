"""The two halves that become graphs: named as agreed, and together the UNet."""

from __future__ import annotations

import pytest
import torch

from diffloss_engine import ModelError
from diffloss_export.programs import blank_feature_programs, feature_programs
from diffloss_trt.contract import ENCODER, NOISE, NOISE_HEAD, NOISY, TIMESTEPS
from diffloss_trt.unet import TappedUNet
from exports import make_schedule
from unets import KINDS, make_unet


def images(channels: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    noisy = torch.randn(2, channels, size, size, generator=generator, dtype=torch.float64)
    return noisy, torch.tensor([4.0, 800.0], dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_halves_together_are_the_unet(kind: str, prediction_type: str) -> None:
    unet = make_unet(kind)
    tapped = TappedUNet(unet, make_schedule(prediction_type))
    channels = unet.config.in_channels
    noisy, timesteps = images(channels, unet.config.sample_size)
    # Other inputs than those that the programs are made with: nothing of the example may stay in them.
    encoder, head = feature_programs(tapped, torch.zeros_like(noisy), torch.zeros_like(timesteps))
    with torch.no_grad():
        tensors = {NOISY: noisy, TIMESTEPS: timesteps}
        tensors.update(zip(encoder.outputs, encoder.module(noisy, timesteps), strict=True))
        (noise,) = head.module(*(tensors[name] for name in head.inputs))
        # diffusers' own forward runs the time embedding in the dtype of the UNet, as the halves do.
        prediction = unet(noisy, timesteps if kind != "learned_time" else timesteps.long()).sample[:, :channels]
    signal, scale = (
        root.sqrt().view(-1, 1, 1, 1)
        for root in (
            tapped.schedule.alphas_cumprod[timesteps.long()],
            1 - tapped.schedule.alphas_cumprod[timesteps.long()],
        )
    )
    expected = {
        "epsilon": prediction,
        "v_prediction": signal * prediction + scale * noisy,
        "sample": (noisy - signal * prediction) / scale,
    }[prediction_type]
    assert torch.allclose(noise, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_tensors_are_named_as_agreed(prediction_type: str) -> None:
    tapped = TappedUNet(make_unet(), make_schedule(prediction_type))
    noisy, timesteps = images(3, 16)
    encoder, head = feature_programs(tapped, noisy, timesteps)
    between = ("bottleneck", "time_embedding", "skip_0", "skip_1", "skip_2", "skip_3")
    assert (encoder.name, tuple(encoder.inputs), encoder.outputs) == (ENCODER, (NOISY, TIMESTEPS), between)
    extra = () if prediction_type == "epsilon" else (NOISY, TIMESTEPS)
    assert (head.name, tuple(head.inputs), head.outputs) == (NOISE_HEAD, between + extra, (NOISE,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_images_are_float32_at_both_ends_and_half_precision_between(dtype: torch.dtype) -> None:
    tapped = TappedUNet(make_unet(dtype=dtype), make_schedule())
    encoder, head = feature_programs(tapped, torch.zeros(2, 3, 16, 16), torch.zeros(2))
    assert {tensor.dtype for tensor in encoder.inputs.values()} == {torch.float32}
    assert {tensor.dtype for tensor in head.inputs.values()} == {dtype}
    with torch.no_grad():
        (noise,) = head.module(*head.inputs.values())
    assert noise.dtype == torch.float32


def test_example_inputs_of_the_head_are_what_the_encoder_returns() -> None:
    tapped = TappedUNet(make_unet("adm"), make_schedule())
    noisy, timesteps = images(3, 32)
    encoder, head = feature_programs(tapped, noisy, timesteps)
    with torch.no_grad():
        outputs = encoder.module(noisy, timesteps)
    assert all(torch.equal(a, b) for a, b in zip(outputs, head.inputs.values(), strict=True))
    assert not any(tensor.requires_grad for tensor in head.inputs.values())


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_unet_that_cannot_be_run_is_an_error() -> None:
    """With more channels to a head than there are: diffusers makes it, and divides by its number of heads, zero."""
    tapped = TappedUNet(make_unet(attention_head_dim=64), make_schedule())
    with pytest.raises(ModelError, match="the UNet cannot be run: "):
        blank_feature_programs(tapped, 1, (16, 16))
