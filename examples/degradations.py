"""Synthetic degradations of clean images, each after a physical model of how such a picture arises.

Every function takes clean images, float32 [B, 3, H, W] in [0, 1] as displayed (sRGB), and a
`torch.Generator`, and returns degraded images of the same shape and range. All randomness comes
from the generator, on the device of which everything is computed; each image of a batch gets
parameters of its own. Nothing is changed in place. ValueError is raised for any other shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

Degradation = Callable[[Tensor, Generator], Tensor]


class RainLayer(NamedTuple):
    """Drops at one distance from the camera. Pairs are ranges drawn from uniformly."""

    density: tuple[float, float]  # drops per pixel
    length: tuple[float, float]  # of a streak, in pixels: the way a drop falls during the exposure
    width: float  # standard deviation of a streak's cross-section, in pixels
    opacity: tuple[float, float]  # share of the exposure for which a drop covers its pixel


# From far to near: near drops are rarer, and seem longer, wider and more opaque.
RAIN_LAYERS = (
    RainLayer(density=(0.006, 0.012), length=(6.0, 10.0), width=0.45, opacity=(0.15, 0.30)),
    RainLayer(density=(0.002, 0.005), length=(12.0, 18.0), width=0.65, opacity=(0.30, 0.45)),
    RainLayer(density=(0.0005, 0.0015), length=(20.0, 30.0), width=0.95, opacity=(0.45, 0.65)),
)


def srgb_to_linear(encoded: Tensor) -> Tensor:
    """Map sRGB values in [0, 1] to linear light in [0, 1] (IEC 61966-2-1)."""
    return torch.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)


def linear_to_srgb(linear: Tensor) -> Tensor:
    """Map linear light in [0, 1] to sRGB values in [0, 1] (IEC 61966-2-1)."""
    # The clamp keeps the power's argument positive where the linear piece is taken anyway.
    power = 1.055 * linear.clamp(min=0.0031308) ** (1 / 2.4) - 0.055
    return torch.where(linear <= 0.0031308, linear * 12.92, power)


def low_light(clean: Tensor, generator: Generator) -> Tensor:
    """Photograph the scene with too little light: fewer photons, hence shot and read noise.

    Of the linear light, 2^-stops reaches the sensor, stops in [2.5, 3.5]. A pixel that white would
    fill holds `full_well` electrons, [1000, 4000] (a high gain); what it collects is Poisson
    distributed, and reading it adds Gaussian noise of [2, 5] electrons. The count is divided by
    `full_well`, clipped to [0, 1] and encoded as sRGB: dark, noisy, and not brightened.
    """
    _check(clean)
    stops = _uniform(clean, generator, 2.5, 3.5)
    full_well = _uniform(clean, generator, 1000.0, 4000.0)
    read_noise = _uniform(clean, generator, 2.0, 5.0)
    expected = srgb_to_linear(clean) * torch.exp2(-stops) * full_well
    read = torch.randn(clean.shape, generator=generator, device=generator.device)
    electrons = torch.poisson(expected, generator=generator) + read_noise * read
    return linear_to_srgb((electrons / full_well).clamp(0, 1))


def rain(clean: Tensor, generator: Generator) -> Tensor:
    """Let drops fall between scene and camera, in three layers from far to near.

    A drop crosses pixels while the shutter is open, so it is a streak: for the share `opacity` of
    the exposure the pixel sees the drop, which is as bright as the sky (1), and for the rest the
    scene: I = (1 - alpha) J + alpha, the screen blend. All streaks of an image lean alike, up to 25
    degrees from the vertical. Densities, lengths, widths and opacities: `RAIN_LAYERS`. A drop's own
    brightness varies by a factor in [0.5, 1].
    """
    _check(clean)
    angle = _uniform(clean, generator, -math.radians(25), math.radians(25))
    result = clean
    for layer in RAIN_LAYERS:
        density = _uniform(clean, generator, *layer.density)
        opacity = _uniform(clean, generator, *layer.opacity)
        streak = _streak(angle, _uniform(clean, generator, *layer.length), layer)
        # Drops also start outside the picture and fall into it.
        margin = streak.shape[-1] // 2
        size = (clean.shape[0], 1, clean.shape[2] + 2 * margin, clean.shape[3] + 2 * margin)
        present = torch.rand(size, generator=generator, device=generator.device) < density
        brightness = 0.5 + 0.5 * torch.rand(size, generator=generator, device=generator.device)
        drops = (present * brightness).transpose(0, 1)
        streaks = F.conv2d(drops, streak, groups=clean.shape[0]).transpose(0, 1)
        alpha = opacity * streaks.clamp(max=1)
        result = (1 - alpha) * result + alpha
    return result


def haze(clean: Tensor, generator: Generator) -> Tensor:
    """See the scene through haze: atmospheric scattering after Koschmieder.

    I = J t + A (1 - t) with transmission t = exp(-beta d). Depth d in [0.2, 1] (1: the farthest
    point) rises smoothly towards the top of the picture, with random hills; the scattering
    coefficient beta is in [0.8, 2.0] per unit of depth, so that t lies in [0.13, 0.86]. The airlight
    A is a nearly neutral grey in [0.75, 0.95], each channel up to 0.03 off it.
    """
    _check(clean)
    beta = _uniform(clean, generator, 0.8, 2.0)
    grey = _uniform(clean, generator, 0.75, 0.95)
    tint = torch.rand((clean.shape[0], 3, 1, 1), generator=generator, device=generator.device) * 2 - 1
    airlight = grey + 0.03 * tint
    transmission = torch.exp(-beta * _depth(clean, generator))
    return clean * transmission + airlight * (1 - transmission)


DEGRADATIONS: dict[str, Degradation] = {"lowlight": low_light, "rain": rain, "haze": haze}


def _check(clean: Tensor) -> None:
    if clean.ndim != 4 or clean.shape[1] != 3:
        raise ValueError(f"images have shape {list(clean.shape)}, expected [B, 3, H, W]")


def _uniform(clean: Tensor, generator: Generator, low: float, high: float) -> Tensor:
    """Draw one number in [low, high] for each image: [B, 1, 1, 1]."""
    drawn = torch.rand((clean.shape[0], 1, 1, 1), generator=generator, device=generator.device)
    return low + (high - low) * drawn


def _streak(angle: Tensor, length: Tensor, layer: RainLayer) -> Tensor:
    """Return each image's streak, [B, 1, K, K] in [0, 1]: a line with a Gaussian cross-section.

    `angle` (from the vertical, in radians) and `length` (in pixels) are [B, 1, 1, 1].
    """
    reach = math.ceil(layer.length[1] / 2 + 2 * layer.width)
    place = torch.arange(-reach, reach + 1, device=angle.device, dtype=angle.dtype)
    down, right = torch.meshgrid(place, place, indexing="ij")
    along = down * angle.cos() + right * angle.sin()
    across = right * angle.cos() - down * angle.sin()
    ends = ((length + 1) / 2 - along.abs()).clamp(0, 1)
    return torch.exp(-0.5 * (across / layer.width) ** 2) * ends


def _depth(clean: Tensor, generator: Generator) -> Tensor:
    """Return depth maps [B, 1, H, W] in [0.2, 1]: a vertical trend and smooth hills, half and half."""
    batch, _, height, width = clean.shape
    coarse = torch.rand((batch, 1, 4, 4), generator=generator, device=generator.device)
    hills = F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=True).clamp(0, 1)
    trend = torch.linspace(1, 0, height, device=generator.device).view(1, 1, height, 1)
    return 0.2 + 0.8 * (0.5 * trend + 0.5 * hills)
