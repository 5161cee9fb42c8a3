"""DiffLoss's formula, written once: Tan et al., "DiffLoss", ACCV 2024 (arXiv 2406.19030)."""

from __future__ import annotations

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
    leaves = [wide(part).detach().requires_grad_() for part in (bottleneck, noise) if part is not None]
    with torch.enable_grad():
        semantic = mean_square(leaves[0])
        naturalness = mean_square(leaves[1]) if noise is not None else torch.zeros_like(semantic)
        total = combine(
            naturalness, semantic, 0.0 if naturalness_weight is None else naturalness_weight, semantic_weight
        )
        cotangents = torch.autograd.grad(total, leaves, torch.ones_like(total))
    return Terms(*(term.detach() for term in (total, naturalness, semantic))), list(cotangents)


def power_of_two(size: Tensor) -> Tensor:
    """Return the power of two at or below each of `size` >= 0, and a tiny one for zero."""
    return torch.exp2(torch.log2(size.clamp(min=2.0**-100)).floor())


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Return `values` [B] so that they act on each sample of `like` [B, ...]."""
    return values.view(-1, *[1] * (like.ndim - 1))


def wide(tensor: Tensor) -> Tensor:
    """Return `tensor` in float32, or in float64 if that is what it is in."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
