"""The study's measures and losses are what they say, a training of it runs, and its page says what was measured."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plain import PlainLoss, RoundedToHalf
from report import differences
from study import NOISE, NONE, RESULT, ROOT, WEIGHTS, Run, choose, make_loss, settings, settings_runs, train
from study_page import PAGE, make_report
from torch import Tensor

from diffloss_export.models import load_model
from diffloss_trt import DiffLoss
from diffloss_trt.unet import TappedUNet
from measures import detail, gmsd, quality
from photographs import VALIDATION, load


@pytest.fixture(scope="module")
def folder(builtin_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a work folder with the prior in fp32."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "bundle-fp32").symlink_to(builtin_bundle)
    return folder


def blurred(image: Tensor) -> Tensor:
    return F.avg_pool2d(image[None], 3, stride=1, padding=1, count_include_pad=False)[0]


def test_measures_of_an_image_itself() -> None:
    image = load("coffee")[:, :64, :96]
    assert gmsd(image, image) == detail(image, image) == 0
    nearly = quality(image + 1e-6, image)
    assert nearly["psnr"] > 100
    assert nearly["ssim"] == pytest.approx(1)


def test_measures_tell_blur_from_noise() -> None:
    image = load("coffee")[:, :128, :128]
    noisy = image + 0.05 * torch.randn_like(image)
    assert detail(blurred(image), image) < -3
    assert detail(noisy, image) > 3
    assert 0 < gmsd(blurred(image), image) < gmsd(blurred(blurred(blurred(image))), image)
    assert gmsd(noisy, image) > 0


def test_detail_is_that_of_the_finer_half() -> None:
    place = torch.arange(64.0)
    coarse, fine = (0.5 + 0.2 * torch.sin(2 * torch.pi * rate * place).expand(3, 64, 64) for rate in (4 / 64, 24 / 64))
    # In dB: three times the amplitude, and a coarse wave that counts nothing.
    assert detail(3 * (fine - 0.5) + coarse, fine + coarse) == pytest.approx(
        20 * torch.log10(torch.tensor(3.0)).item(), abs=0.01
    )


def test_rounded_to_half_is_what_half_precision_computes() -> None:
    image, kernel = torch.randn(1, 4, 8, 8), (0.1 * torch.randn(4, 4, 3, 3)).half().float()
    image = image.half().float()
    with RoundedToHalf():  # type: ignore[no-untyped-call]
        rounded = F.conv2d(image, kernel) * 3
    exact = F.conv2d(image.half().double(), kernel.double())
    assert torch.equal(rounded, rounded.half().float())
    # Rounded twice, after either operation.
    assert torch.equal(rounded, (exact.half().float() * 3).half().float())
    assert not torch.equal(rounded, (exact.float() * 3).half().float())


def test_rounded_to_half_in_the_backward_pass() -> None:
    x = torch.tensor([1.0], requires_grad=True)
    with RoundedToHalf():  # type: ignore[no-untyped-call]
        (gradient,) = torch.autograd.grad(x * 1e-8, x)
    assert gradient == 0


@pytest.mark.parametrize(
    ("precision", "least", "most"), [("fp32", 0, 5e-3), ("bf16 autocast", 0.05, 3), ("fp16", 0.01, 1)]
)
def test_plain_losses_are_the_loss_and_lose_its_digits(precision: str, least: float, most: float) -> None:
    """At 35 dB: the value and gradient that the package gives in fp32, but for rounding, which is seen."""
    model = load_model("builtin")
    exact = DiffLoss.from_unet(
        copy.deepcopy(model.unet).double(), model.schedule, naturalness_weight=0.1, semantic_weight=1e-3
    )
    plain = PlainLoss(TappedUNet(model.unet, model.schedule), precision, WEIGHTS)
    target = load("coffee")[None, :, 100:164, 200:264]
    restored = (target + 10 ** (-35 / 20) * torch.randn_like(target)).requires_grad_()
    noise, timesteps = torch.randn_like(target), torch.tensor([300])
    value = plain(restored, target, timesteps, noise)
    (found,) = torch.autograd.grad(2 * value, restored)
    leaf = restored.detach().double().requires_grad_()
    expected = exact(leaf, target.double(), timesteps=timesteps, noise=noise.double())
    (gradient,) = torch.autograd.grad(2 * expected, leaf)
    error = float((found - gradient).norm() / gradient.norm())
    assert least <= error <= most
    assert value.item() == pytest.approx(expected.item(), rel=0.5)


# Four minutes on a slow machine, alone.
SLOW = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.mark.parametrize(
    "run",
    [
        pytest.param(Run("haze", 0, *WEIGHTS, steps=2), marks=SLOW),
        pytest.param(Run(NOISE, 1, *WEIGHTS, form="bf16 autocast", steps=2), marks=SLOW),
    ],
)
def test_a_training_is_recorded_and_repeats_itself(folder: Path, run: Run) -> None:
    result = train(run, folder)
    assert result["share"][0] > 0
    assert ("gradient_error" in result) == ("curve" in result) == (run.task == NOISE)
    assert (folder / f"{run.name}.png").exists() == (run.seed == 0)
    again = train(run, folder)
    del result["seconds"], again["seconds"]
    assert again == result
    assert json.loads(json.dumps(result)) == result


def test_without_diffloss_there_is_none(folder: Path) -> None:
    assert make_loss(Run(NOISE, 0, form=NONE), folder) is None


def test_the_setting_with_the_lowest_gmsd_is_chosen() -> None:
    results: list[dict[str, Any]] = []
    for place, setting in enumerate(settings()):
        for run in settings_runs([setting], [0]):
            gmsd = {"rain": 0.1, "haze": 0.3}.get(run.task, 0.2) + 0.01 * abs(place - 2)
            results.append({"name": run.name, "quality": {name: {"gmsd": gmsd} for name in VALIDATION}})
    assert choose(results) == settings()[2]


def test_the_page_and_its_pictures_are_in_step() -> None:
    content = json.loads(RESULT.read_text())
    report = make_report(content)
    assert differences(report, PAGE, ROOT) == []
    content["runs"][0]["quality"]["coffee"]["psnr"] += 1
    assert differences(make_report(content), PAGE, ROOT) != []
