"""Public architectures with random weights: what a step costs does not depend on what a network has learnt.

Figures from the published `unet/config.json` of google/ddpm-cifar10-32 and google/ddpm-celebahq-256, and from the flags
of guided-diffusion's `256x256_diffusion_uncond`, in the names of `diffusers.UNet2DModel`.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import nn

from diffloss_export.models import LoadedModel
from diffloss_trt.schedule import NoiseSchedule

_DDPM: Final = {
    "layers_per_block": 2,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "attention_head_dim": None,
}
CONFIGURATIONS: Final[dict[str, dict[str, Any]]] = {
    "cifar10": _DDPM
    | {
        "sample_size": 32,
        "block_out_channels": (128, 256, 256, 256),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    },
    "celebahq256": _DDPM
    | {
        "sample_size": 256,
        "block_out_channels": (128, 128, 256, 256, 512, 512),
        "down_block_types": (*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4),
    },
    "adm256": {
        "sample_size": 256,
        "out_channels": 6,
        "layers_per_block": 2,
        "block_out_channels": (256, 256, 512, 512, 1024, 1024),
        "down_block_types": (*["ResnetDownsampleBlock2D"] * 3, *["AttnDownBlock2D"] * 3),
        "up_block_types": (*["AttnUpBlock2D"] * 3, *["ResnetUpsampleBlock2D"] * 3),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "attention_head_dim": 64,
        "attn_norm_num_groups": 32,
    },
    # To see a script run.
    "tiny": _DDPM
    | {
        "sample_size": 16,
        "layers_per_block": 1,
        "block_out_channels": (32, 64),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    },
}


def make_model(name: str) -> LoadedModel:
    """Return a model of the architecture `name` with random weights, its zero-initialised layers drawn too."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(**CONFIGURATIONS[name])
    for parameter in unet.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
        elif not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return LoadedModel(unet.eval().requires_grad_(False), make_schedule(), name, ())


def make_schedule() -> NoiseSchedule:
    """Return the linear schedule of 1000 steps that all of them were published with."""
    return NoiseSchedule(torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0))
