"""The degradations do what their physical models say, and nothing depends on anything but the generator."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Generator, Tensor

from degradations import DEGRADATIONS, RAIN_LAYERS, haze, linear_to_srgb, low_light, rain, srgb_to_linear

each = pytest.mark.parametrize("name", list(DEGRADATIONS))


def seeded(value: int) -> Generator:
    return Generator().manual_seed(value)


def grey(value: float, batch: int = 4, side: int = 64) -> Tensor:
    return torch.full((batch, 3, side, side), value)


def test_the_table_names_every_task() -> None:
    assert {"lowlight": low_light, "rain": rain, "haze": haze} == DEGRADATIONS


@each
@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (2, 3, 37, 50), (3, 3, 64, 64)])
def test_shape_dtype_and_range(name: str, shape: tuple[int, ...]) -> None:
    clean = torch.rand(shape)
    clean.view(-1)[:2] = torch.tensor([0.0, 1.0])
    degraded = DEGRADATIONS[name](clean, seeded(0))
    assert degraded.shape == clean.shape
    assert degraded.dtype == torch.float32
    assert degraded.isfinite().all()
    assert degraded.min() >= 0
    assert degraded.max() <= 1


@each
def test_all_randomness_comes_from_the_generator(name: str) -> None:
    clean = torch.rand(2, 3, 48, 48)
    before, state = clean.clone(), torch.get_rng_state()
    generator = seeded(3)
    first, following = (DEGRADATIONS[name](clean, generator) for _ in range(2))
    torch.rand(5)
    assert torch.equal(DEGRADATIONS[name](clean, seeded(3)), first)
    assert not torch.equal(following, first)
    torch.set_rng_state(state)
    DEGRADATIONS[name](clean, seeded(4))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(clean, before)


@each
def test_each_image_of_a_batch_gets_its_own_parameters(name: str) -> None:
    degraded = DEGRADATIONS[name](grey(0.5, batch=2), seeded(0))
    # Between the images' means, so that it is not noise alone that tells them apart.
    assert (degraded[0].mean() - degraded[1].mean()).abs() > 1e-3


@each
@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 1, 8, 8), (1, 8, 8, 3)])
def test_other_shapes_are_refused_with_what_came(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\]") as caught:
        DEGRADATIONS[name](torch.rand(shape), seeded(0))
    assert str(list(shape)) in str(caught.value)


def test_srgb_transfer_has_the_standard_values_and_inverts() -> None:
    known = torch.tensor([0.0, 0.04045, 0.5, 1.0])
    torch.testing.assert_close(srgb_to_linear(known), torch.tensor([0.0, 0.0031308, 0.2140411, 1.0]), rtol=1e-5, atol=0)
    ramp = torch.linspace(0, 1, 1001)
    torch.testing.assert_close(linear_to_srgb(srgb_to_linear(ramp)), ramp, rtol=0, atol=2e-6)
    assert (linear_to_srgb(ramp).diff() > 0).all()


def test_low_light_dims_by_stops_and_adds_shot_and_read_noise() -> None:
    scene = 0.5  # linear light; noise is far enough from black that clipping does not bend its variance
    clean = linear_to_srgb(grey(scene, batch=24))
    linear = srgb_to_linear(low_light(clean, seeded(0))).double().flatten(1)
    received = linear.mean(1)
    stops = -torch.log2(received / scene)
    assert ((stops > 2.49) & (stops < 3.51)).all()
    assert stops.max() - stops.min() > 0.5
    variance = linear.var(1)
    lowest, highest = ((received / full + (read / full) ** 2) for full, read in ((4000, 2), (1000, 5)))
    assert ((variance > 0.95 * lowest) & (variance < 1.05 * highest)).all()


def test_low_light_leaves_black_nearly_black() -> None:
    assert srgb_to_linear(low_light(grey(0.0), seeded(0))).max() < 6 * 5 / 1000  # six deviations of the read noise


def test_rain_only_brightens_and_is_invisible_before_white() -> None:
    clean = torch.rand(2, 3, 64, 64)
    assert (rain(clean, seeded(0)) >= clean - 1e-6).all()
    torch.testing.assert_close(rain(grey(1.0), seeded(0)), grey(1.0), rtol=0, atol=1e-6)


def test_rain_covers_part_of_the_picture_up_to_the_layers_opacity() -> None:
    streaks = rain(grey(0.0, side=128), seeded(0))
    assert torch.equal(streaks[:, :1].expand_as(streaks), streaks)
    densest = 1 - math.prod(1 - layer.opacity[1] for layer in RAIN_LAYERS)
    assert streaks.max() <= densest + 1e-6
    visible = (streaks > 0.05).float().mean((1, 2, 3))
    assert ((visible > 0.03) & (visible < 0.6)).all()


def test_rain_is_screened_over_the_scene() -> None:
    scene = torch.rand(2, 3, 64, 64)
    alpha = rain(torch.zeros_like(scene), seeded(1))
    torch.testing.assert_close(rain(scene, seeded(1)), 1 - (1 - scene) * (1 - alpha), rtol=0, atol=1e-6)


def test_rain_falls_more_or_less_vertically() -> None:
    streaks = rain(grey(0.0, batch=8, side=128), seeded(0))
    along, across = streaks.diff(dim=2).square().mean((1, 2, 3)), streaks.diff(dim=3).square().mean((1, 2, 3))
    assert (across > 2 * along).all()


def test_haze_is_koschmieders_law() -> None:
    black, white = haze(grey(0.0, batch=8), seeded(0)), haze(grey(1.0, batch=8), seeded(0))
    transmission = white - black
    torch.testing.assert_close(transmission, transmission[:, :1].expand_as(transmission), rtol=0, atol=1e-6)
    assert transmission.min() >= math.exp(-2.0) - 1e-6
    assert transmission.max() <= math.exp(-0.8 * 0.2) + 1e-6

    airlight = black / (1 - transmission)
    uniform = airlight.mean((2, 3), keepdim=True)
    torch.testing.assert_close(airlight, uniform.expand_as(airlight), rtol=0, atol=1e-4)
    assert ((uniform >= 0.72) & (uniform <= 0.98)).all()
    assert (uniform.amax(1) - uniform.amin(1)).max() <= 0.06 + 1e-5

    scene = torch.rand(8, 3, 64, 64)
    expected = scene * transmission + uniform * (1 - transmission)
    torch.testing.assert_close(haze(scene, seeded(0)), expected, rtol=0, atol=1e-5)


def test_haze_is_smooth_and_thicker_towards_the_top() -> None:
    transmission = haze(grey(1.0, batch=16), seeded(0)) - haze(grey(0.0, batch=16), seeded(0))
    assert transmission.diff(dim=2).abs().max() < 0.1
    assert transmission.diff(dim=3).abs().max() < 0.1
    top, bottom = transmission[:, :, :16].mean((1, 2, 3)), transmission[:, :, -16:].mean((1, 2, 3))
    assert (top < bottom).float().mean() > 0.8
    assert top.mean() < bottom.mean() - 0.1
