"""What the writer of a bundle and the runner of a bundle agree on: names, files, precisions.

A bundle's graphs and their tensors, batch first, `h`, `w` the bottleneck's size:

| graph | inputs | outputs |
|---|---|---|
| encoder | noisy [B, C, H, W], timesteps [B] | bottleneck [B, c, h, w], time_embedding [B, k], skip_0, skip_1, ... |
| noise_head | the encoder's outputs; noisy and timesteps too, unless the UNet predicts noise | noise [B, C, H, W] |

`noisy`, `timesteps` and `noise` are float32; the tensors between the two graphs have the bundle's precision.
Both graphs are in plain form: subtracting their outputs for two similar images loses digits, which
half precision does not have to spare (DiffLoss's gradient error at 40 dB: fp16 0.3, bf16 2).
"""

from __future__ import annotations

from typing import Final

import torch

ENCODER: Final = "encoder"
NOISE_HEAD: Final = "noise_head"

NOISY: Final = "noisy"
TIMESTEPS: Final = "timesteps"
BOTTLENECK: Final = "bottleneck"
TIME_EMBEDDING: Final = "time_embedding"
NOISE: Final = "noise"

UNET_CONFIG: Final = "unet/config.json"
UNET_WEIGHTS: Final = "unet/diffusion_pytorch_model.safetensors"
SCHEDULE: Final = "schedule.json"

PRECISIONS: Final = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def skip_name(index: int) -> str:
    """Return the tensor name of skip connection `index`, counted from the input convolution."""
    return f"skip_{index}"
