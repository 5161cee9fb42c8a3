"""The module that a trainer holds: its values and gradients by hand, its settings, and what may be done to it."""

from __future__ import annotations

import copy
import functools
import itertools
import logging
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from diffloss_engine.errors import BackendUnavailableError, BundleError, InputError, InputTypeError
from diffloss_trt import DiffLoss, NoiseSchedule
from diffloss_trt.evaluators import EagerEvaluator, Evaluator
from diffloss_trt.inputs import Backward
from diffloss_trt.unet import TappedUNet
from exports import shared_evaluator
from unets import KINDS, make_unet

Batch = tuple[Tensor, Tensor, Tensor, Tensor]


def by_hand(unet: Any, scheduler: Any, batch: Batch, *, attached: bool = False) -> tuple[Tensor, Tensor]:
    """Return naturalness and semantic as in the paper; `attached` keeps the target's branch on the tape too."""
    restored, target, noise, timesteps = batch
    a = scheduler.alphas_cumprod.double()[timesteps].view(-1, 1, 1, 1)

    def branch(image: Tensor) -> tuple[Tensor, Tensor]:
        kept: list[Tensor] = []
        place = unet.mid_block if unet.mid_block is not None else unet.down_blocks[-1].resnets[-1]
        if hasattr(unet.down_blocks[-1], "attentions") and unet.mid_block is None:
            place = unet.down_blocks[-1].attentions[-1]
        handle = place.register_forward_hook(lambda _module, _inputs, output: kept.append(output))
        predicted = unet(a.sqrt() * image + (1 - a).sqrt() * noise, timesteps).sample[:, : image.shape[1]]
        handle.remove()
        return predicted, kept[0]

    with torch.set_grad_enabled(attached):
        of_target = branch(target)
    terms = [(one - other).square().mean((1, 2, 3)) for one, other in zip(branch(restored), of_target, strict=True)]
    return terms[0], terms[1]


def make_loss(unet: Any, scheduler: Any, **settings: Any) -> DiffLoss:
    return DiffLoss.from_unet(unet, scheduler, **{"value_range": (-1, 1), "reduction": "none"} | settings)


def gradient_of(loss: DiffLoss, batch: Batch) -> Tensor:
    restored, target, noise, timesteps = batch
    leaf = restored.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf, target, noise=noise, timesteps=timesteps).sum(), leaf)
    return gradient


@pytest.mark.parametrize("kind", KINDS)
def test_terms_and_gradient_by_hand(kind: str, scheduler: Any, make_batch: Callable[..., Batch]) -> None:
    unet = make_unet(kind)
    batch = make_batch(size=unet.config.sample_size, channels=unet.config.in_channels, count=2)
    batch[0].requires_grad_()
    naturalness, semantic = by_hand(unet, scheduler, batch)
    (expected,) = torch.autograd.grad((0.7 * naturalness + 0.2 * semantic).sum(), batch[0])
    loss = make_loss(unet, scheduler, naturalness_weight=0.7, semantic_weight=0.2)
    terms = loss.terms(batch[0], batch[1], noise=batch[2], timesteps=batch[3])
    torch.testing.assert_close(terms.naturalness, naturalness.detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(terms.semantic, semantic.detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(terms.total, 0.7 * naturalness + 0.2 * semantic, rtol=1e-10, atol=0)
    assert (terms.total.requires_grad, terms.naturalness.requires_grad, terms.semantic.requires_grad) == (1, 0, 0)
    (gradient,) = torch.autograd.grad(terms.total.sum(), batch[0])
    assert (gradient - expected).norm() < 1e-10 * expected.norm()


def test_gradient_is_that_of_the_restored_branch_alone(scheduler: Any, batch: Batch) -> None:
    """The target is made of the same image, so that an attached target's branch would show in the gradient."""
    unet = make_unet()
    _, image, noise, timesteps = batch
    leaf = image.requires_grad_()
    gradients = {}
    for attached in (False, True):
        terms = by_hand(unet, scheduler, (leaf, 0.9 * leaf, noise, timesteps), attached=attached)
        (gradients[attached],) = torch.autograd.grad(terms[0].sum(), leaf)
    loss = make_loss(unet, scheduler, naturalness_weight=1.0, semantic_weight=0.0)
    found = gradient_of(loss, (leaf, 0.9 * leaf.detach(), noise, timesteps))
    assert (found - gradients[False]).norm() < 1e-10 * found.norm()
    assert (found - gradients[True]).norm() > 0.1 * found.norm()


@pytest.mark.parametrize("kind", ["two_levels", "adm"])
def test_finite_differences(kind: str, scheduler: Any, make_batch: Callable[..., Batch]) -> None:
    loss = make_loss(make_unet(kind), scheduler, naturalness_weight=1.0, semantic_weight=1.0)
    restored, target, noise, timesteps = make_batch(size=8, count=2)

    def total(image: Tensor) -> Tensor:
        return loss.terms(image, target, noise=noise, timesteps=timesteps).total

    assert torch.autograd.gradcheck(total, restored.requires_grad_(), fast_mode=True)
    gradient = gradient_of(loss, (restored, target, noise, timesteps))
    direction = torch.randn(restored.shape, dtype=torch.float64)
    step = 1e-5
    with torch.no_grad():
        slope = (total(restored + step * direction) - total(restored - step * direction)) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum((1, 2, 3)), slope, rtol=1e-6, atol=1e-9)


def test_equal_images_cost_nothing(scheduler: Any, batch: Batch) -> None:
    loss = make_loss(make_unet(), scheduler)
    same = (batch[1], batch[1].clone(), batch[2], batch[3])
    assert not loss(*same[:2], noise=batch[2], timesteps=batch[3]).any()
    assert not gradient_of(loss, same).any()


def test_both_branches_share_noise_and_timesteps(scheduler: Any, batch: Batch) -> None:
    """Drawn apart, equal images would differ."""
    loss = make_loss(make_unet(), scheduler)
    assert not loss(batch[1], batch[1].clone()).any()


def test_draws_are_reproducible_and_differ_from_step_to_step(scheduler: Any, batch: Batch) -> None:
    loss = make_loss(make_unet(), scheduler)
    restored, target = batch[:2]
    first, second, other = (loss(restored, target, generator=torch.Generator().manual_seed(n)) for n in (5, 5, 6))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    state = torch.get_rng_state()
    loss(restored, target, generator=torch.Generator())
    assert torch.equal(torch.get_rng_state(), state)
    drawn = loss(restored, target)
    assert not torch.equal(drawn, loss(restored, target))
    torch.set_rng_state(state)
    assert torch.equal(drawn, loss(restored, target))


def test_draws_are_uniform_over_the_schedule_and_normal(scheduler: Any, batch: Batch) -> None:
    """By hand from the same generator: timesteps first, then the noise in float32."""
    loss = make_loss(make_unet(), scheduler)
    generator = torch.Generator().manual_seed(3)
    timesteps = torch.randint(1000, (3,), generator=generator)
    noise = torch.randn(3, 3, 16, 16, generator=generator)
    expected = loss(batch[0], batch[1], noise=noise, timesteps=timesteps)
    found = loss(batch[0], batch[1], generator=torch.Generator().manual_seed(3))
    assert torch.equal(found, expected)
    # The last timestep of a short schedule is drawn, and none beyond it.
    short = make_loss(make_unet(), NoiseSchedule(torch.tensor([0.9, 0.5], dtype=torch.float64)))
    values = {float(short(batch[0][:1], batch[1][:1], noise=batch[2][:1])) for _ in range(20)}
    assert len(values) == 2


def test_samples_do_not_see_each_other(scheduler: Any, make_batch: Callable[..., Batch]) -> None:
    loss = make_loss(make_unet(), scheduler)
    batch = make_batch(count=5)
    together, gradient = loss(batch[0], batch[1], noise=batch[2], timesteps=batch[3]), gradient_of(loss, batch)
    for index in range(5):
        restored, target, noise, timesteps = (tensor[index : index + 1] for tensor in batch)
        alone = loss(restored, target, noise=noise, timesteps=timesteps)
        torch.testing.assert_close(alone, together[index : index + 1], rtol=1e-10, atol=0)
        of_one = gradient_of(loss, (restored, target, noise, timesteps))
        assert (of_one - gradient[index : index + 1]).norm() < 1e-10 * of_one.norm()


def test_reduction(scheduler: Any, batch: Batch) -> None:
    unet = make_unet()
    each, mean = (make_loss(unet, scheduler, reduction=name) for name in ("none", "mean"))
    known: dict[str, Any] = {"noise": batch[2], "timesteps": batch[3]}
    values = each(batch[0], batch[1], **known)
    assert values.shape == (3,)
    assert mean(batch[0], batch[1], **known).shape == ()
    torch.testing.assert_close(mean(batch[0], batch[1], **known), values.sum() / 3)
    assert mean.terms(batch[0], batch[1], noise=batch[2], timesteps=batch[3]).total.shape == (3,)


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (0, 255), [-3.0, 5.0]])
def test_value_range(bounds: Any, scheduler: Any, batch: Batch) -> None:
    unet = make_unet()
    low, high = bounds
    restored, target, noise, timesteps = batch
    mapped = tuple((image + 1) / 2 * (high - low) + low for image in (restored, target))
    plain, other = make_loss(unet, scheduler), make_loss(unet, scheduler, value_range=bounds)
    known: dict[str, Any] = {"noise": noise, "timesteps": timesteps}
    torch.testing.assert_close(other(*mapped, **known), plain(restored, target, **known), rtol=1e-9, atol=0)
    gradient = gradient_of(other, (mapped[0], mapped[1], noise, timesteps))
    torch.testing.assert_close(gradient, gradient_of(plain, batch) * 2 / (high - low), rtol=1e-6, atol=1e-15)


@pytest.mark.parametrize("unet_dtype", [torch.float32, torch.bfloat16])
def test_autocast_and_no_grad_change_nothing(
    unet_dtype: torch.dtype, scheduler: Any, make_batch: Callable[..., Batch]
) -> None:
    loss = make_loss(make_unet(dtype=unet_dtype), scheduler)
    batch = make_batch(dtype=torch.float32)
    known: dict[str, Any] = {"noise": batch[2], "timesteps": batch[3]}
    expected, gradient = loss(batch[0], batch[1], **known), gradient_of(loss, batch)
    assert expected.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert (batch[0][0, 0] @ batch[0][0, 0]).dtype == torch.bfloat16  # it is on
        leaf = batch[0].clone().requires_grad_()
        total = loss(leaf, batch[1], **known)
    assert torch.equal(total, expected)
    assert torch.equal(torch.autograd.grad(total.sum(), leaf)[0], gradient)  # outside, as PyTorch advises
    with torch.no_grad():
        assert torch.equal(loss(batch[0], batch[1], **known), expected)
    with torch.inference_mode():
        assert torch.equal(loss(batch[0], batch[1], **known), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_images_are_widened_first(
    dtype: torch.dtype, scheduler: Any, make_batch: Callable[..., Batch]
) -> None:
    loss = make_loss(make_unet(dtype=torch.float32), scheduler)
    restored, target, noise, timesteps = make_batch(dtype=dtype)
    narrow = loss(restored, target, noise=noise, timesteps=timesteps)
    wide = loss(restored.float(), target.float(), noise=noise.float(), timesteps=timesteps)
    assert torch.equal(narrow, wide)
    assert gradient_of(loss, (restored, target, noise, timesteps)).dtype == dtype


def test_memory_layout_of_images_does_not_matter(scheduler: Any, batch: Batch) -> None:
    loss = make_loss(make_unet(), scheduler)
    expected = loss(batch[0], batch[1], noise=batch[2], timesteps=batch[3])
    last = [image.to(memory_format=torch.channels_last) for image in batch[:3]]
    torch.testing.assert_close(loss(last[0], last[1], noise=last[2], timesteps=batch[3]), expected, rtol=1e-10, atol=0)
    slices = [torch.stack([image, image], -1)[..., 0] for image in batch[:3]]
    found = loss(slices[0], slices[1], noise=slices[2], timesteps=batch[3].int())
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)


def test_upstream_gradients_and_accumulation(scheduler: Any, batch: Batch) -> None:
    loss = make_loss(make_unet(), scheduler)
    plain = gradient_of(loss, batch)
    leaf = batch[0].requires_grad_()
    total = loss(leaf, batch[1], noise=batch[2], timesteps=batch[3])
    factors = torch.tensor([65536.0, 0.0, -0.5], dtype=torch.float64)
    total.backward(factors, retain_graph=True)
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, plain * factors.view(3, 1, 1, 1), rtol=1e-12, atol=0)
    total.backward(-factors)
    assert leaf.grad.abs().max() <= 1e-12 * plain.abs().max() * 65536


def test_nothing_to_train_and_nothing_to_save(scheduler: Any, batch: Batch) -> None:
    loss = make_loss(make_unet(dropout=0.3), scheduler)
    for found in (loss.parameters(), loss.buffers(), loss.state_dict()):
        assert not list(found)
    known: dict[str, Any] = {"noise": batch[2], "timesteps": batch[3]}
    expected = loss(batch[0], batch[1], **known)
    for same in (loss.train(), loss.half(), loss.float(), loss.to("cpu"), loss.requires_grad_(True)):
        assert torch.equal(same(batch[0], batch[1], **known), expected)
    trainer = torch.nn.ModuleDict({"net": torch.nn.Conv2d(3, 3, 1), "loss": loss})
    assert set(trainer.state_dict()) == {"net.weight", "net.bias"}


def test_copies_give_the_same_values(scheduler: Any, batch: Batch) -> None:
    loss = make_loss(make_unet(), scheduler, naturalness_weight=0.5, semantic_weight=0.25)
    expected, gradient = loss(batch[0], batch[1], noise=batch[2], timesteps=batch[3]), gradient_of(loss, batch)
    for other in (copy.deepcopy(loss), copy.copy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(other(batch[0], batch[1], noise=batch[2], timesteps=batch[3]), expected)
        assert torch.equal(gradient_of(other, batch), gradient)
        assert repr(other) == repr(loss)
    assert copy.deepcopy(loss).evaluator is loss.evaluator  # weights are held once


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_unet_that_is_cast_afterwards(dtype: torch.dtype, scheduler: Any, make_batch: Callable[..., Batch]) -> None:
    """It is the user's; in half precision its own tape would flush cotangents of these weights to zero."""
    unet, batch = make_unet(dtype=torch.float32), make_batch(dtype=torch.float32)
    loss = make_loss(unet, scheduler)
    gradient_of(loss, batch)
    unet.to(dtype)
    gradient = gradient_of(loss, batch)
    assert gradient.flatten(1).any(1).all()
    assert torch.equal(gradient, gradient_of(make_loss(make_unet(dtype=dtype), scheduler), batch))


def test_a_unet_that_is_moved_afterwards(scheduler: Any, make_batch: Callable[..., Batch]) -> None:
    """To "meta", where nothing is computed, as it could be to a GPU."""
    unet, batch = make_unet(dtype=torch.float32), make_batch(dtype=torch.float32)
    loss = make_loss(unet, scheduler)
    unet.to("meta")
    assert loss.device == torch.device("meta")
    with pytest.raises(InputTypeError, match="restored is on cpu; expected meta, where the loss is"):
        loss(*batch[:2])


@pytest.mark.gpu
def test_a_unet_that_is_moved_to_a_gpu_afterwards(scheduler: Any, make_batch: Callable[..., Batch]) -> None:
    unet, batch = make_unet(), make_batch()
    loss = make_loss(unet, scheduler)
    expected = gradient_of(loss, batch)
    unet.cuda()
    restored, target, noise, timesteps = (tensor.cuda() for tensor in batch)
    found = gradient_of(loss, (restored, target, noise, timesteps)).cpu()
    assert (found - expected).norm() < 1e-10 * expected.norm()


def test_scheduler_or_schedule(batch: Batch) -> None:
    unet, scheduler = make_unet(), DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2", prediction_type="sample")
    known: dict[str, Any] = {"noise": batch[2], "timesteps": batch[3]}
    one = make_loss(unet, scheduler)(batch[0], batch[1], **known)
    other = make_loss(unet, NoiseSchedule.from_scheduler(scheduler))(batch[0], batch[1], **known)
    assert torch.equal(one, other)


def test_gradient_reaches_a_network_and_descent_lowers_the_loss(scheduler: Any, batch: Batch) -> None:
    loss = make_loss(make_unet(), scheduler, naturalness_weight=1.0, semantic_weight=0.1, reduction="mean")
    network = torch.nn.Conv2d(3, 3, 3, padding=1, dtype=torch.float64)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    values = []
    for _ in range(3):
        optimizer.zero_grad()
        value = loss(network(batch[0]), batch[1], noise=batch[2], timesteps=batch[3])
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[0] > values[1] > values[2]


def test_two_steps_on_a_bundle_lower_the_loss(
    exported: tuple[Path, Any, NoiseSchedule], make_batch: Callable[..., Batch]
) -> None:
    loss = DiffLoss.load(
        exported[0], device="cpu", naturalness_weight=1.0, semantic_weight=0.1, reduction="mean", value_range=(-1, 1)
    )
    restored, target, noise, timesteps = make_batch(dtype=torch.float32)
    values = []
    for _ in range(3):
        leaf = restored.clone().requires_grad_()
        value = loss(leaf, target, noise=noise, timesteps=timesteps)
        value.backward()
        values.append(value.item())
        assert leaf.grad is not None
        restored = restored - 5e-2 * leaf.grad / leaf.grad.square().mean().sqrt()
    assert values[0] > values[1] > values[2]


def test_auto_says_once_what_it_takes(
    exported: tuple[Path, Any, NoiseSchedule], caplog: pytest.LogCaptureFixture, make_batch: Callable[..., Batch]
) -> None:
    restored, target, noise, timesteps = make_batch(dtype=torch.float32)
    with caplog.at_level(logging.INFO):
        loss = DiffLoss.load(exported[0], device="cpu", value_range=(-1, 1))
        for _ in range(2):
            loss(restored, target, noise=noise, timesteps=timesteps)
    assert [record.getMessage() for record in caplog.records if record.name.startswith("diffloss")] == [
        "backend auto: onnxruntime on cpu"
    ]


def test_auto_tries_what_a_weight_may_ask_for_later(
    exported: tuple[Path, Any, NoiseSchedule], monkeypatch: pytest.MonkeyPatch, make_batch: Callable[..., Batch]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as where it is not installed
    loss = DiffLoss.load(exported[0], device="cpu", naturalness_weight=0, semantic_weight=0, value_range=(-1, 1))
    assert loss.backend == "torch"
    loss.naturalness_weight = 1.0
    restored, target, noise, timesteps = make_batch(dtype=torch.float32)
    assert loss(restored, target, noise=noise, timesteps=timesteps) > 0


BATCHES = [
    ([4, 8, 3, 7, 12], None),
    ([1, 4, 2, 4, 1], None),  # the last of an epoch
    ([4, 2, 1, 6], (1, 4)),
    ([5, 5], (5, 8)),
]


@pytest.mark.parametrize("backward", ["fused", "recompute"])
@pytest.mark.parametrize(("counts", "said"), BATCHES)
def test_a_batch_that_wastes_the_bundles_is_warned_of_once(
    counts: list[int],
    said: tuple[int, int] | None,
    backward: Backward,
    exported: tuple[Path, Any, NoiseSchedule],
    make_batch: Callable[..., Batch],
    caplog: pytest.LogCaptureFixture,
) -> None:
    loss = DiffLoss.load(exported[0], "onnxruntime", "cpu", backward=backward, value_range=(-1, 1))
    assert not caplog.records  # the images that it was checked on need not fit
    restored, target = (image[:1].float() for image in make_batch()[:2])
    for count in counts:
        loss(restored.expand(count, -1, -1, -1), target.expand(count, -1, -1, -1))
    expected = (
        []
        if said is None
        else [
            f"this bundle computes 4 images at a time, so a batch of {said[0]} takes as long as one of {said[1]}; "
            f"for batches of {said[0]}, export it with --batch-size {said[0]}"
        ]
    )
    assert [record.getMessage() for record in caplog.records] == expected


def test_a_compiled_step_warns_of_its_batch_once(
    exported: tuple[Path, Any, NoiseSchedule], make_batch: Callable[..., Batch], caplog: pytest.LogCaptureFixture
) -> None:
    loss = DiffLoss.load(exported[0], "onnxruntime", "cpu", value_range=(-1, 1))
    restored, target, *_ = make_batch(count=2, dtype=torch.float32)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        compiled(restored, target)
    torch.compiler.reset()
    assert sum("--batch-size 2" in record.getMessage() for record in caplog.records) == 1


def test_nothing_computed_is_nothing_wasted(
    exported: tuple[Path, Any, NoiseSchedule],
    scheduler: Any,
    make_batch: Callable[..., Batch],
    caplog: pytest.LogCaptureFixture,
) -> None:
    restored, target, *_ = make_batch(count=1, dtype=torch.float32)
    weights: dict[str, Any] = {"naturalness_weight": 0.0, "semantic_weight": 0.0}
    DiffLoss.load(exported[0], "onnxruntime", "cpu", value_range=(-1, 1), **weights)(restored, target)
    make_loss(make_unet(dtype=torch.float32), scheduler)(restored, target)  # which takes batches as they come
    assert not caplog.records


@pytest.fixture(scope="module")
def load_and_call(
    exported: tuple[Path, Any, NoiseSchedule], make_batch: Callable[..., Batch]
) -> Callable[[str, Backward], Tensor]:
    """(backend, backward) -> the value of a loss that is loaded and called in the state that torch is in."""
    restored, target, *_ = make_batch(dtype=torch.float32)

    def load_and_call(backend: str, backward: Backward) -> Tensor:
        loss = DiffLoss.load(exported[0], backend, "cpu", backward=backward, value_range=(-1, 1), seed=0)
        return loss(restored, target)

    return load_and_call


@pytest.fixture(scope="module")
def plain(load_and_call: Callable[[str, Backward], Tensor]) -> Callable[[str, Backward], Tensor]:
    """(backend, backward) -> that value where nothing is set; computed once, since PyTorch traces for seconds."""
    return functools.cache(load_and_call)


every_way = pytest.mark.parametrize(
    ("backend", "backward"), [*itertools.product(["onnxruntime", "torch"], ["fused", "recompute"])]
)


@every_way
def test_another_default_device_changes_nothing(
    backend: str, backward: Backward, load_and_call: Callable[..., Tensor], plain: Callable[..., Tensor]
) -> None:
    """As trainers set one; "meta" stands for any that is not the loss's."""
    with torch.device("meta"):
        found = load_and_call(backend, backward)
    assert torch.equal(found, plain(backend, backward))


@every_way
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_default_dtype_changes_nothing(
    dtype: torch.dtype,
    backend: str,
    backward: Backward,
    load_and_call: Callable[..., Tensor],
    plain: Callable[..., Tensor],
) -> None:
    expected = plain(backend, backward)
    torch.set_default_dtype(dtype)
    try:
        found = load_and_call(backend, backward)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("backward", ["fused", "recompute"])
def test_what_is_loaded_for_inference_trains(
    backward: Backward, exported: tuple[Path, Any, NoiseSchedule], make_batch: Callable[..., Batch]
) -> None:
    with torch.inference_mode():
        loss = DiffLoss.load(exported[0], "onnxruntime", "cpu", backward=backward, value_range=(-1, 1))
    restored, target, *_ = make_batch(count=4, dtype=torch.float32)
    restored.requires_grad_()
    loss(restored, target).backward()
    assert restored.grad is not None
    assert bool(restored.grad.any())


def test_a_path_may_begin_at_home(exported: tuple[Path, Any, NoiseSchedule], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(exported[0].parent))
    assert DiffLoss.load(f"~/{exported[0].name}", "onnxruntime", "cpu").evaluator.backend == "onnxruntime"


OffTheTape = Literal["fused", "recompute", "a UNet in half precision"]


def off_the_tape(computed_by: OffTheTape, exported: tuple[Path, Any, NoiseSchedule]) -> DiffLoss:
    """Return a loss whose gradient PyTorch's tape does not lead through."""
    folder, unet, schedule = exported
    if computed_by == "a UNet in half precision":
        return DiffLoss.from_unet(copy.deepcopy(unet).bfloat16(), schedule, value_range=(-1, 1))
    return DiffLoss(shared_evaluator(folder, backward=computed_by), value_range=(-1, 1))


@pytest.mark.parametrize(
    "transform",
    [
        lambda loss, restored: torch.func.grad(loss)(restored),
        lambda loss, restored: torch.func.vmap(loss)(restored[:, None]),
        lambda loss, restored: torch.func.jvp(loss, (restored,), (restored,)),
    ],
    ids=["grad", "vmap", "jvp"],
)
@pytest.mark.parametrize("computed_by", get_args(OffTheTape))
# torch 2.13: its first forward-mode derivative scripts functions of its own.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_what_would_follow_what_is_on_no_tape_is_refused(
    transform: Callable[..., Any],
    computed_by: OffTheTape,
    exported: tuple[Path, Any, NoiseSchedule],
    make_batch: Callable[..., Batch],
) -> None:
    loss = off_the_tape(computed_by, exported)
    restored, target, *_ = make_batch(count=4, dtype=torch.float32)
    with pytest.raises(InputTypeError, match=r"torch\.func or forward-mode"):
        transform(lambda images: loss(images, target[: len(images)]), restored)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(restored, torch.ones_like(restored))
        with pytest.raises(InputTypeError, match=r"torch\.func or forward-mode"):
            loss(dual, target)


@pytest.mark.parametrize("backend", ["from_unet", "torch"])
# torch 2.13: of attention, in `jacrev`.
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_transforms_of_a_tape(
    backend: str, exported: tuple[Path, Any, NoiseSchedule], make_batch: Callable[..., Batch]
) -> None:
    """With a tape of PyTorch's own there are the transforms that record one, but none over parts of a batch."""
    folder, unet, schedule = exported
    if backend == "from_unet":
        evaluator: Evaluator = EagerEvaluator(TappedUNet(copy.deepcopy(unet).float(), schedule))
    else:
        evaluator = shared_evaluator(folder, backend, "recompute")
    loss = DiffLoss(evaluator, value_range=(-1, 1), naturalness_weight=1.0, semantic_weight=1.0)
    restored, target, noise, timesteps = make_batch(count=4, dtype=torch.float32)

    def of_restored(images: Tensor) -> Tensor:
        return loss(images, target, noise=noise, timesteps=timesteps)

    leaf = restored.clone().requires_grad_()
    (expected,) = torch.autograd.grad(of_restored(leaf), leaf)
    for found in (
        torch.func.grad(of_restored)(restored),
        torch.func.vjp(of_restored, restored)[1](torch.ones(()))[0],
        torch.func.jacrev(of_restored)(restored),
    ):
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    given: dict[str, Any] = {"restored": restored, "target": target, "noise": noise, "timesteps": timesteps}
    for name in given:

        def of_one(part: Tensor, name: str = name) -> Tensor:
            return loss(**{key: value[:1] for key, value in given.items()} | {name: part[None]})

        with pytest.raises(InputTypeError, match=rf"{name} is inside torch\.func\.vmap"):
            torch.func.vmap(of_one)(given[name])
    with pytest.raises(InputTypeError, match=r"restored is inside torch\.func\.vmap"):
        torch.func.vmap(torch.func.grad(lambda image: of_restored(image.expand(4, -1, -1, -1))))(restored)
    with pytest.raises(InputTypeError, match=r"restored is inside torch\.func\.vmap or functionalize"):
        torch.func.functionalize(of_restored)(restored)


def test_no_part_of_a_batch_reaches_an_engine(
    exported: tuple[Path, Any, NoiseSchedule], make_batch: Callable[..., Batch]
) -> None:
    loss = DiffLoss(shared_evaluator(exported[0]), value_range=(-1, 1))
    restored, target, *_ = make_batch(count=4, dtype=torch.float32)
    with pytest.raises(InputTypeError, match=r"target is inside torch\.func\.vmap"):
        torch.func.vmap(lambda image: loss(restored[:1], image[None]))(target)


@pytest.mark.parametrize(
    "trace",
    [lambda call, restored: torch.jit.trace(call, (restored,)), lambda call, restored: make_fx(call)(restored)],
    ids=["torch.jit.trace", "make_fx"],
)
@pytest.mark.parametrize("computed_by", get_args(OffTheTape))
@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated:DeprecationWarning")
def test_what_a_tracer_does_not_see_is_not_traced(
    trace: Callable[..., Any],
    computed_by: OffTheTape,
    exported: tuple[Path, Any, NoiseSchedule],
    make_batch: Callable[..., Batch],
) -> None:
    """What it records would return memory that nothing was written to."""
    loss = off_the_tape(computed_by, exported)
    restored, target, *_ = make_batch(count=4, dtype=torch.float32)
    with pytest.raises(InputTypeError, match=r"cannot be traced by torch\.jit\.trace or make_fx"):
        trace(lambda images: loss(images, target), restored)


def test_a_generator_is_one(exported: tuple[Path, Any, NoiseSchedule], make_batch: Callable[..., Batch]) -> None:
    restored, target, *_ = make_batch(count=4, dtype=torch.float32)
    with pytest.raises(InputTypeError, match=r"generator is a int; expected a torch\.Generator"):
        DiffLoss.load(exported[0], "onnxruntime", "cpu")(restored, target, generator=5)  # type: ignore[arg-type]


@pytest.mark.parametrize("way", ["fused", "recompute", "a UNet"])
def test_a_device_that_load_refuses_is_none_to_move_to(
    way: Literal["fused", "recompute", "a UNet"],
    exported: tuple[Path, Any, NoiseSchedule],
    scheduler: Any,
    make_batch: Callable[..., Batch],
) -> None:
    restored, target, *_ = make_batch(dtype=torch.float32)
    if way == "a UNet":
        loss = make_loss(make_unet(dtype=torch.float32), scheduler, seed=0)
    elif way == "fused":
        loss = DiffLoss(shared_evaluator(exported[0], "torch"), value_range=(-1, 1), seed=0)
    else:
        loss = DiffLoss.load(exported[0], "torch", "cpu", backward=way, value_range=(-1, 1), seed=0)
    with pytest.raises(InputError, match="device is meta; expected 'cpu', 'cuda' or 'cuda:N'"):
        loss.to("meta")
    assert loss.to("cpu")(restored, target).isfinite().all()


def test_where_it_comes_from_can_be_read_and_not_assigned(exported: tuple[Path, Any, NoiseSchedule]) -> None:
    folder, unet, schedule = exported
    fused = DiffLoss.load(folder, "onnxruntime", "cpu")
    eager = DiffLoss.from_unet(unet, schedule)
    assert (fused.backend, fused.backward) == ("onnxruntime", "fused")
    assert (eager.backend, eager.backward) == ("torch", "recompute")
    assert eager.schedule is schedule
    assert torch.equal(fused.schedule.alphas_cumprod, schedule.alphas_cumprod)
    for name in ("schedule", "backend", "backward"):
        with pytest.raises(AttributeError):
            setattr(fused, name, "torch")


def test_load_refuses_what_it_cannot_do(exported: tuple[Path, Any, NoiseSchedule], tmp_path: Path) -> None:
    folder = exported[0]
    with pytest.raises(InputError, match="backend is 'tensorflow'; expected 'auto', 'inductor', "):
        DiffLoss.load(folder, backend="tensorflow")
    with pytest.raises(BackendUnavailableError, match="onnxruntime-tensorrt is not used on device cpu"):
        DiffLoss.load(folder, backend="onnxruntime-tensorrt", device="cpu")
    with pytest.raises(InputError, match="backward is 'twice'; expected"):
        DiffLoss.load(folder, backward="twice")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="device is 'gpu'; expected 'cpu', 'cuda'"):
        DiffLoss.load(folder, device="gpu")
    for device in (3.5, ["cpu"]):
        with pytest.raises(InputError, match=r"device is .*; expected 'cpu', 'cuda'"):
            DiffLoss.load(folder, device=device)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="device is meta"):
        DiffLoss.load(folder, device="meta")
    with pytest.raises(BundleError):
        DiffLoss.load(tmp_path / "nowhere", device="cpu")
    missing = "cuda:99" if torch.cuda.is_available() else "cuda"
    with pytest.raises(BackendUnavailableError, match=f"device is {missing}, but"):
        DiffLoss.load(folder, device=missing)
