"""Pairs of photographs: the same at every visit, different from each other, and really degraded."""

from __future__ import annotations

import pytest
import torch

from pairs import Pairs


def test_each_index_has_its_own_pair_always() -> None:
    pairs = Pairs(3, 32)
    assert len(pairs) == 3
    first, again = pairs[1], (pairs[2], pairs[0], pairs[1])[2]
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)
        assert (one.shape, one.dtype) == ((3, 32, 32), torch.float32)
        assert 0 <= one.min() <= one.max() <= 1
    assert not torch.equal(pairs[0][1], pairs[1][1])
    degraded, target = first
    assert degraded.mean() < 0.7 * target.mean()


@pytest.mark.parametrize("index", [-1, 3])
def test_no_pair_beyond_the_last(index: int) -> None:
    with pytest.raises(IndexError, match=f"index is {index}; expected 0 to 2"):
        Pairs(3, 32)[index]
