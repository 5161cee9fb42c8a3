"""The photographs that scikit-image, scikit-learn and matplotlib carry inside their wheels, as float tensors.

`TRAINING` may be learned from; `HELD_OUT` is for evaluation alone and is never seen by the prior
or by the restoration networks. Nor is `VALIDATION`, by which settings may be chosen.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import skimage.data
import torch
from matplotlib.cbook import get_sample_data
from matplotlib.image import imread
from sklearn.datasets import load_sample_image

TRAINING: dict[str, Callable[[], np.ndarray]] = {
    "astronaut": skimage.data.astronaut,
    "brick": skimage.data.brick,
    "camera": skimage.data.camera,
    "china": lambda: load_sample_image("china.jpg"),
    "coins": skimage.data.coins,
    "flower": lambda: load_sample_image("flower.jpg"),
    "grass": skimage.data.grass,
    "gravel": skimage.data.gravel,
    "hubble": skimage.data.hubble_deep_field,
    "immunohistochemistry": skimage.data.immunohistochemistry,
    "moon": skimage.data.moon,
    "motorcycle_left": lambda: skimage.data.stereo_motorcycle()[0],
    "motorcycle_right": lambda: skimage.data.stereo_motorcycle()[1],
}
HELD_OUT: dict[str, Callable[[], np.ndarray]] = {
    "chelsea": skimage.data.chelsea,
    "coffee": skimage.data.coffee,
    "rocket": skimage.data.rocket,
}
VALIDATION: dict[str, Callable[[], np.ndarray]] = {
    "clock": skimage.data.clock,
    "hopper": lambda: imread(get_sample_data("grace_hopper.jpg", asfileobj=False)),
}


def load(name: str) -> torch.Tensor:
    """Return photograph `name` as float32 [3, H, W] in [0, 1]; greyscale ones are repeated to RGB."""
    photographs = {**TRAINING, **HELD_OUT, **VALIDATION}
    read = photographs.get(name)
    if read is None:
        raise KeyError(f"no photograph {name!r}; there are {sorted(photographs)}")
    pixels = read()
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3, axis=2)
    return torch.from_numpy(np.ascontiguousarray(pixels[..., :3].transpose(2, 0, 1))).float() / 255


class RandomCrops:
    """Endless batches of square crops: random photograph, scale, place, flips and transposition.

    A photograph is drawn in proportion to the square root of its area; halved and unscaled versions
    of it are drawn alike, so that one crop may show a texture and another a whole object.
    """

    def __init__(self, names: list[str], size: int, seed: int) -> None:
        full = [load(name) for name in names]
        halved = [
            torch.nn.functional.interpolate(p[None], scale_factor=0.5, mode="bilinear", antialias=True)[0].clamp(0, 1)
            for p in full
        ]
        self.photographs = [p for p in (*full, *halved) if min(p.shape[1:]) >= size]
        areas = torch.tensor([float(p.shape[1] * p.shape[2]) for p in self.photographs])
        self.odds = areas.sqrt()
        self.size = size
        self.generator = torch.Generator().manual_seed(seed)

    def _below(self, bound: int) -> int:
        return int(torch.randint(bound, (), generator=self.generator))

    def batch(self, count: int) -> torch.Tensor:
        """Return float32 [count, 3, size, size] in [0, 1]."""
        chosen = torch.multinomial(self.odds, count, replacement=True, generator=self.generator)
        crops = []
        for index in chosen.tolist():
            photograph = self.photographs[index]
            top = self._below(photograph.shape[1] - self.size + 1)
            left = self._below(photograph.shape[2] - self.size + 1)
            crop = photograph[:, top : top + self.size, left : left + self.size]
            if self._below(2):
                crop = crop.flip(2)
            if self._below(2):
                crop = crop.flip(1)
            if self._below(2):
                crop = crop.transpose(1, 2)
            crops.append(crop)
        return torch.stack(crops)
