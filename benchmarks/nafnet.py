"""A restoration network of the size that papers use: the layout of NAFNet (Chen et al., ECCV 2022) at width 32."""

from __future__ import annotations

import sys
from pathlib import Path

from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from restoration_network import GatedBlock


class WideRestorationNetwork(nn.Module):
    """Restore images [B, 3, H, W] in [0, 1], H and W multiples of 16, as a residual: 29 M parameters in 36 blocks.

    Four levels down and up, as in the authors' configuration for denoising; each halves the sides and doubles the
    channels. A new network returns its input.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, width, 3, padding=1)
        self.encoders, self.downs, self.ups, self.decoders = (nn.ModuleList() for _ in range(4))
        for blocks in (2, 2, 4, 8):
            self.encoders.append(_blocks(width, blocks))
            self.downs.append(nn.Conv2d(width, 2 * width, 2, stride=2))
            width *= 2
        self.middle = _blocks(width, 12)
        for blocks in (2, 2, 2, 2):
            self.ups.append(nn.Sequential(nn.Conv2d(width, 2 * width, 1, bias=False), nn.PixelShuffle(2)))
            width //= 2
            self.decoders.append(_blocks(width, blocks))
        self.leave = nn.Conv2d(width, 3, 3, padding=1)
        for parameter in self.leave.parameters():
            nn.init.zeros_(parameter)

    def forward(self, degraded: Tensor) -> Tensor:
        features = self.enter(degraded)
        skips = []
        for encoder, down in zip(self.encoders, self.downs, strict=True):
            skips.append(encoder(features))
            features = down(skips[-1])
        features = self.middle(features)
        for up, decoder in zip(self.ups, self.decoders, strict=True):
            features = decoder(up(features) + skips.pop())
        restored: Tensor = degraded + self.leave(features)
        return restored


def _blocks(channels: int, count: int) -> nn.Sequential:
    return nn.Sequential(*(GatedBlock(channels) for _ in range(count)))
