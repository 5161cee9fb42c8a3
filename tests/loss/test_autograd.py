"""The gradient that PyTorch's tape does not make: its scaling, and how it behaves under autograd."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from diffloss_engine.errors import BackendError
from diffloss_trt import NoiseSchedule
from diffloss_trt.autograd import Cotangents, Fused, Recompute, input_gradient
from diffloss_trt.unet import Features, TappedUNet
from unets import make_unet

Batch = tuple[Tensor, Tensor, Tensor, Tensor]
Pair = tuple[Features, Features]
WEIGHTS = (0.3, 0.02)


@pytest.fixture
def tapped() -> TappedUNet:
    return TappedUNet(make_unet(), NoiseSchedule(torch.linspace(0.999, 0.01, 1000, dtype=torch.float64)))


def features(tapped: TappedUNet, batch: Batch, *, with_noise: bool = True) -> tuple[Pair, Tensor]:
    """Return the features of restored and target, and noisy restored."""
    restored, target, noise, timesteps = batch
    noisy, noisy_target = (tapped.schedule.add_noise(image, noise, timesteps) for image in (restored, target))
    found = [tapped.features(image, timesteps, with_noise=with_noise) for image in (noisy, noisy_target)]
    return (found[0], found[1]), noisy


def by_tape(tapped: TappedUNet, batch: Batch, weights: tuple[float, float]) -> Tensor:
    """Return the gradient of the batch's sum with respect to noisy restored, made by PyTorch's own tape."""
    (_, target), noisy = features(tapped, batch)
    leaf = noisy.detach().requires_grad_()
    restored = tapped.features(leaf, batch[3], with_noise=True)
    assert restored.noise is not None
    assert target.noise is not None
    naturalness = (restored.noise - target.noise).pow(2).mean((1, 2, 3))
    semantic = (restored.bottleneck - target.bottleneck).pow(2).mean((1, 2, 3))
    (gradient,) = torch.autograd.grad((weights[0] * naturalness + weights[1] * semantic).sum(), leaf)
    return gradient


def test_cotangents_of_the_original_network(golden: Mapping[str, Tensor]) -> None:
    """By hand: 2 w (a - b) / n; the power of two taken out leaves each sample's largest in [1, 2)."""
    restored = Features(golden["h_restored"], golden["eps_restored"][:, :3])
    target = Features(golden["h_target"], golden["eps_target"][:, :3])
    cotangents = Cotangents(restored, target, *WEIGHTS)
    assert cotangents.noise is not None
    pairs = [
        (cotangents.noise, 2 * WEIGHTS[0] * (golden["eps_restored"] - golden["eps_target"])[:, :3] / (3 * 32 * 32)),
        (cotangents.bottleneck, 2 * WEIGHTS[1] * (golden["h_restored"] - golden["h_target"]) / (64 * 8 * 8)),
    ]
    scale = cotangents.size.view(-1, 1, 1, 1)
    for found, expected in pairs:
        torch.testing.assert_close(found * scale, expected, rtol=1e-13, atol=0)
    largest = torch.stack([pair[0].flatten(1).abs().amax(1) for pair in pairs]).amax(0)
    assert bool(((largest >= 1) & (largest < 2)).all())
    assert bool((torch.frexp(cotangents.size).mantissa == 0.5).all())


@pytest.mark.parametrize("weights", [WEIGHTS, (1e-12, 1e-15), (1.0, 0.0), (1e4, 1e8)])
def test_input_gradient_is_that_of_the_tape(tapped: TappedUNet, batch: Batch, weights: tuple[float, float]) -> None:
    (restored, target), noisy = features(tapped, batch)
    found = input_gradient(tapped, noisy, batch[3], Cotangents(restored, target, *weights))
    expected = by_tape(tapped, batch, weights)
    error = (found - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    assert error.max() < 1e-12


def test_semantic_term_alone_leaves_the_noise_head_out(tapped: TappedUNet, batch: Batch) -> None:
    (restored, target), noisy = features(tapped, batch, with_noise=False)
    cotangents = Cotangents(restored, target, 0.0, 0.5)
    assert cotangents.noise is None
    ran: list[int] = []
    tapped.unet.up_blocks[0].register_forward_hook(lambda *_: ran.append(1))
    found = input_gradient(tapped, noisy, batch[3], cotangents)
    assert not ran
    torch.testing.assert_close(found, by_tape(tapped, batch, (0.0, 0.5)), rtol=1e-10, atol=1e-16)


def test_equal_images_have_a_gradient_of_zero(tapped: TappedUNet, batch: Batch) -> None:
    restored, _, noise, timesteps = batch
    (first, second), noisy = features(tapped, (restored, restored, noise, timesteps))
    gradient = input_gradient(tapped, noisy, timesteps, Cotangents(first, second, *WEIGHTS))
    assert not gradient.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gradient_does_not_depend_on_its_magnitude(dtype: torch.dtype, batch: Batch) -> None:
    """Gradients of order 1e-9 and less, where fp16 has no numbers, are those of order one times a power of two."""
    schedule = NoiseSchedule(torch.linspace(0.999, 0.01, 1000, dtype=torch.float64))
    tapped = TappedUNet(make_unet(dtype=dtype), schedule)
    restored, target, noise, timesteps = batch
    narrow = (restored.float(), target.float(), noise.float(), timesteps)
    (of_restored, of_target), noisy = features(tapped, narrow)
    reference, *tiny = (
        input_gradient(tapped, noisy, timesteps, Cotangents(of_restored, of_target, scale, scale / 8))
        for scale in (1.0, 2.0**-20, 2.0**-50)
    )
    assert reference.dtype == torch.float32
    assert reference.flatten(1).abs().amax(1).min() > 0
    for gradient, scale in zip(tiny, (2.0**-20, 2.0**-50), strict=True):
        assert torch.equal(gradient, reference * scale)
    # The forward pass has half's rounding, the backward pass too, but no more than that.
    wide = TappedUNet(copy.deepcopy(tapped.unet).double(), schedule)
    expected = by_tape(wide, batch, (1.0, 1 / 8))
    error = (reference - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    assert error[[0, 2]].max() < (0.1 if dtype == torch.float16 else 0.6)


def test_samples_are_scaled_apart(tapped: TappedUNet, batch: Batch) -> None:
    """One sample is nearly restored, another far off: each has its own power of two."""
    restored, target, noise, timesteps = batch
    closeness = torch.tensor([1.0, 1e-4, 1e-8], dtype=torch.float64).view(3, 1, 1, 1)
    (first, second), _ = features(tapped, (target + closeness * (restored - target), target, noise, timesteps))
    exponents = Cotangents(first, second, *WEIGHTS).size.log2().tolist()
    assert exponents[0] > exponents[1] + 8 > exponents[2] + 16


@pytest.fixture
def recomputed(tapped: TappedUNet, batch: Batch) -> Callable[[], tuple[Tensor, Tensor]]:
    """() -> the leaf noisy restored, and `total` [3] with its recomputed gradient."""

    def recomputed() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            (restored, target), noisy = features(tapped, batch)
        cotangents = Cotangents(restored, target, *WEIGHTS)
        leaf = noisy.detach().requires_grad_()
        total: Tensor = Recompute.apply(  # type: ignore[no-untyped-call]
            leaf, torch.ones(3, dtype=torch.float64), batch[3], cotangents, tapped
        )
        return leaf, total

    return recomputed


def test_upstream_gradients_are_exact(recomputed: Callable[[], tuple[Tensor, Tensor]]) -> None:
    leaf, total = recomputed()
    (plain,) = torch.autograd.grad(total, leaf, torch.ones_like(total), retain_graph=True)
    factors = torch.tensor([65536.0, 0.0, -0.5], dtype=torch.float64)
    (scaled,) = torch.autograd.grad(total, leaf, factors)
    assert torch.equal(scaled, plain * factors.view(3, 1, 1, 1))


def test_retained_graphs_and_accumulation(
    recomputed: Callable[[], tuple[Tensor, Tensor]], tapped: TappedUNet, batch: Batch
) -> None:
    leaf, total = recomputed()
    total.sum().backward(retain_graph=True)
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, by_tape(tapped, batch, WEIGHTS), rtol=1e-10, atol=1e-14)
    once = leaf.grad.clone()
    total.sum().backward()
    assert torch.equal(leaf.grad, 2 * once)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        total.sum().backward()


def test_double_backward_is_refused(recomputed: Callable[[], tuple[Tensor, Tensor]]) -> None:
    """Also where something else in the sum has a gradient: a penalty must not go by as a constant."""
    leaf, total = recomputed()
    (gradient,) = torch.autograd.grad(total.sum(), leaf, create_graph=True)
    for penalty in (gradient.square().sum(), gradient.square().sum() + leaf.square().sum()):
        with pytest.raises(BackendError, match="cannot be differentiated again"):
            penalty.backward()


def test_input_changed_in_place_is_noticed(recomputed: Callable[[], tuple[Tensor, Tensor]]) -> None:
    leaf, total = recomputed()
    with torch.no_grad():
        leaf.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.sum().backward()


@pytest.fixture
def fused() -> tuple[Tensor, Tensor, Tensor]:
    """Return the leaf, its gradient for an upstream of one, and `total` [3] that carries it."""
    leaf = torch.randn(3, 3, 4, 4, requires_grad=True)
    gradient = 1e-9 * torch.randn(3, 3, 4, 4)
    total: Tensor = Fused.apply(leaf, torch.ones(3), gradient)  # type: ignore[no-untyped-call]
    return leaf, gradient, total


@pytest.mark.parametrize(
    "reduce",
    [
        lambda total: total.sum(),
        lambda total: total.mean() * 3,
        lambda total: (total * 65536).sum() / 65536,
        lambda total: total.expand(2, 3).mean(0).sum(),
        lambda total: total[0] + total[1] + total.flip(0)[0],
        lambda total: (total / 4).square().sum() * 8,
    ],
)
def test_any_upstream_gradient_is_exact(
    fused: tuple[Tensor, Tensor, Tensor], reduce: Callable[[Tensor], Tensor]
) -> None:
    leaf, gradient, total = fused
    (found,) = torch.autograd.grad(reduce(total), leaf)
    torch.testing.assert_close(found, gradient, rtol=2e-7, atol=0)


def test_upstream_gradient_of_each_sample(fused: tuple[Tensor, Tensor, Tensor]) -> None:
    leaf, gradient, total = fused
    upstream = torch.tensor([65536.0, 0.0, -0.5])
    (found,) = torch.autograd.grad(total, leaf, upstream, retain_graph=True)
    assert torch.equal(found, gradient * upstream.view(3, 1, 1, 1))
    (again,) = torch.autograd.grad(total, leaf, upstream)
    assert torch.equal(found, again)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        total.sum().backward()


def test_fused_gradient_penalty_is_refused(fused: tuple[Tensor, Tensor, Tensor]) -> None:
    leaf, _, total = fused
    (gradient,) = torch.autograd.grad(total.sum(), leaf, create_graph=True)
    with pytest.raises(BackendError, match="cannot be differentiated again"):
        gradient.square().sum().backward()
