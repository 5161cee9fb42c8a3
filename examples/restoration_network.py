"""A compact image-to-image network: a three-level U-Net of gated blocks that predicts a residual."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ChannelNorm(nn.Module):
    """Normalise the channels of each pixel by themselves: [B, C, H, W] -> the same shape.

    The result at a pixel does not depend on the picture's size, unlike that of group or instance
    norm: the network is trained on small crops and used on whole photographs.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels, 1, 1))
        self.shift = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, features: Tensor) -> Tensor:
        centred = features - features.mean(1, keepdim=True)
        deviation = (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
        return centred / deviation * self.scale + self.shift


class GatedBlock(nn.Module):
    """Mix space, then channels, each as a residual whose nonlinearity is a product of two halves.

    The spatial half also weights its channels by their means over the picture: the evidence of
    exposure or haze is spread over all of it.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.spatial_norm = ChannelNorm(channels)
        self.spread = nn.Conv2d(channels, 2 * channels, 1)
        self.neighbours = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1, groups=2 * channels)
        self.attention = nn.Conv2d(channels, channels, 1)
        self.gather = nn.Conv2d(channels, channels, 1)
        self.channel_norm = ChannelNorm(channels)
        self.widen = nn.Conv2d(channels, 2 * channels, 1)
        self.narrow = nn.Conv2d(channels, channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        left, right = self.neighbours(self.spread(self.spatial_norm(features))).chunk(2, 1)
        gated = left * right
        features = features + self.gather(gated * self.attention(gated.mean((2, 3), keepdim=True)))
        left, right = self.widen(self.channel_norm(features)).chunk(2, 1)
        mixed: Tensor = self.narrow(left * right)
        return features + mixed


class RestorationNetwork(nn.Module):
    """Restore images: float32 [B, 3, H, W] in [0, 1] -> the same shape, not clamped.

    Any H and W from 1 up: they are padded to multiples of 4 inside. A new network returns its input.
    Most of the work is done at a quarter of the resolution and none of the blocks sit at the full one:
    there they would double the time and, in training runs of minutes, add nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        full, half, quarter = 24, 48, 96
        self.enter = nn.Conv2d(3, full, 3, padding=1)
        self.to_half = nn.Conv2d(full, half, 2, stride=2)
        self.down = GatedBlock(half)
        self.to_quarter = nn.Conv2d(half, quarter, 2, stride=2)
        self.middle = nn.Sequential(*(GatedBlock(quarter) for _ in range(4)))
        self.from_quarter = nn.Sequential(nn.Conv2d(quarter, 4 * half, 1), nn.PixelShuffle(2))
        self.up = GatedBlock(half)
        self.from_half = nn.Sequential(nn.Conv2d(half, 4 * full, 1), nn.PixelShuffle(2))
        self.leave = nn.Conv2d(full, 3, 3, padding=1)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)  # type: ignore[arg-type]  # Conv2d types its bias as optional

    def forward(self, degraded: Tensor) -> Tensor:
        height, width = degraded.shape[2:]
        padded = F.pad(degraded, (0, -width % 4, 0, -height % 4), mode="replicate")
        full = self.enter(padded)
        half = self.down(self.to_half(full))
        quarter = self.middle(self.to_quarter(half))
        half = self.up(half + self.from_quarter(quarter))
        full = full + self.from_half(half)
        restored: Tensor = (padded + self.leave(full))[..., :height, :width]
        return restored
