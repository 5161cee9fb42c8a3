"""The loss in other people's calling conventions: the same value and gradient as the loss itself."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from diffloss_engine.errors import BundleError, InputError, InputTypeError
from diffloss_trt import DiffLoss, NoiseSchedule
from diffloss_trt.conventions import DiffLossCriterion, PerceptualDiffLoss, Reduction

Batch = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture
def bundle(exported: tuple[Path, Any, NoiseSchedule]) -> Path:
    return exported[0]


@pytest.fixture
def images(make_batch: Callable[..., Batch]) -> Batch:
    """Three images of 16x16 in [0, 1], in float32: restored, target, noise, timesteps."""
    restored, target, noise, timesteps = make_batch(dtype=torch.float32)
    return (restored + 1) / 2, (target + 1) / 2, noise, timesteps


def value_and_gradient(loss_fn: Callable[..., Tensor], images: Batch, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    restored, target, noise, timesteps = images
    leaf = (restored * scale).requires_grad_()
    loss = loss_fn(leaf, target * scale, noise=noise, timesteps=timesteps)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), gradient


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_criterion_is_the_loss_weighted_and_reduced(bundle: Path, images: Batch, reduction: Reduction) -> None:
    criterion = DiffLossCriterion(bundle, loss_weight=3.0, reduction=reduction, naturalness_weight=0.1, device="cpu")
    plain = DiffLoss.load(bundle, naturalness_weight=0.1, device="cpu", reduction="none")
    (found, gradient), (each, of_each) = (value_and_gradient(loss_fn, images) for loss_fn in (criterion, plain))
    expected = {"none": each, "mean": each.mean(), "sum": each.sum()}[reduction]
    share = 1 / len(each) if reduction == "mean" else 1.0
    torch.testing.assert_close(found, 3 * expected)
    torch.testing.assert_close(gradient, 3 * share * of_each)
    assert gradient.norm() > 0


def test_data_range_is_the_images_own(bundle: Path, images: Batch) -> None:
    small, large = (DiffLossCriterion(bundle, data_range=each, device="cpu") for each in (1.0, 255.0))
    value, gradient = value_and_gradient(small, images)
    of_bytes, gradient_of_bytes = value_and_gradient(large, images, scale=255.0)
    torch.testing.assert_close(of_bytes, value, rtol=1e-4, atol=0)
    torch.testing.assert_close(gradient_of_bytes * 255, gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()))
    with pytest.raises(InputError, match="value_range"):
        value_and_gradient(small, images, scale=255.0)


def test_ground_truth_with_a_gradient_is_detached(bundle: Path, images: Batch) -> None:
    restored, target, *_ = images
    leaf, truth = restored.requires_grad_(), target.requires_grad_()
    DiffLossCriterion(bundle, device="cpu")(leaf, truth).backward()
    assert leaf.grad is not None
    assert truth.grad is None


@pytest.mark.parametrize("loss_weight", [1.0, 0.0])
def test_images_that_are_swapped(bundle: Path, images: Batch, loss_weight: float) -> None:
    """Their loss is as large, so that without an error nothing would tell that the network gets no gradient."""
    restored, target, *_ = images
    leaf = restored.clamp(0, 1).requires_grad_()
    for criterion in (
        DiffLossCriterion(bundle, device="cpu", loss_weight=loss_weight),
        PerceptualDiffLoss(bundle, device="cpu", loss_weight=loss_weight),
    ):
        with pytest.raises(InputError, match="the loss has a gradient for its first argument alone"):
            criterion(target, leaf)
        with torch.no_grad():
            criterion(target, leaf)  # as in a validation


def test_attributes_that_such_packages_have(bundle: Path) -> None:
    criterion = DiffLossCriterion(bundle, device="cpu")
    assert (criterion.lower_better, criterion.metric_mode) == (True, "FR")
    assert (criterion.reduction, criterion.loss_weight) == ("mean", 1.0)
    assert not list(criterion.parameters())
    assert not criterion.state_dict()


def test_wrong_options_are_refused_when_the_loss_is_made(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="reduction is 'max'; expected 'none', 'mean' or 'sum'"):
        DiffLossCriterion(bundle, reduction="max")  # type: ignore[arg-type]
    with pytest.raises(BundleError, match="does not exist"):
        PerceptualDiffLoss(tmp_path / "none")
    # YAML 1.1 takes 1e-3, without a point, for a text.
    with pytest.raises(InputTypeError, match="naturalness_weight is '1e-3', a str; expected a number"):
        PerceptualDiffLoss(bundle, **yaml.safe_load("naturalness_weight: 1e-3"))
    with pytest.raises(InputTypeError, match="loss_weight is '1e-2', a str; expected a number"):
        PerceptualDiffLoss(bundle, **yaml.safe_load("loss_weight: 1e-2"))
    with pytest.raises(InputError, match=r"loss_weight is -1\.0; expected a finite number >= 0"):
        DiffLossCriterion(bundle, loss_weight=-1.0)
    with pytest.raises(InputTypeError, match=r"data_range is \(0, 1\), a tuple; expected a number"):
        DiffLossCriterion(bundle, data_range=(0, 1))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="data_range is 0; expected the value of white"):
        DiffLossCriterion(bundle, data_range=0)
    with pytest.raises(InputError, match="both data_range and value_range are given"):
        DiffLossCriterion(bundle, value_range=(-1, 1), data_range=2.0)
    for kind in (DiffLossCriterion, PerceptualDiffLoss):
        with pytest.raises(InputTypeError, match="unknown option 'weight'; expected one of ") as caught:
            kind(bundle, weight=1)
        named = str(caught.value).partition("expected one of ")[2].split(", ")
        assert named[:5] == ["bundle", "loss_weight", "reduction", "data_range", "value_range"]
        assert set(named) == {*inspect.signature(DiffLoss.load).parameters, "loss_weight", "data_range"}
        assert len(set(named)) == len(named)


def test_images_around_zero(bundle: Path, images: Batch) -> None:
    restored, target, noise, timesteps = images
    draws = {"noise": noise, "timesteps": timesteps}
    around_zero = DiffLossCriterion(bundle, device="cpu", value_range=(-1.0, 1.0))(
        2 * restored - 1, 2 * target - 1, **draws
    )
    assert torch.allclose(around_zero, DiffLossCriterion(bundle, device="cpu")(restored, target, **draws), rtol=1e-3)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_weight_of_zero_computes_nothing(bundle: Path, images: Batch, reduction: Any) -> None:
    criterion = DiffLossCriterion(bundle, device="cpu", loss_weight=0, reduction=reduction)
    leaf = images[0].requires_grad_()
    loss = criterion(leaf, images[1])
    assert loss.shape == (() if reduction == "mean" else (len(leaf),))
    assert not loss.any()
    loss.sum().backward()
    assert leaf.grad is not None
    assert not leaf.grad.any()
    assert criterion.loss_fn.calls == 0


def test_settings_are_checked_when_they_are_assigned(bundle: Path) -> None:
    criterion = DiffLossCriterion(bundle, device="cpu")
    criterion.loss_weight, criterion.reduction = 2, "sum"
    with pytest.raises(InputError, match="loss_weight is nan"):
        criterion.loss_weight = float("nan")
    with pytest.raises(InputError, match="reduction is 'average'"):
        criterion.reduction = "average"  # type: ignore[assignment]
    assert (criterion.loss_weight, criterion.reduction) == (2.0, "sum")


class Registry:
    """The interface of BasicSR 1.4.2's registries: a stand-in, since `import basicsr` fails beside today's torchvision.

    tests/examples/test_train_basicsr.py runs the package itself where it can be imported.
    """

    def __init__(self) -> None:
        self.entries: dict[str, Any] = {}

    def register(self, entry: Any = None, suffix: str | None = None) -> Any:
        def add(entry: Any) -> Any:
            self.entries[entry.__name__ if suffix is None else f"{entry.__name__}_{suffix}"] = entry
            return entry

        return add if entry is None else add(entry)

    def get(self, name: str) -> Any:
        return self.entries[name]


OPTIONS = """
type: {name}
bundle: {bundle}
loss_weight: 2
naturalness_weight: !!float 1e-1
semantic_weight: 0.001
device: cpu
"""


@pytest.mark.parametrize("as_decorator", [True, False])
def test_perceptual_loss_of_a_registry(bundle: Path, images: Batch, as_decorator: bool) -> None:
    registry = Registry()
    if as_decorator:

        @registry.register()
        class Renamed(PerceptualDiffLoss):
            pass

    else:
        registry.register(PerceptualDiffLoss)
    (name,) = registry.entries
    options = yaml.safe_load(OPTIONS.format(name=name, bundle=bundle))
    # What BasicSR's `build_loss` does, and after it the constructor of a model.
    given = copy.deepcopy(options)
    loss_fn: nn.Module = registry.get(given.pop("type"))(**given).to(torch.device("cpu"))
    restored, target, *_ = images
    torch.manual_seed(0)
    leaf = restored.clone().requires_grad_()
    perceptual, style = loss_fn(leaf, target)
    assert style is None
    perceptual.backward()
    torch.manual_seed(0)
    expected = restored.clone().requires_grad_()
    loss = 2 * DiffLoss.load(bundle, device="cpu", naturalness_weight=0.1, semantic_weight=1e-3)(expected, target)
    loss.backward()
    torch.testing.assert_close(perceptual, loss)
    torch.testing.assert_close(leaf.grad, expected.grad)
