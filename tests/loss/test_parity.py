"""The loss against the plain formula in float64: value and gradient, eager and through exported graphs."""

from __future__ import annotations

import copy
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from diffloss_export.models import LoadedModel
from diffloss_export.pipeline import export_bundle
from diffloss_export.tolerances import PLAIN
from diffloss_trt import DiffLoss, NoiseSchedule
from unets import make_unet

WEIGHTS = (1e-3, 1e-6)
TIMESTEPS = torch.tensor([0, 10, 100, 500, 999])


def scheduler(prediction_type: str = "epsilon") -> DDPMScheduler:
    return DDPMScheduler(1000, beta_schedule="linear", prediction_type=prediction_type)


def images(size: int, decibels: float = 20.0, count: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Return restored, target and noise; images in [-1, 1], float64."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(count, 3, 4, 4, generator=generator, dtype=torch.float64) * 2 - 1
    target = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
    error = torch.randn(target.shape, generator=generator, dtype=torch.float64) * 2 * 10 ** (-decibels / 20)
    noise = torch.randn(target.shape, generator=generator, dtype=torch.float64)
    return target + error, target, noise


def plain_formula(
    unet: Any, prediction_type: str, restored: Tensor, target: Tensor, noise: Tensor, timesteps: Tensor
) -> tuple[Tensor, Tensor]:
    """Write DiffLoss down from the paper: naturalness and semantic of each sample, the target's branch without tape."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float32)
    abar = torch.cumprod(1 - betas, 0).double()[timesteps].view(-1, 1, 1, 1)

    def branch(image: Tensor) -> tuple[Tensor, Tensor]:
        kept = []
        handle = unet.mid_block.register_forward_hook(lambda _module, _inputs, output: kept.append(output))
        noisy = abar.sqrt() * image + (1 - abar).sqrt() * noise
        try:
            predicted = unet(noisy, timesteps).sample[:, : image.shape[1]]
        finally:
            handle.remove()
        if prediction_type == "v_prediction":
            predicted = abar.sqrt() * predicted + (1 - abar).sqrt() * noisy
        if prediction_type == "sample":
            predicted = (noisy - abar.sqrt() * predicted) / (1 - abar).sqrt()
        return predicted, kept[0]

    with torch.no_grad():
        noise_target, bottleneck_target = branch(target)
    noise_restored, bottleneck_restored = branch(restored)
    naturalness = ((noise_restored - noise_target) ** 2).mean((1, 2, 3))
    return naturalness, ((bottleneck_restored - bottleneck_target) ** 2).mean((1, 2, 3))


def relative(found: Tensor, expected: Tensor) -> float:
    """Return the worst sample's ||a - b|| / ||b||."""
    a, b = found.double().flatten(1), expected.flatten(1)
    return float(((a - b).norm(dim=1) / b.norm(dim=1)).max())


def terms_and_gradient(loss: DiffLoss, size: int, dtype: torch.dtype, decibels: float = 20.0) -> tuple[Any, Tensor]:
    restored, target, noise = (image.to(dtype) for image in images(size, decibels))
    restored.requires_grad_()
    terms = loss.terms(restored, target, timesteps=TIMESTEPS, noise=noise)
    (gradient,) = torch.autograd.grad(terms.total.sum(), restored)
    return terms, gradient


def expected_of(unet: Any, size: int, prediction_type: str = "epsilon", decibels: float = 20.0) -> tuple[Any, Tensor]:
    restored, target, noise = images(size, decibels)
    restored.requires_grad_()
    naturalness, semantic = plain_formula(unet, prediction_type, restored, target, noise, TIMESTEPS)
    (gradient,) = torch.autograd.grad((WEIGHTS[0] * naturalness + WEIGHTS[1] * semantic).sum(), restored)
    return (naturalness.detach(), semantic.detach()), gradient


@pytest.mark.parametrize("kind", ["two_levels", "four_levels", "adm"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_eager_loss_is_the_formula(kind: str, prediction_type: str) -> None:
    unet = make_unet(kind)
    size = unet.config.sample_size
    loss = DiffLoss.from_unet(unet, scheduler(prediction_type), value_range=(-1, 1))
    terms, gradient = terms_and_gradient(loss, size, torch.float64)
    (naturalness, semantic), expected = expected_of(unet, size, prediction_type)
    torch.testing.assert_close(terms.naturalness, naturalness, rtol=1e-9, atol=0)
    torch.testing.assert_close(terms.semantic, semantic, rtol=1e-9, atol=0)
    torch.testing.assert_close(
        terms.total.detach(), WEIGHTS[0] * naturalness + WEIGHTS[1] * semantic, rtol=1e-9, atol=0
    )
    assert relative(gradient, expected) < 1e-9


def test_gradient_passes_gradcheck() -> None:
    loss = DiffLoss.from_unet(make_unet("two_levels"), scheduler(), semantic_weight=1e-2, value_range=(-1, 1))
    restored, target, noise = (image[1:3] for image in images(8))
    steps = torch.tensor([10, 500])
    assert torch.autograd.gradcheck(
        lambda image: loss.terms(image, target, timesteps=steps, noise=noise).total,
        restored.requires_grad_(),
        fast_mode=True,
    )


def test_gradient_flows_through_the_restored_branch_alone() -> None:
    """Were the target's branch on the tape too, the gradient with respect to a shared image would vanish."""
    loss = DiffLoss.from_unet(make_unet("two_levels"), scheduler(), value_range=(-1, 1))
    restored, target, noise = images(16)
    with pytest.raises(ValueError, match="target requires grad"):
        loss(restored, target.requires_grad_(), timesteps=TIMESTEPS, noise=noise)
    leaf = target.detach().clone().requires_grad_()
    total = loss(leaf, leaf.detach() * 0.99, timesteps=TIMESTEPS, noise=noise)
    assert torch.autograd.grad(total, leaf)[0].abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_unet_keeps_its_gradient(dtype: torch.dtype) -> None:
    unet = make_unet("two_levels").to(dtype)
    reference = copy.deepcopy(unet).double()
    loss = DiffLoss.from_unet(unet, scheduler(), value_range=(-1, 1))
    _, gradient = terms_and_gradient(loss, 16, torch.float32)
    _, expected = expected_of(reference, 16)
    tolerance = PLAIN["fp16" if dtype == torch.float16 else "bf16"].gradient
    usable = slice(1, 4)  # the timesteps for which the table speaks
    assert relative(gradient[usable], expected[usable]) < tolerance


@pytest.fixture(scope="module", params=["two_levels", "adm"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Return a bundle of batch 4 in fp32 and its UNet in float64."""
    unet = make_unet(request.param, dtype=torch.float32)
    reference = copy.deepcopy(unet).double()
    folder = tmp_path_factory.mktemp("bundles") / request.param
    export_bundle(LoadedModel(unet, NoiseSchedule.from_scheduler(scheduler()), "test", ()), folder, batch_size=4)
    return folder, reference


@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_bundle_holds_the_table(exported: tuple[Path, Any], backend: str) -> None:
    folder, reference = exported
    size = reference.config.sample_size
    loss = DiffLoss.load(folder, backend=backend, device="cpu", value_range=(-1, 1))
    terms, gradient = terms_and_gradient(loss, size, torch.float32)
    (naturalness, semantic), expected = expected_of(reference, size)
    tolerance, usable = PLAIN["fp32"], slice(0, 4)  # the timesteps for which the table speaks
    assert relative(terms.naturalness[usable, None], naturalness[usable, None]) < tolerance.term
    assert relative(terms.semantic[usable, None], semantic[usable, None]) < tolerance.term
    assert relative(gradient[usable], expected[usable]) < tolerance.gradient


def test_perturbed_weight_fails_the_table(exported: tuple[Path, Any]) -> None:
    """The negative control: the comparison above sees one weight in a hundred changed by a per mille."""
    folder, reference = exported
    size = reference.config.sample_size
    altered = copy.deepcopy(reference)
    altered.conv_in.weight.data.mul_(1 + 1e-3)
    loss = DiffLoss.load(folder, backend="onnxruntime", device="cpu", value_range=(-1, 1))
    terms, _ = terms_and_gradient(loss, size, torch.float32)
    (naturalness, _), _ = expected_of(altered, size)
    assert relative(terms.naturalness[:4, None], naturalness[:4, None]) > PLAIN["fp32"].term


@pytest.mark.parametrize("count", [1, 3, 4, 5, 9])
def test_any_batch_size_gives_each_sample_its_own_loss(exported: tuple[Path, Any], count: int) -> None:
    folder, reference = exported
    loss = DiffLoss.load(folder, backend="onnxruntime", device="cpu", value_range=(-1, 1), reduction="none")
    restored, target, noise = (image.float() for image in images(reference.config.sample_size, count=count))
    restored.requires_grad_()
    steps = torch.arange(count) * 100
    together = loss(restored, target, timesteps=steps, noise=noise)
    (gradient,) = torch.autograd.grad(together.sum(), restored)
    for index in range(count):
        leaf = restored[index : index + 1].detach().requires_grad_()
        alone = loss(
            leaf, target[index : index + 1], timesteps=steps[index : index + 1], noise=noise[index : index + 1]
        )
        assert alone.item() == pytest.approx(together[index].item(), rel=1e-5)
        (of_one,) = torch.autograd.grad(alone.sum(), leaf)
        assert relative(of_one, gradient[index : index + 1].double()) < 1e-3


def test_upstream_gradients_scale_each_sample_exactly(exported: tuple[Path, Any]) -> None:
    folder, reference = exported
    loss = DiffLoss.load(folder, backend="onnxruntime", device="cpu", value_range=(-1, 1), reduction="none")
    restored, target, noise = (image.float() for image in images(reference.config.sample_size))
    restored.requires_grad_()
    total = loss(restored, target, timesteps=TIMESTEPS, noise=noise)
    (plain,) = torch.autograd.grad(total.sum(), restored, retain_graph=True)
    factors = torch.tensor([65536.0, 0.0, -1.0, 0.25, 2.0**-20])
    (scaled,) = torch.autograd.grad(total, restored, factors, retain_graph=True)
    torch.testing.assert_close(scaled, plain * factors.view(-1, 1, 1, 1), rtol=1e-6, atol=0)
    total.sum().backward()
    torch.testing.assert_close(restored.grad, plain, rtol=1e-6, atol=0)
    with torch.no_grad():
        again = loss(restored, target, timesteps=TIMESTEPS, noise=noise)
    torch.testing.assert_close(again, total.detach(), rtol=0, atol=0)


def test_several_losses_and_copies_live_side_by_side(exported: tuple[Path, Any]) -> None:
    folder, reference = exported
    first = DiffLoss.load(folder, device="cpu", value_range=(-1, 1))
    losses = [first, copy.deepcopy(first), pickle.loads(pickle.dumps(first)), DiffLoss.load(folder, device="cpu")]
    losses[3].value_range = (-1.0, 1.0)
    restored, target, noise = (image.float() for image in images(reference.config.sample_size))
    leaves = [restored.detach().clone().requires_grad_() for _ in losses]
    values = [loss(leaf, target, timesteps=TIMESTEPS, noise=noise) for loss, leaf in zip(losses, leaves, strict=True)]
    for value in reversed(values):
        value.backward()
    for value, leaf in zip(values, leaves, strict=True):
        assert value.item() == values[0].item()
        torch.testing.assert_close(leaf.grad, leaves[0].grad, rtol=0, atol=0)
    assert not list(first.parameters())
    assert not first.state_dict()


def test_weight_of_zero_leaves_its_work_out() -> None:
    unet = make_unet("two_levels")
    ran: list[str] = []
    unet.mid_block.register_forward_hook(lambda *_: ran.append("encoder"))
    unet.conv_out.register_forward_hook(lambda *_: ran.append("noise head"))
    restored, target, noise = images(16)
    restored.requires_grad_()
    for weights, expected in (((1e-3, 1e-6), True), ((1e-3, 0.0), True), ((0.0, 1e-6), False)):
        ran.clear()
        loss = DiffLoss.from_unet(unet, scheduler(), naturalness_weight=weights[0], semantic_weight=weights[1])
        loss.value_range = (-1.0, 1.0)
        loss(restored, target, timesteps=TIMESTEPS, noise=noise).backward()
        assert ran.count("encoder") == 2
        assert ("noise head" in ran) is expected
    ran.clear()
    nothing = DiffLoss.from_unet(unet, scheduler(), naturalness_weight=0, semantic_weight=0, value_range=(-1, 1))
    restored.grad = None
    value = nothing(restored, target, timesteps=TIMESTEPS, noise=noise)
    value.backward()
    assert value.item() == 0
    assert not ran
    assert restored.grad is not None
    assert not restored.grad.any()


def test_value_range_and_autocast_do_not_change_the_loss() -> None:
    unet = make_unet("two_levels")
    restored, target, noise = images(16)
    plain = DiffLoss.from_unet(unet, scheduler(), value_range=(-1, 1))
    bytes_ = DiffLoss.from_unet(unet, scheduler(), value_range=(0, 255))
    value = plain(restored, target, timesteps=TIMESTEPS, noise=noise)
    scaled = bytes_((restored + 1) * 127.5, (target + 1) * 127.5, timesteps=TIMESTEPS, noise=noise)
    torch.testing.assert_close(scaled, value, rtol=1e-9, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        under = plain(restored, target, timesteps=TIMESTEPS, noise=noise)
    torch.testing.assert_close(under, value, rtol=0, atol=0)


def test_descent_on_the_loss_lowers_it(exported: tuple[Path, Any]) -> None:
    folder, reference = exported
    loss = DiffLoss.load(folder, device="cpu", value_range=(-1, 1), naturalness_weight=1.0, semantic_weight=1e-3)
    restored, target, noise = (image.float() for image in images(reference.config.sample_size))
    restored = restored.requires_grad_()
    optimizer = torch.optim.Adam([restored], lr=1e-2)
    values = []
    for _ in range(6):
        optimizer.zero_grad()
        value = loss(restored, target, timesteps=torch.full((5,), 100), noise=noise)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.8 * values[0]


def test_auto_says_what_it_takes(exported: tuple[Path, Any], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="diffloss_trt"):
        loss = DiffLoss.load(exported[0], device="cpu")
    assert loss.evaluator.backend == "onnxruntime"
    assert caplog.messages == ["backend auto: onnxruntime on cpu"]
