"""A perceptual loss with the layout of LPIPS (Zhang et al., CVPR 2018) on VGG-16, and random weights: for its cost."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Channels of the convolutions of each stage; features are taken behind the last of each, and halved before the next.
_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class PerceptualLoss(nn.Module):
    """Compare images [B, 3, H, W] by the features of five stages, each pixel's scaled to unit length; a scalar.

    Everything is frozen, and the target's features are taken without a gradient.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stages, self.weightings = nn.ModuleList(), nn.ModuleList()
        before = 3
        for index, stage in enumerate(_STAGES):
            layers: list[nn.Module] = [nn.MaxPool2d(2)] if index else []
            for channels in stage:
                layers += [nn.Conv2d(before, channels, 3, padding=1), nn.ReLU()]
                before = channels
            self.stages.append(nn.Sequential(*layers))
            self.weightings.append(nn.Conv2d(before, 1, 1, bias=False))
        self.requires_grad_(False)

    def forward(self, restored: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            of_target = self._features(target)
        pairs = zip(self.weightings, self._features(restored), of_target, strict=True)
        return torch.stack([weighting((a - b).square()).mean() for weighting, a, b in pairs]).sum()

    def _features(self, image: Tensor) -> list[Tensor]:
        features = []
        for stage in self.stages:
            image = stage(image)
            features.append(image / (image.square().sum(1, keepdim=True) + 1e-10).sqrt())
        return features
