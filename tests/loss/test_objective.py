"""The formula against the original code's numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from diffloss_trt.objective import combine, mean_square, normalised, terms_and_cotangents


def test_terms_are_the_original_ones(golden: Mapping[str, Tensor]) -> None:
    # The network of the golden case predicts a variance too, in the channels behind the noise.
    naturalness = mean_square(golden["eps_restored"][:, :3] - golden["eps_target"][:, :3])
    semantic = mean_square(golden["h_restored"] - golden["h_target"])
    torch.testing.assert_close(naturalness, golden["naturalness"], rtol=1e-13, atol=0)
    torch.testing.assert_close(semantic, golden["semantic"], rtol=1e-13, atol=0)


def test_mean_square_by_hand() -> None:
    difference = torch.tensor([[[1.0, -2.0]], [[0.0, 3.0]]], dtype=torch.float64)
    assert mean_square(difference).tolist() == [2.5, 4.5]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_mean_square_is_finite_beyond_the_range_of_half(dtype: torch.dtype) -> None:
    result = mean_square(torch.full((2, 3, 64, 64), 1000.0, dtype=dtype))
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert result.tolist() == [1e6, 1e6]


@pytest.mark.parametrize("with_noise", [True, False])
@pytest.mark.parametrize("weigh", [lambda weight: weight, lambda weight: torch.tensor([weight, 2 * weight]).double()])
def test_cotangents_are_the_gradient(with_noise: bool, weigh: Callable[[float], float | Tensor]) -> None:
    bottleneck, noise = (torch.randn(2, *shape, dtype=torch.float64) for shape in ((5, 2, 3), (3, 4, 6)))
    leaves = [bottleneck.clone().requires_grad_(), *([noise.clone().requires_grad_()] if with_noise else [])]
    naturalness_weight, semantic_weight = weigh(0.3) if with_noise else None, weigh(0.02)
    semantic = mean_square(leaves[0])
    naturalness = mean_square(leaves[1]) if with_noise else torch.zeros_like(semantic)
    total = combine(naturalness, semantic, weigh(0.3), semantic_weight)
    terms, cotangents = terms_and_cotangents(
        bottleneck,
        noise if with_noise else None,
        naturalness_weight=naturalness_weight,
        semantic_weight=semantic_weight,
    )
    for found, expected in zip(terms, (total, naturalness, semantic), strict=True):
        torch.testing.assert_close(found, expected.detach(), rtol=1e-14, atol=0)
    for found, expected in zip(cotangents, torch.autograd.grad(total.sum(), leaves), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normalised_by_hand(dtype: torch.dtype) -> None:
    first = torch.tensor([[[[1.5, -12.0]]], [[[2.0**-60, 0.0]]], [[[0.0, 0.0]]]], dtype=dtype)
    second = torch.tensor([[[[4.0]]], [[[-5 * 2.0**-60]]], [[[0.0]]]], dtype=dtype)
    size, (of_first, of_second) = normalised([first, second])
    assert size[:2].tolist() == [8.0, 2.0**-58]
    assert of_first.flatten().tolist() == [0.1875, -1.5, 0.25, 0.0, 0.0, 0.0]
    assert of_second.flatten().tolist() == [0.5, -1.25, 0.0]


def test_combine_by_hand() -> None:
    total = combine(torch.tensor([1.0, 4.0]), torch.tensor([8.0, 2.0]), 0.5, 0.25)
    assert total.tolist() == [2.5, 2.5]
