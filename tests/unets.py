"""Small random UNets of every layout that the loss takes."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DModel
from torch import nn

# What differs from `BASE`. Names are the `kind` of `make_unet`.
BASE: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 1,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 8,
    "norm_num_groups": 4,
}
# Half the operations, for tests of what does not depend on the levels.
_ONE_LEVEL: dict[str, Any] = {
    "block_out_channels": (16,),
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
}
# And again half of them, for tests of what does not depend on the middle either.
_NO_MIDDLE = _ONE_LEVEL | {"mid_block_type": None}
KINDS: dict[str, dict[str, Any]] = {
    "one_level": _ONE_LEVEL,
    "two_levels": {},
    "four_levels": {
        "sample_size": 32,
        "layers_per_block": 2,
        "block_out_channels": (16, 16, 32, 32),
        "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    },
    # The layout of guided-diffusion's ADM, which also predicts a variance.
    "adm": {
        "sample_size": 32,
        "out_channels": 6,
        "block_out_channels": (16, 32, 32),
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "attn_norm_num_groups": 8,
    },
    "variance": _NO_MIDDLE | {"out_channels": 6},
    # That of google's published DDPM checkpoints.
    "asymmetric_padding": {"downsample_padding": 0, "freq_shift": 1, "flip_sin_to_cos": False},
    "one_channel": _NO_MIDDLE | {"in_channels": 1, "out_channels": 1},
    "no_mid_attention": _ONE_LEVEL | {"add_attention": False},
    "no_mid_block": _NO_MIDDLE,
    "skip_blocks": {
        "block_out_channels": (32, 32),
        "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
    },
    "learned_time": _NO_MIDDLE | {"time_embedding_type": "learned", "num_train_timesteps": 1000},
    "centred": _NO_MIDDLE | {"center_input_sample": True},
    # For images that lie in memory in half precision; each channel is a group, as in the first norms of large UNets.
    "large": _NO_MIDDLE | {"sample_size": 64, "norm_num_groups": 16},
}


def make_unet(kind: str = "two_levels", seed: int = 0, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """Return a frozen `diffusers.UNet2DModel` in eval mode; equal arguments give equal weights.

    No parameter is left at zero or one, where a term that is missing or doubled would not show. `changes` are further
    settings of the UNet's configuration.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DModel(**BASE | KINDS[kind] | changes)
        for parameter in unet.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
            elif not parameter.any():
                nn.init.normal_(parameter, std=0.05)
    # Not `unet.to`: diffusers' own logs a warning about modules to be kept in float32, of which there are none.
    return nn.Module.to(unet, dtype).eval().requires_grad_(False)
