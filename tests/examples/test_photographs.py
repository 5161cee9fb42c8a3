"""The photographs: what is held out stays out, and crops are reproducible pieces of the photographs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from photographs import HELD_OUT, TRAINING, RandomCrops, load


def test_held_out_and_training_are_disjoint() -> None:
    assert len(HELD_OUT) >= 3
    assert not set(HELD_OUT) & set(TRAINING)
    training = [load(name) for name in TRAINING]
    for name in HELD_OUT:
        photograph = load(name)
        same = [other for other in training if other.shape == photograph.shape]
        # Not the same picture under another name either.
        assert all((other - photograph).abs().mean() > 0.05 for other in same), name


@pytest.mark.parametrize("name", [*TRAINING, *HELD_OUT])
def test_photographs_are_rgb_in_range(name: str) -> None:
    photograph = load(name)
    assert photograph.dtype == torch.float32
    assert photograph.ndim == 3
    assert photograph.shape[0] == 3
    assert min(photograph.shape[1:]) >= 256
    assert photograph.min() >= 0
    assert photograph.max() <= 1
    assert photograph.max() > 0.5  # divided by 255 once, not twice
    assert torch.equal(photograph, load(name))


def test_greyscale_photographs_are_repeated() -> None:
    camera = load("camera")
    assert torch.equal(camera[0], camera[1])
    assert torch.equal(camera[0], camera[2])


def test_an_unknown_photograph_is_named_with_the_known_ones() -> None:
    with pytest.raises(KeyError, match=r"'nowhere'.*'astronaut'.*'chelsea'"):
        load("nowhere")


def test_crops_are_reproducible() -> None:
    names = ["coins", "flower"]
    first, again, other = (RandomCrops(names, 32, seed) for seed in (5, 5, 6))
    state = torch.get_rng_state()
    batches = [first.batch(4) for _ in range(3)]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(batch, again.batch(4)) for batch in batches)
    assert not torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], other.batch(4))


def test_crops_have_the_size_asked_for_and_stay_in_range() -> None:
    for size, count in ((1, 1), (64, 5), (250, 2)):
        batch = RandomCrops(["coins", "moon"], size, 0).batch(count)
        assert batch.shape == (count, 3, size, size)
        assert batch.dtype == torch.float32
        assert batch.min() >= 0
        assert batch.max() <= 1


def symmetries(square: Tensor) -> list[Tensor]:
    """Return the eight pictures that flips and transposition make of [3, N, N]."""
    flipped = [square, square.flip(1), square.flip(2), square.flip(1, 2)]
    return [*flipped, *(one.transpose(1, 2) for one in flipped)]


def test_a_crop_is_a_piece_of_a_photograph_flipped_or_transposed() -> None:
    # As large as the photograph, so that the only choices left are the symmetries.
    allowed = symmetries(load("astronaut"))
    crops = RandomCrops(["astronaut"], 512, 0)
    found = [next(i for i, one in enumerate(allowed) if torch.equal(one, crop)) for crop in crops.batch(24)]
    assert len(set(found)) >= 5


def test_photographs_and_their_halves_are_both_drawn() -> None:
    crops = RandomCrops(["moon"], 200, 0)
    assert sorted(tuple(photograph.shape) for photograph in crops.photographs) == [(3, 256, 256), (3, 512, 512)]
    # Too small a half is left out instead of failing when it is drawn.
    assert [tuple(p.shape) for p in RandomCrops(["moon"], 300, 0).photographs] == [(3, 512, 512)]
