"""The formula against the original code's numbers."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from diffloss_trt.objective import combine, mean_square


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


def test_combine_by_hand() -> None:
    total = combine(torch.tensor([1.0, 4.0]), torch.tensor([8.0, 2.0]), 0.5, 0.25)
    assert total.tolist() == [2.5, 2.5]
