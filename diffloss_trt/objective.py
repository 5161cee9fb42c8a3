"""DiffLoss's formula, written once: Tan & Zhao, "DiffLoss", ACCV 2024 (arXiv 2406.19030)."""

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
    """Return the mean of squares of each sample, [B, ...] -> [B], in float32 at least.

    Half precision is widened first: the square of 256 is no longer a finite fp16 number.
    """
    wide = difference.to(torch.promote_types(difference.dtype, torch.float32))
    return wide.square().flatten(1).mean(1)


def combine(naturalness: Tensor, semantic: Tensor, naturalness_weight: float, semantic_weight: float) -> Tensor:
    """Return w_nat * naturalness + w_sem * semantic, [B]."""
    return naturalness_weight * naturalness + semantic_weight * semantic
