"""The UNet in two halves against diffusers' own forward, for every layout; and UNets that cannot be used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from diffloss_engine.errors import ModelError
from diffloss_trt import NoiseSchedule
from diffloss_trt.unet import TappedUNet
from unets import KINDS, make_unet

SCHEDULE = NoiseSchedule(torch.linspace(0.999, 0.01, 1000, dtype=torch.float64))

Batch = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_those_of_diffusers(kind: str, make_batch: Callable[..., Batch]) -> None:
    unet = make_unet(kind)
    tapped = TappedUNet(unet, SCHEDULE)
    noisy, _, _, timesteps = make_batch(size=unet.config.sample_size, channels=unet.config.in_channels)
    kept: list[Tensor] = []
    last = unet.mid_block if unet.mid_block is not None else unet.down_blocks[-1]
    handle = last.register_forward_hook(lambda _module, _inputs, output: kept.append(output))
    expected = unet(noisy, timesteps).sample[:, : tapped.channels]
    handle.remove()
    bottleneck = kept[0] if unet.mid_block is not None else kept[0][0]
    for steps in (timesteps, timesteps.double()):  # graphs take timesteps as floating point
        features = tapped.features(noisy, steps, with_noise=True)
        assert features.noise is not None
        torch.testing.assert_close(features.noise, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(features.bottleneck, bottleneck, rtol=1e-12, atol=1e-12)
    alone = tapped.features(noisy, timesteps, with_noise=False)
    assert alone.noise is None
    assert torch.equal(alone.bottleneck, features.bottleneck)


@pytest.mark.parametrize("kind", ["two_levels", "adm", "skip_blocks"])
def test_head_reads_nothing_but_what_the_encoder_returns(kind: str, make_batch: Callable[..., Batch]) -> None:
    unet = make_unet(kind)
    tapped = TappedUNet(unet, SCHEDULE)
    first, second, _, timesteps = make_batch(size=unet.config.sample_size)
    encoded = tapped.encode(first, timesteps)
    assert len(encoded.skips) == sum(len(block.resnets) for block in unet.up_blocks)
    tapped.encode(second, timesteps.flip(0))  # leaves nothing behind
    assert torch.equal(tapped.decode(encoded), unet(first, timesteps).sample[:, :3])


def test_negative_control_sees_one_weight(batch: Batch) -> None:
    unet, altered = make_unet(), make_unet()
    altered.mid_block.resnets[0].conv1.weight[0, 0, 0, 0] += 1e-3
    noisy, _, _, timesteps = batch
    features = TappedUNet(altered, SCHEDULE).features(noisy, timesteps, with_noise=True)
    assert features.noise is not None
    assert (features.noise - unet(noisy, timesteps).sample).abs().max() > 1e-7


@pytest.mark.parametrize("kind", KINDS)
def test_resolution_multiple_is_what_the_layout_can_take(kind: str) -> None:
    unet = make_unet(kind)
    tapped = TappedUNet(unet, SCHEDULE)
    multiple, steps = tapped.resolution_multiple, torch.tensor([5])
    assert multiple == 2 ** (len(unet.config.block_out_channels) - 1)
    size = (3 * multiple, 5 * multiple)
    noisy = torch.zeros(1, tapped.channels, *size, dtype=torch.float64)
    features = tapped.features(noisy, steps, with_noise=True)
    assert features.noise is not None
    assert features.noise.shape == noisy.shape
    assert features.bottleneck.shape[2:] == (3, 5)
    if multiple > 1:
        with pytest.raises(RuntimeError):
            tapped.features(noisy[..., :-1], steps, with_noise=True)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_other_predictions_become_noise(prediction_type: str, batch: Batch) -> None:
    noisy, _, _, timesteps = batch
    unet = make_unet("variance")
    a = SCHEDULE.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    predicted = unet(noisy, timesteps).sample[:, :3]
    if prediction_type == "sample":
        expected = (noisy - a.sqrt() * predicted) / (1 - a).sqrt()
    else:
        expected = a.sqrt() * predicted + (1 - a).sqrt() * noisy
    schedule = NoiseSchedule(SCHEDULE.alphas_cumprod, prediction_type)
    features = TappedUNet(unet, schedule).features(noisy, timesteps, with_noise=True)
    torch.testing.assert_close(features.noise, expected, rtol=1e-12, atol=1e-12)


def test_unet_is_frozen_and_in_eval_mode(batch: Batch) -> None:
    unet = make_unet(dropout=0.5).train().requires_grad_(True)
    tapped = TappedUNet(unet, SCHEDULE)
    assert not any(parameter.requires_grad for parameter in unet.parameters())
    noisy, _, _, timesteps = batch
    first = tapped.features(noisy, timesteps, with_noise=True)
    unet.train()  # as that of a module that it is a part of
    second = tapped.features(noisy, timesteps, with_noise=True)
    assert first.noise is not None
    assert second.noise is not None
    assert torch.equal(first.noise, second.noise)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_unet_knows_large_timesteps_apart(dtype: torch.dtype, batch: Batch) -> None:
    """4001 is no fp16 number, and 513 no bf16 number: the sinusoid is made of the timestep in float32."""
    tapped = TappedUNet(make_unet(dtype=dtype), SCHEDULE)
    low, high = (4000, 4001) if dtype == torch.float16 else (512, 513)
    embeddings = tapped.encode(batch[0][:2].float(), torch.tensor([low, high])).time_embedding
    assert embeddings.dtype == dtype
    assert not torch.equal(embeddings[0], embeddings[1])
    features = tapped.features(batch[0][:2].float(), torch.tensor([low, high]), with_noise=True)
    assert features.noise is not None
    assert features.noise.dtype == torch.float32


def broken(value: float) -> Any:
    unet = make_unet()
    unet.up_blocks[0].resnets[0].conv1.bias[3] = value
    return unet


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Linear(3, 3), r"Linear is not a diffusers\.UNet2DModel: it has no conv_in"),
        (lambda: None, r"NoneType is not a diffusers\.UNet2DModel"),
        (lambda: make_unet(num_class_embeds=10), "class-conditional"),
        (lambda: make_unet(class_embed_type="timestep"), "class-conditional"),
        (lambda: make_unet(time_embedding_type="fourier"), "'fourier'"),
        (
            lambda: make_unet(down_block_types=("KDownBlock2D",) * 2, up_block_types=("KUpBlock2D",) * 2),
            "has a KDownBlock2D; expected blocks of DownBlock2D, ",
        ),
        (lambda: make_unet(out_channels=4), r"takes 3 channels and returns 4 .*expected 3 .*or 6"),
        (lambda: make_unet(in_channels=6), r"takes 6 channels and returns 3"),
        (
            lambda: UNet2DConditionModel(
                block_out_channels=(32, 32),
                down_block_types=("DownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "UpBlock2D"),
                cross_attention_dim=8,
                layers_per_block=1,
            ),
            r"UNet2DConditionModel is conditional \(cross_attention_dim\)",
        ),
        (
            lambda: make_unet("learned_time", num_train_timesteps=100),
            "has learned 100 timesteps, but its schedule goes up to 999",
        ),
        (lambda: broken(float("nan")), r"up_blocks\.0\.resnets\.0\.conv1\.bias holds NaN or infinite"),
        (lambda: broken(float("inf")), r"up_blocks\.0\.resnets\.0\.conv1\.bias holds NaN or infinite"),
        (lambda: nn.Module.to(make_unet("one_level"), "meta"), r"conv_in\.weight is on the meta device"),
    ],
)
def test_unets_that_cannot_be_used(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        TappedUNet(make(), SCHEDULE)


def test_learned_timesteps_are_those_that_the_unet_is_told() -> None:
    told = torch.linspace(0, 980, 50, dtype=torch.float64)
    schedule = NoiseSchedule(torch.linspace(0.99, 0.01, 50, dtype=torch.float64), unet_timesteps=told)
    with pytest.raises(ModelError, match="has learned 100 timesteps, but its schedule goes up to 980"):
        TappedUNet(make_unet("learned_time", num_train_timesteps=100), schedule)
    TappedUNet(make_unet("learned_time", num_train_timesteps=981), schedule)
