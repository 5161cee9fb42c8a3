"""What a trainer can get wrong: each is refused before any work, in one sentence that says what was expected."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor

from diffloss_engine.errors import DiffLossError
from diffloss_trt import DiffLoss
from unets import make_unet


@pytest.fixture(scope="module")
def loss() -> DiffLoss:
    return DiffLoss.from_unet(make_unet("two_levels", dtype=torch.float32), DDPMScheduler(1000))


def image(*shape: int) -> Tensor:
    return torch.rand(shape or (2, 3, 16, 16), generator=torch.Generator().manual_seed(0))


def with_value(value: float) -> Tensor:
    altered = image()
    altered[1, 2, 3, 4] = value
    return altered


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"restored": image(3, 16, 16)}, ValueError, "restored has shape [3, 16, 16]; expected four axes"),
        ({"restored": image(2, 1, 16, 16)}, ValueError, "restored has shape [2, 1, 16, 16]; expected [2, 3, 16, 16]"),
        ({"restored": image(0, 3, 16, 16)}, ValueError, "at least one image"),
        ({"restored": image(2, 3, 15, 16)}, ValueError, "15x16; expected height and width to be multiples of 2"),
        ({"restored": (image() * 255).byte()}, TypeError, "restored has dtype torch.uint8; expected a floating-point"),
        ({"restored": "photo.png"}, TypeError, "restored is a str"),
        ({"restored": image().to("meta")}, TypeError, "restored is on meta; expected cpu"),
        ({"restored": image() * 255}, ValueError, "expected about 0 to 1 (value_range=(0.0, 1.0))"),
        ({"restored": with_value(torch.nan)}, ValueError, "restored holds NaN or infinite values"),
        ({"restored": with_value(torch.inf)}, ValueError, "restored holds NaN or infinite values"),
        ({"target": image(2, 3, 16, 18)}, ValueError, "target has shape [2, 3, 16, 18]; expected [2, 3, 16, 16]"),
        ({"target": image(1, 3, 16, 16)}, ValueError, "target has shape [1, 3, 16, 16]; expected [2, 3, 16, 16]"),
        ({"target": image() * 2 - 1}, ValueError, "target has values from -"),
        ({"target": with_value(torch.nan)}, ValueError, "target holds NaN"),
        ({"target": image().requires_grad_()}, ValueError, "target requires grad"),
        ({"target": None}, TypeError, "target is a NoneType"),
        ({"timesteps": torch.tensor([0, 1000])}, ValueError, "timesteps has values from 0 to 1000; expected 0 to 999"),
        ({"timesteps": torch.tensor([-1, 5])}, ValueError, "timesteps has values from -1 to 5"),
        ({"timesteps": torch.tensor([0.0, 1.0])}, TypeError, "timesteps has dtype torch.float32"),
        ({"timesteps": torch.tensor([True, False])}, TypeError, "timesteps has dtype torch.bool"),
        ({"timesteps": torch.tensor([1])}, ValueError, "timesteps has shape [1]; expected [2]"),
        ({"timesteps": 5}, TypeError, "timesteps is a int"),
        ({"noise": image(2, 3, 16, 8)}, ValueError, "noise has shape [2, 3, 16, 8]; expected [2, 3, 16, 16]"),
        ({"noise": image().long()}, TypeError, "noise has dtype torch.int64"),
        ({"noise": image().requires_grad_()}, ValueError, "noise requires grad"),
    ],
)
def test_images(loss: DiffLoss, arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    given = {"restored": image(), "target": image(), **arguments}
    with pytest.raises(DiffLossError, match=re.escape(message)) as caught:
        loss(given.pop("restored"), given.pop("target"), **given)
    assert isinstance(caught.value, kind)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"naturalness_weight": -1.0}, "naturalness_weight is -1.0; expected a finite number >= 0"),
        ({"semantic_weight": float("nan")}, "semantic_weight is nan"),
        ({"semantic_weight": float("inf")}, "semantic_weight is inf"),
        ({"semantic_weight": True}, "semantic_weight is a bool"),
        ({"naturalness_weight": "1"}, "naturalness_weight is a str"),
        ({"reduction": "sum"}, "reduction is 'sum'; expected 'mean' or 'none'"),
        ({"value_range": (1.0, 0.0)}, "low < high"),
        ({"value_range": 255}, "value_range is 255; expected (low, high)"),
        ({"value_range": (0.0, float("inf"))}, "finite bounds"),
    ],
)
def test_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DiffLossError, match=re.escape(message)):
        DiffLoss.from_unet(make_unet(), DDPMScheduler(1000), **settings)
    # The same settings are refused before a bundle is looked for.
    with pytest.raises(DiffLossError, match=re.escape(message)):
        DiffLoss.load("no such bundle", **settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "no such bundle does not exist"),
        ({"backend": "tensorflow"}, "backend is 'tensorflow'; expected one of auto, onnxruntime, torch"),
        ({"backward": "magic"}, "backward is 'magic'; expected one of"),
        ({"device": "gpu"}, "device is 'gpu'; expected 'cpu'"),
        ({"device": "meta"}, "device is meta; expected 'cpu'"),
    ],
)
def test_load(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DiffLossError, match=re.escape(message)):
        DiffLoss.load("no such bundle", **arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here there is a GPU")
def test_missing_gpu_is_named() -> None:
    with pytest.raises(DiffLossError, match="PyTorch sees no CUDA GPU"):
        DiffLoss.load("no such bundle", device="cuda")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_class_embeds": 10}, "class-conditional"),
        ({"time_embedding_type": "fourier"}, "fourier"),
        ({"out_channels": 4}, "takes 3 channels and returns 4 (out_channels); expected 3"),
    ],
)
def test_architectures(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DiffLossError, match=re.escape(message)):
        DiffLoss.from_unet(make_unet(**changes), DDPMScheduler(1000))


def test_things_that_are_no_unconditional_unet() -> None:
    text = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8,), layers_per_block=1, cross_attention_dim=8, norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), attention_head_dim=4,
    )  # fmt: skip
    with pytest.raises(DiffLossError, match="UNet2DConditionModel is conditional"):
        DiffLoss.from_unet(text, DDPMScheduler(1000))
    with pytest.raises(DiffLossError, match="Linear is not a diffusers"):
        DiffLoss.from_unet(torch.nn.Linear(1, 1), DDPMScheduler(1000))


def test_weights_that_are_not_finite_are_named() -> None:
    unet = make_unet()
    unet.conv_out.bias.data[0] = torch.nan
    with pytest.raises(DiffLossError, match=r"weight conv_out\.bias holds NaN"):
        DiffLoss.from_unet(unet, DDPMScheduler(1000))
