"""Training data of the trainers' examples: crops of photographs in too little light, paired with the originals."""

from __future__ import annotations

from torch import Generator, Tensor
from torch.utils.data import Dataset

from degradations import low_light
from photographs import RandomCrops


class Pairs(Dataset[tuple[Tensor, Tensor]]):
    """`count` pairs (degraded, target), each float32 [3, size, size] in [0, 1]; an index always gives the same pair."""

    def __init__(self, count: int, size: int) -> None:
        self.count = count
        self.crops = RandomCrops(["astronaut", "china", "flower", "motorcycle_left"], size, seed=0)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < self.count:
            raise IndexError(f"index is {index}; expected 0 to {self.count - 1}")
        self.crops.generator.manual_seed(index)
        target = self.crops.batch(1)
        return low_light(target, Generator().manual_seed(index))[0], target[0]
