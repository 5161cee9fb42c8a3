"""DiffLoss's formula, written once: Tan et al., "DiffLoss", ACCV 2024 (arXiv 2406.19030)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Terms(NamedTuple):
    """The loss of each sample, all [B]; gradients flow through `total` alone."""

    total: Tensor
    naturalness: Tensor
    semantic: Tensor


def mean_square(difference: Tensor) -> Tensor:
    """Return the mean of squares of each sample, [B, ..., W] -> [B], in float32 at least.

    Half precision is widened first: the square of 256 is no longer a finite fp16 number. And the mean is one of rows'
    means: not every runtime adds up a large image to float32's precision by itself.
    """
    return wide(difference).square().mean(-1).flatten(1).mean(1)


def combine(
    naturalness: Tensor, semantic: Tensor, naturalness_weight: float | Tensor, semantic_weight: float | Tensor
) -> Tensor:
    """Return w_nat * naturalness + w_sem * semantic, [B]."""
    return naturalness_weight * naturalness + semantic_weight * semantic


def terms_and_cotangents(
    bottleneck: Tensor,
    noise: Tensor | None = None,
    *,
    naturalness_weight: float | Tensor | None,
    semantic_weight: float | Tensor,
) -> tuple[Terms, list[Tensor]]:
    """Return the terms of given differences, restored less target, and each sample's gradient with respect to them.

    bottleneck [B, c, h, w]; noise [B, C, H, W], or None, and then there is no naturalness and its weight is None.
    The gradients are in float32 at least, and in the order of the arguments.
    """
    semantic, cotangents = mean_square(bottleneck), [slope(bottleneck, semantic_weight)]
    if noise is None or naturalness_weight is None:
        naturalness = torch.zeros_like(semantic)
        return Terms(semantic_weight * semantic, naturalness, semantic), cotangents
    naturalness = mean_square(noise)
    total = combine(naturalness, semantic, naturalness_weight, semantic_weight)
    return Terms(total, naturalness, semantic), [*cotangents, slope(noise, naturalness_weight)]


def slope(difference: Tensor, weight: float | Tensor) -> Tensor:
    """Return the gradient of `weight` times `mean_square`, the weight a number or [B], with respect to `difference`."""
    # By hand: autograd has threads, which a process that was forked from one that has used them cannot have.
    factor = 2 / difference[0].numel() * weight
    return wide(difference) * (per_sample(factor, difference) if isinstance(factor, Tensor) else factor)


def normalised(cotangents: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return a power of two [B], and the cotangents divided by it: of each sample the largest is of order one.

    That is what half precision wants. Behind the UNet's backward, which is linear, the power is multiplied back.
    """
    largest = torch.stack([cotangent.flatten(1).abs().amax(1) for cotangent in cotangents], 1).amax(1)
    size = power_of_two(largest)
    return size, [cotangent / per_sample(size, cotangent) for cotangent in cotangents]


def power_of_two(size: Tensor) -> Tensor:
    """Return the power of two at or below each of `size` >= 0, and a tiny one for zero."""
    return torch.exp2(torch.log2(size.clamp(min=2.0**-100)).floor())


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Return `values` [B] so that they act on each sample of `like` [B, ...]."""
    return values.view(-1, *[1] * (like.ndim - 1))


def wide(tensor: Tensor) -> Tensor:
    """Return `tensor` in float32, or in float64 if that is what it is in."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
