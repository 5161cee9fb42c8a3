"""Everything that a trainer can pass in wrongly: what is raised, and what it says."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffloss_engine.errors import DiffLossError, InputError, InputTypeError, ModelError
from diffloss_trt import DiffLoss, NoiseSchedule
from diffloss_trt.inputs import LEAST_WEIGHT
from unets import make_unet

Batch = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(scope="module")
def loss(scheduler: Any) -> DiffLoss:
    """A loss that takes images in [0, 1], multiples of 8 in height and width."""
    return DiffLoss.from_unet(make_unet("four_levels", dtype=torch.float32), scheduler)


def image(*shape: int) -> Tensor:
    return torch.rand(shape or (2, 3, 16, 16))


def with_value(value: float) -> Tensor:
    altered = image()
    altered[1, 2, 3, 4] = value
    return altered


IMAGES: list[tuple[type[DiffLossError], Any, Any, str]] = [
    (InputError, image(3, 16, 16), image(3, 16, 16), r"restored has shape \[3, 16, 16\]; expected four axes"),
    (InputError, image(2, 1, 16, 16), image(), r"restored has shape \[2, 1, 16, 16\]; expected \[2, 3, 16, 16\]"),
    (InputError, image(2, 16, 16, 3), image(2, 16, 16, 3), r"restored is 16x3; .*multiples of 8"),
    (InputError, image(2, 3, 20, 16), image(2, 3, 20, 16), r"restored is 20x16; .*multiples of 8"),
    (InputError, image(2, 3, 0, 16), image(2, 3, 0, 16), r"restored is 0x16"),
    (InputError, image(0, 3, 16, 16), image(0, 3, 16, 16), r"restored has shape \[0, 3, 16, 16\]; .*at least one"),
    (InputError, image(), image(1, 3, 16, 16), r"target has shape \[1, 3, 16, 16\]; expected \[2, 3, 16, 16\]"),
    (InputError, image(), image(2, 3, 16, 24), r"target has shape \[2, 3, 16, 24\]; expected \[2, 3, 16, 16\]"),
    (InputError, image(), image()[0], r"target has shape \[3, 16, 16\]; expected \[2, 3, 16, 16\]"),
    (InputTypeError, image().byte(), image(), r"restored has dtype torch\.uint8; expected a floating-point"),
    (InputTypeError, image(), (255 * image()).byte(), r"target has dtype torch\.uint8; expected a floating-point"),
    (InputTypeError, image().to(torch.complex64), image(), r"restored has dtype torch\.complex64"),
    (InputTypeError, image().to(torch.float8_e4m3fn), image(), r"restored has dtype torch\.float8_e4m3fn; expected"),
    (InputTypeError, image().to_sparse(), image(), r"restored is a sparse or nested tensor; expected a dense one"),
    (InputTypeError, image(), image().to_sparse(), r"target is a sparse or nested tensor; expected a dense one"),
    (InputTypeError, image().numpy(), image(), r"restored is a ndarray; expected a torch\.Tensor"),
    (InputTypeError, [0.5], image(), r"restored is a list; expected a torch\.Tensor"),
    (InputTypeError, image(), None, r"target is a NoneType; expected a torch\.Tensor"),
    (InputTypeError, image().to("meta"), image(), r"restored is on meta; expected cpu, where the loss is"),
    (InputTypeError, image(), image().to("meta"), r"target is on meta; expected cpu, where the loss is"),
    (InputError, with_value(math.nan), image(), "restored holds NaN or infinite values"),
    (InputError, with_value(-math.inf), image(), "restored holds NaN or infinite values"),
    (InputError, image(), with_value(math.nan), "target holds NaN or infinite values"),
    (InputError, image(), with_value(math.inf), "target holds NaN or infinite values"),
    (InputError, image(), 255 * image(), r"target has values from .* to 25.*; expected about 0 to 1 \(value_range"),
    (InputError, image(), 2 * image() - 1, r"target has values from -0\.9.* to .*; expected about 0 to 1"),
    (InputError, 255 * image(), image(), r"restored has values from .* to 25.*; expected about 0 to 1"),
    (InputError, image(), image().requires_grad_(), r"target requires grad; .*target\.detach\(\)"),
]


@pytest.mark.parametrize(("error", "restored", "target", "message"), IMAGES)
def test_bad_images(loss: DiffLoss, error: type[DiffLossError], restored: Any, target: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        loss(restored, target)


@pytest.mark.parametrize("weights", [(0.0, 0.0), (0.0, 1.0)])
def test_weights_of_zero_do_not_switch_checks_off(scheduler: Any, weights: tuple[float, float]) -> None:
    loss = DiffLoss.from_unet(make_unet(), scheduler, naturalness_weight=weights[0], semantic_weight=weights[1])
    with pytest.raises(InputError, match="target holds NaN"):
        loss(image(), with_value(math.nan))


def test_range_leaves_room_for_networks_and_resampling(loss: DiffLoss) -> None:
    restored = image() * 20 - 5  # a network that was just initialised
    assert loss(restored, with_value(1.09)).isfinite()
    with pytest.raises(InputError, match=r"target has values .*to 1\.11"):
        loss(restored, with_value(1.11))


@pytest.mark.parametrize(
    ("error", "timesteps", "message"),
    [
        (InputError, torch.tensor([0, 1000]), r"timesteps has values from 0 to 1000; expected 0 to 999"),
        (InputError, torch.tensor([-1, 10]), r"timesteps has values from -1 to 10; expected 0 to 999"),
        (InputError, torch.tensor([1]), r"timesteps has shape \[1\]; expected \[2\]"),
        (InputError, torch.tensor([1, 2, 3]), r"timesteps has shape \[3\]; expected \[2\]"),
        (InputError, torch.tensor(5), r"timesteps has shape \[\]; expected \[2\]"),
        (InputError, torch.tensor([[1], [2]]), r"timesteps has shape \[2, 1\]; expected \[2\]"),
        (InputTypeError, torch.tensor([1.0, 2.0]), r"timesteps has dtype torch\.float32; expected an integer"),
        (InputTypeError, torch.tensor([True, False]), r"timesteps has dtype torch\.bool; expected an integer"),
        (InputTypeError, 5, r"timesteps is a int; expected an integer torch\.Tensor \[2\]"),
        (InputTypeError, [1, 2], r"timesteps is a list"),
        (InputTypeError, torch.tensor([1, 2], device="meta"), r"timesteps is on meta; expected cpu"),
    ],
)
def test_bad_timesteps(loss: DiffLoss, error: type[DiffLossError], timesteps: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        loss(image(), image(), timesteps=timesteps)


@pytest.mark.parametrize(
    ("error", "noise", "message"),
    [
        (InputError, torch.randn(1, 3, 16, 16), r"noise has shape \[1, 3, 16, 16\]; expected \[2, 3, 16, 16\]"),
        (InputError, torch.randn(2, 3, 8, 8), r"noise has shape \[2, 3, 8, 8\]; expected \[2, 3, 16, 16\]"),
        (InputTypeError, torch.ones(2, 3, 16, 16, dtype=torch.int64), r"noise has dtype torch\.int64"),
        (InputTypeError, torch.ones(2, 3, 16, 16, device="meta"), r"noise is on meta; expected cpu"),
        (InputTypeError, 0.5, r"noise is a float"),
        (InputError, torch.randn(2, 3, 16, 16).requires_grad_(), r"noise requires grad"),
    ],
)
def test_bad_noise(loss: DiffLoss, error: type[DiffLossError], noise: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        loss(image(), image(), noise=noise)


SETTINGS: list[tuple[type[DiffLossError], dict[str, Any], str]] = [
    (InputError, {"naturalness_weight": -1.0}, r"naturalness_weight is -1\.0; expected a finite number >= 0"),
    (InputError, {"semantic_weight": math.nan}, r"semantic_weight is nan; expected a finite number >= 0"),
    (InputError, {"semantic_weight": math.inf}, r"semantic_weight is inf; expected a finite number >= 0"),
    (InputError, {"semantic_weight": 1e39}, r"semantic_weight is 1e\+39; expected .* that fits in float32"),
    (InputTypeError, {"naturalness_weight": True}, r"naturalness_weight is True, a bool; expected a number"),
    (InputTypeError, {"semantic_weight": "1e-6"}, r"semantic_weight is '1e-6', a str; expected a number"),
    (InputTypeError, {"semantic_weight": None}, r"semantic_weight is None, a NoneType; expected a number"),
    (InputError, {"semantic_weight": 10**400}, r"semantic_weight is 10+; expected a finite number"),
    (InputTypeError, {"seed": 1.0}, r"seed is a float; expected an integer, or None"),
    (InputTypeError, {"seed": True}, r"seed is a bool; expected an integer, or None"),
    (InputError, {"seed": -1}, r"seed is -1; expected 0 to 2\*\*63 - 1"),
    (InputError, {"seed": 2**63}, r"seed is 9\d*; expected 0 to"),
    (InputError, {"reduction": "sum"}, r"reduction is 'sum'; expected 'mean' or 'none'"),
    (InputError, {"reduction": None}, r"reduction is None; expected 'mean' or 'none'"),
    (InputError, {"value_range": (1.0, 0.0)}, r"value_range is \(1\.0, 0\.0\); expected finite bounds with low < high"),
    (InputError, {"value_range": (0, 0)}, r"low < high"),
    (InputError, {"value_range": (-math.inf, 1)}, r"expected finite bounds"),
    (InputError, {"value_range": (math.nan, 1)}, r"expected finite bounds"),
    (InputError, {"nonfinite": "ignore"}, r"nonfinite is 'ignore'; expected 'error' or 'skip'"),
    (InputTypeError, {"value_range": 255}, r"value_range is 255; expected \(low, high\)"),
    (InputTypeError, {"value_range": (0, 1, 2)}, r"value_range is \(0, 1, 2\); expected \(low, high\)"),
    (InputTypeError, {"value_range": "01"}, r"value_range is '01'; expected \(low, high\)"),
    (InputTypeError, {"value_range": (0, None)}, r"a bound of value_range is None, a NoneType; expected a number"),
    (InputTypeError, {"value_range": ("a", "b")}, r"a bound of value_range is 'a', a str; expected a number"),
    (InputTypeError, {"value_range": (False, True)}, r"a bound of value_range is False, a bool"),
    (InputError, {"value_range": (-1.7e308, 1.7e308)}, r"expected finite bounds"),
]


@pytest.mark.parametrize(("error", "settings", "message"), SETTINGS)
def test_bad_settings(scheduler: Any, error: type[DiffLossError], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(error, match=message):
        DiffLoss.from_unet(make_unet(), scheduler, **settings)
    # Settings are looked at first: a run that is told wrongly does not read gigabytes before it says so.
    with pytest.raises(error, match=message):
        DiffLoss.load("no such bundle", **settings)


@pytest.mark.parametrize(("error", "settings", "message"), [case for case in SETTINGS if "seed" not in case[1]])
def test_settings_are_checked_when_they_are_assigned(
    loss: DiffLoss, error: type[DiffLossError], settings: dict[str, Any], message: str
) -> None:
    before = repr(loss)
    ((name, value),) = settings.items()
    with pytest.raises(error, match=message):
        setattr(loss, name, value)
    assert repr(loss) == before


def test_check_every_is_checked_when_it_is_assigned(loss: DiffLoss, exported: tuple[Path, Any, NoiseSchedule]) -> None:
    with pytest.raises(InputError, match="check_every needs a bundle and backward='fused'"):
        loss.check_every = 1
    loaded = DiffLoss.load(exported[0], "onnxruntime", "cpu")
    with pytest.raises(InputError, match="check_every is 0; expected 1 to"):
        loaded.check_every = 0
    loaded.check_every = 2
    loaded.check_every = None


def test_settings_that_are_assigned_are_kept_by_copies(scheduler: Any) -> None:
    loss = DiffLoss.from_unet(make_unet(), scheduler)
    loss.value_range = [0, 255]  # type: ignore[assignment]
    loss.naturalness_weight = 1
    for same in (loss, copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert (same.value_range, same.naturalness_weight) == ((0.0, 255.0), 1.0)
        with pytest.raises(InputError, match="reduction is 'sum'"):
            same.reduction = "sum"


def test_numbers_may_be_numpys(scheduler: Any) -> None:
    settings: dict[str, Any] = {
        "naturalness_weight": np.float32(0.5),
        "semantic_weight": np.int64(2),
        "value_range": (np.float64(0), np.uint8(255)),
        "seed": np.int64(7),
    }
    loss = DiffLoss.from_unet(make_unet(), scheduler, **settings)
    assert (loss.weights, loss.value_range) == ((0.5, 2.0), (0.0, 255.0))
    assert loss.draws is not None
    assert loss.draws.seed == 7
    for value in (*loss.weights, *loss.value_range, loss.draws.seed):
        assert type(value) in (int, float)
    with pytest.raises(InputTypeError, match=r"naturalness_weight is np\.True_, a bool"):
        loss.naturalness_weight = np.bool_(True)  # type: ignore[assignment]


def test_a_path_or_a_unet_is_no_evaluator(scheduler: Any) -> None:
    evaluators: list[tuple[Any, str]] = [("bundle", "str"), (Path("bundle"), "PosixPath"), (make_unet(), "UNet2DModel")]
    for evaluator, name in evaluators:
        with pytest.raises(InputTypeError, match=f"evaluator is a {name}; make a loss with DiffLoss.load"):
            DiffLoss(evaluator)


def test_images_that_a_bundle_does_not_take(exported: tuple[Path, Any, NoiseSchedule]) -> None:
    loss = DiffLoss.load(exported[0], "onnxruntime", "cpu")
    size = r"restored has shape \[2, 3, 24, 16\]; expected \[2, 3, 16, 16\], the bundle's size: crop .*--resolution$"
    with pytest.raises(InputError, match=size):
        loss(image(2, 3, 24, 16), image(2, 3, 24, 16))
    grey = r"expected \[2, 3, 16, 16\]: this UNet takes 3 channels; export a UNet that takes 1, or convert the images$"
    with pytest.raises(InputError, match=grey):
        loss(image(2, 1, 16, 16), image(2, 1, 16, 16))
    with pytest.raises(InputError, match=r"last axis looks like the channels; permute\(0, 3, 1, 2\)"):
        loss(image(2, 16, 16, 3), image(2, 16, 16, 3))
    with pytest.raises(InputError, match=r"target has shape \[2, 3, 24, 16\]; expected \[2, 3, 16, 16\]$"):
        loss(image(), image(2, 3, 24, 16))


def test_images_in_another_range_are_warned_of_once(scheduler: Any, caplog: pytest.LogCaptureFixture) -> None:
    """As those in [0, 1] are in [0, 255]; the loss of such a pair is near nothing, and looks like a success."""
    loss = DiffLoss.from_unet(make_unet(dtype=torch.float32), scheduler, value_range=(0, 255))
    full = 255 * image()
    for restored, target in ((full, full), (image(), full), (full, image())):
        loss(restored, target)
    assert not caplog.records
    for _ in range(3):
        loss((image() / 2).half().index_fill(3, torch.tensor([0, 1]), 0.75), image().round())
    assert [record.getMessage().partition(" to ")[2] for record in caplog.records] == [
        "0.75, and target from 0 to 1: is value_range=(0.0, 255.0) the range of these images?"
    ]


def test_bad_models(scheduler: Any) -> None:
    with pytest.raises(ModelError, match="class-conditional"):
        DiffLoss.from_unet(make_unet(num_class_embeds=4), scheduler)
    with pytest.raises(ModelError, match="has no alphas_cumprod"):
        DiffLoss.from_unet(make_unet(), object())


def test_a_weight_that_is_halved_for_ever_never_leaves_its_term_out(scheduler: Any) -> None:
    loss = DiffLoss.from_unet(make_unet(), scheduler, naturalness_weight=1.0)
    for _ in range(200):
        loss.naturalness_weight /= 2
    assert loss.naturalness_weight == LEAST_WEIGHT
