"""NaN and infinity: in which images of a batch, and in which results."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffloss_trt.objective import Terms


def nonfinite_images(images: Tensor) -> str:
    """Return which of `images` [B, C, H, W] hold NaN or infinite values, in words."""
    return _in_words(images.detach().flatten(1).isfinite().all(1).tolist())


def nonfinite_results(terms: Terms, gradient: Tensor | None) -> str:
    """Return which terms [B], or whether the gradient [B, C, H, W], are not finite, and where; "" if all are.

    On a GPU this waits for it, once.
    """
    results = dict(terms._asdict())
    if gradient is not None:
        results["gradient"] = torch.linalg.vector_norm(gradient, math.inf, dim=(1, 2, 3))
    finite = torch.stack([result.detach() for result in results.values()]).isfinite().tolist()
    names = [name for name, of_images in zip(results, finite, strict=True) if not all(of_images)]
    if not names:
        return ""
    return f"{', '.join(names)} {_in_words([all(column) for column in zip(*finite, strict=True)])}"


def _in_words(finite: list[bool]) -> str:
    return f"in images {[row for row, is_finite in enumerate(finite) if not is_finite]} of a batch of {len(finite)}"
