"""What the rules of the difference form share: activations in pairs, and the tape that leads back through them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffloss_trt.objective import per_sample, wide

# Pixels from which on an image is large: moving its data takes the time, not computing with it. A UNet's smaller levels
# have little to move; there float32 costs nothing, and more operations would make for a longer build.
LARGE = 64 * 64

# What an operation's input gradient is, from the gradient of its output: one tensor for each of its pairs.
Pullback = Callable[[Tensor], "Sequence[Tensor]"]


@dataclass(eq=False, frozen=True)
class Pair:
    """An activation on the target's branch, and its difference on the restored branch divided by the tape's scale."""

    value: Tensor
    difference: Tensor


class Tape:
    """What the rules share: the scale of the differences, the precision, and the way back.

    scale: [B], powers of two in float32 or float64, or None for 1; the first axis of every activation is that of the
        samples.
    dtype: that of convolutions and matrix products.
    """

    def __init__(self, scale: Tensor | None, dtype: torch.dtype) -> None:
        self.scale = scale
        self.dtype = dtype
        self._steps: list[tuple[Pair, tuple[Pair, ...], Pullback]] = []

    def record(self, value: Tensor, difference: Tensor, inputs: Sequence[Pair], pullback: Pullback) -> Pair:
        """Return the pair of an operation's result, remembering how to go back from it to `inputs`."""
        pair = Pair(value, difference)
        self._steps.append((pair, tuple(inputs), pullback))
        return pair

    def narrow(self, tensor: Tensor) -> Tensor:
        """Return `tensor` in the precision of convolutions and matrix products."""
        return tensor.to(self.dtype)

    def keep(self, tensor: Tensor) -> Tensor:
        """Return a result as it is to lie in memory: a large image in the precision of convolutions."""
        return self.narrow(tensor) if _is_large(tensor) else tensor

    def add(self, a: Tensor, b: Tensor, alpha: float = 1) -> Tensor:
        """Return `a + alpha * b`, in float32 at least, but for large images.

        Residual connections add up a score of results: in half precision each rounds the sum anew.
        """
        if _is_large(a):  # not widened: the sum of two halves is rounded alike, and TensorRT would store it all widened
            return self.keep(torch.add(a, b, alpha=alpha))
        return torch.add(wide(a), wide(b), alpha=alpha)

    def scaled(self, difference: Tensor) -> Tensor:
        """Return the difference itself, in float32 at least."""
        difference = wide(difference)
        return difference if self.scale is None else difference * per_sample(self.scale, difference)

    def unscaled(self, difference: Tensor) -> Tensor:
        """Return what `scaled` makes the difference of."""
        return difference if self.scale is None else difference * per_sample(1 / self.scale, difference)

    def restored(self, pair: Pair) -> Tensor:
        """Return the activation on the restored branch, in float32 at least."""
        return wide(pair.value) + self.scaled(pair.difference)

    def gradient(self, cotangents: Sequence[tuple[Pair, Tensor]], source: Pair) -> Tensor:
        """Return the gradient at `source`, from those at any number of later pairs."""
        found: dict[Pair, Tensor] = {}

        def put(pair: Pair, cotangent: Tensor) -> None:
            found[pair] = self.add(found[pair], cotangent) if pair in found else self.keep(cotangent)

        for pair, cotangent in cotangents:
            put(pair, cotangent)
        for pair, inputs, pullback in reversed(self._steps):
            if pair in found:
                for input_pair, gradient in zip(inputs, pullback(found.pop(pair)), strict=True):
                    put(input_pair, gradient)
        return found[source]


def _is_large(tensor: Tensor) -> bool:
    return tensor.ndim == 4 and math.prod(tensor.shape[2:]) >= LARGE
