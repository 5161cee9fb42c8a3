"""NaN and infinity in the middle of a training: from the network or from the engine, as an error or skipped."""

from __future__ import annotations

import copy
import logging
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from diffloss_engine.errors import BackendError, InputError
from diffloss_export.models import LoadedModel
from diffloss_export.pipeline import export_bundle
from diffloss_trt import DiffLoss, NoiseSchedule
from diffloss_trt.inputs import Nonfinite
from diffloss_trt.nonfinite import nonfinite_results
from diffloss_trt.objective import Terms
from exports import make_schedule, shared_evaluator
from ranks import train_in_two_processes
from unets import make_unet

Exported = tuple[Path, Any, NoiseSchedule]
MakeLoss = Callable[..., DiffLoss]
# In the schedule, but not among the timesteps of any check.
OVERFLOWS = 250


class Normalising(nn.Module):
    """A restoration network that divides each image by its mean, which for a black one is 0 / 0."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 3, 3, padding=1))

    def forward(self, degraded: Tensor) -> Tensor:
        restored: Tensor = degraded + 0.1 * self.layers(degraded / degraded.mean((1, 2, 3), keepdim=True))
        return restored


def batch(number: int, count: int = 3, black: bool = False) -> tuple[Tensor, Tensor]:
    """Return degraded and target images in [0, 1]; if `black`, the second is."""
    generator = torch.Generator().manual_seed(number)
    target = torch.rand(count, 3, 16, 16, generator=generator)
    degraded = target * 0.7
    if black:
        degraded[1] = 0
    return degraded, target


def draws(number: int, timestep: int = 100, count: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(number)
    return {
        "noise": torch.randn(count, 3, 16, 16, generator=generator),
        "timesteps": torch.tensor([5, timestep, 900])[:count],
    }


class Training:
    """A network, its loss, Adam and a GradScaler; a step changes the weights or does not."""

    def __init__(self, loss: DiffLoss, *, keep_scale: float | None = None, **scaler: Any) -> None:
        self.network = Normalising()
        self.loss = loss
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=1e-2)
        self.scaler = torch.amp.GradScaler("cpu", **scaler)
        self.keep_scale = keep_scale
        self.call: Callable[..., Tensor] = loss

    @property
    def weights(self) -> Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in self.network.parameters()])

    def step(self, number: int, *, black: bool = False, timestep: int = 100) -> Tensor:
        degraded, target = batch(number, black=black)
        restored = self.network(degraded)
        total = F.mse_loss(restored, target) + self.call(restored, target, **draws(number, timestep))
        self.optimizer.zero_grad()
        self.scaler.scale(total).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update(self.keep_scale)
        return total.detach()


@pytest.fixture(params=["fused", "recompute", "reference"])
def make_loss(request: pytest.FixtureRequest, exported: Exported) -> MakeLoss:
    folder, _, schedule = exported

    def make_loss(**settings: Any) -> DiffLoss:
        if request.param == "reference":
            unet = make_unet("one_level", dtype=torch.float32)
            return DiffLoss.from_unet(unet, schedule, **settings)
        return DiffLoss(shared_evaluator(folder, backward=request.param), **settings)

    return make_loss


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A bundle in fp16 that overflows at one timestep, whose embedding is too large by far, and the UNet in fp32."""
    # With a middle: of fewer blocks none overflows.
    layout: dict[str, Any] = {"mid_block_type": "UNetMidBlock2D", "resnet_time_scale_shift": "scale_shift"}
    unet = make_unet("learned_time", dtype=torch.float32, **layout)
    unet.time_proj.weight[OVERFLOWS] *= 1e4
    unet.time_embedding.linear_2.weight *= 30
    folder = tmp_path_factory.mktemp("nonfinite") / "bundle"
    exported = LoadedModel(copy.deepcopy(unet), make_schedule(), "test", ())
    export_bundle(exported, folder, batch_size=2, precision="fp16")
    return folder, unet


def test_an_error_names_call_and_images(make_loss: MakeLoss) -> None:
    training = Training(make_loss())
    for number in range(2):
        training.step(number)
    before = training.weights
    said = r"^call 3 of this loss: restored holds NaN or infinite values in images \[1\] of a batch of 3$"
    with pytest.raises(InputError, match=said):
        training.step(2, black=True)
    assert torch.equal(training.weights, before)
    training.step(3)
    assert not torch.equal(training.weights, before)


@pytest.mark.parametrize(
    ("scaler", "factor"),
    [({}, 0.5), ({"init_scale": 1.0, "keep_scale": 1.0}, 1.0)],
    ids=["mixed precision", "fp32"],
)
def test_a_skipped_step_leaves_no_trace(
    make_loss: MakeLoss, scaler: dict[str, Any], factor: float, caplog: pytest.LogCaptureFixture
) -> None:
    """Afterwards the weights are, to the last bit, what they would be without it."""
    disturbed, undisturbed = (Training(make_loss(nonfinite="skip"), **scaler) for _ in range(2))
    for training in (disturbed, undisturbed):
        training.step(0)
    before = disturbed.weights
    caplog.clear()
    assert disturbed.step(9, black=True).isnan()
    assert torch.equal(disturbed.weights, before)
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
        "call 2 of this loss is skipped: restored holds NaN or infinite values in images [1] of a batch of 3"
    ]
    for training in (disturbed, undisturbed):
        training.step(1)
        training.step(2)
    assert not torch.equal(disturbed.weights, before)
    assert torch.equal(disturbed.weights, undisturbed.weights)
    assert disturbed.scaler.get_scale() == factor * undisturbed.scaler.get_scale()


def test_a_spike_far_out_of_range_is_skipped_too(make_loss: MakeLoss, caplog: pytest.LogCaptureFixture) -> None:
    """Before a network that diverges returns infinity, it returns what no image holds."""
    degraded, target = batch(0)
    spike = degraded.clone()
    spike[1, 0, 3, 3] = -3e4
    said = r"restored has values from -3e\+04 to .*; expected about 0 to 1 .*: value_range is wrong, or the network"
    with pytest.raises(InputError, match=f"^call 1 of this loss: {said} has diverged$"):
        make_loss()(spike, target)
    loss = make_loss(nonfinite="skip")
    leaf = spike.requires_grad_()
    value = loss(leaf, target)
    value.backward()
    assert value.isnan()
    assert leaf.grad is not None
    assert leaf.grad.isnan().all()
    (record,) = caplog.records
    assert re.match(f"call 1 of this loss is skipped: {said}", record.getMessage())
    with pytest.raises(InputError, match="target has values from -3e"):
        loss(degraded, spike.detach())
    assert loss(degraded, target).isfinite()


def test_without_a_scaler_the_weights_are_lost(exported: Exported) -> None:
    """Negative control: what a skipped call returns is not to be stepped with."""
    training = Training(DiffLoss.load(exported[0], "onnxruntime", "cpu", nonfinite="skip"), enabled=False)
    training.step(0, black=True)
    assert training.weights.isnan().any()


def test_the_engine_is_not_run_on_what_is_no_image(exported: Exported) -> None:
    loss = DiffLoss.load(exported[0], "onnxruntime", "cpu", nonfinite="skip", seed=1)
    loss.evaluator.session("gradient").close()  # type: ignore[attr-defined]
    degraded, target = batch(0)
    degraded[2, 0, 0, 0] = math.inf
    degraded.requires_grad_()
    terms = loss.terms(degraded, target)
    assert all(term.isnan().all() for term in terms)
    (gradient,) = torch.autograd.grad(terms.total.sum(), degraded)
    assert gradient.isnan().all()
    # It has drawn all the same: other ranks, which were not skipped, have.
    assert loss.draws is not None
    assert loss.draws.count == 1
    with pytest.raises(InputError, match=r"target holds NaN or infinite values in images \[0\]"):
        loss(target, target.index_fill(0, torch.tensor([0]), math.nan))
    with pytest.raises(BackendError, match="the session was closed"):
        loss(*batch(0))


def test_an_engine_that_overflows(overflowing: tuple[Path, Any], caplog: pytest.LogCaptureFixture) -> None:
    """For real: an activation beyond 65504 in a bundle in fp16, which passed every check, and finite images."""
    folder, unet = overflowing
    training = Training(DiffLoss.load(folder, "onnxruntime", "cpu"))
    training.step(0)
    before = training.weights
    said = (
        r"^call 2 of this loss: onnxruntime on cpu returned NaN or infinity for finite images: "
        r"total, naturalness, semantic, gradient in images \[1\] of a batch of 3; fp16 ends at 65504, so export"
    )
    with pytest.raises(BackendError, match=said):
        training.step(1, timestep=OVERFLOWS)
    assert torch.equal(training.weights, before)
    skipping = Training(DiffLoss.load(folder, "onnxruntime", "cpu", nonfinite="skip"))
    skipping.step(0)
    assert torch.equal(skipping.weights, before)
    caplog.clear()
    assert skipping.step(1, timestep=OVERFLOWS).isnan()
    assert torch.equal(skipping.weights, before)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["call 2 of this loss is skipped"]
    skipping.step(2)
    assert skipping.weights.isfinite().all()
    assert not torch.equal(skipping.weights, before)
    # In fp32 there is nothing wrong with the timestep.
    assert Training(DiffLoss.from_unet(unet, make_schedule())).step(1, timestep=OVERFLOWS).isfinite()


@pytest.mark.parametrize("nonfinite", ["error", "skip"])
def test_compiled_steps_do_the_same(
    nonfinite: Nonfinite, exported: Exported, overflowing: tuple[Path, Any], caplog: pytest.LogCaptureFixture
) -> None:
    torch.compiler.reset()
    for folder, bad, error in (
        (exported[0], {"black": True}, InputError),
        (overflowing[0], {"timestep": OVERFLOWS}, BackendError),
    ):
        training = Training(DiffLoss.load(folder, "onnxruntime", "cpu", nonfinite=nonfinite))
        training.call = torch.compile(training.loss, fullgraph=True, backend="aot_eager")
        training.step(0)
        before = training.weights
        if nonfinite == "error":
            with pytest.raises(error, match=r"^call 2 of this loss: .*NaN or infinit"):
                training.step(1, **bad)
        else:
            assert training.step(1, **bad).isnan()
        assert torch.equal(training.weights, before)
        training.step(2)
        assert training.weights.isfinite().all()
    assert sum("is skipped" in record.getMessage() for record in caplog.records) == (2 if nonfinite == "skip" else 0)
    torch.compiler.reset()


def test_noise_that_is_given(make_loss: MakeLoss) -> None:
    given: dict[str, Any] = draws(0)
    given["noise"][2, 1, 0, 0] = math.nan
    with pytest.raises(InputError, match=r"call 1 of this loss: noise holds NaN or infinite values in images \[2\] of"):
        make_loss()(*batch(0), **given)
    # Not of the training's making, as what is skipped is.
    with pytest.raises(InputError, match="call 1 of this loss: noise holds NaN or infinite values"):
        make_loss(nonfinite="skip")(*batch(0), **given)


def test_each_result_is_looked_at() -> None:
    terms, gradient = Terms(*torch.ones(3, 4)), torch.ones(4, 3, 8, 8)
    assert nonfinite_results(terms, gradient) == nonfinite_results(terms, None) == ""
    gradient[3, 2, 7, 0] = math.nan
    gradient[1, 0, 0, 7] = -math.inf
    assert nonfinite_results(terms, gradient) == "gradient in images [1, 3] of a batch of 4"
    terms.semantic[0] = math.inf
    assert nonfinite_results(terms, None) == "semantic in images [0] of a batch of 4"
    assert nonfinite_results(terms, gradient) == "semantic, gradient in images [0, 1, 3] of a batch of 4"


def train_as_rank(rank: int, folder: Path, bundle: Path) -> None:
    """Train in each of two processes, of which the second gets a black image; leave what became of it in a file."""
    loss = DiffLoss.load(bundle, "onnxruntime", "cpu", nonfinite="skip", seed=3)
    scaled = _train_with_scaler(rank, loss)
    by_hand = {judged: _train_by_hand(rank, loss, judged) for judged in ("loss", "gradient")}
    torch.save({"scaler": scaled, **by_hand}, folder / f"rank{rank}")


def _train_with_scaler(rank: int, loss: DiffLoss) -> dict[str, Any]:
    """Return the weights after each step, and how often the loss was called."""
    training = Training(loss)
    training.network = DistributedDataParallel(training.network)  # type: ignore[assignment]
    weights = [training.weights]
    for number in range(4):
        training.step(10 * number + rank, black=number == 2 and rank == 1)
        weights.append(training.weights)
    return {"weights": weights, "calls": loss.calls}


def _train_by_hand(rank: int, loss: DiffLoss, judged: str) -> dict[str, Any]:
    """Train without a scaler, leaving out a step if loss or gradient, as `judged` says, is not finite."""
    loss.seed = 3
    network = DistributedDataParallel(Normalising())
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    stepped = []
    for number in range(4):
        degraded, target = batch(10 * number + rank, black=number == 2 and rank == 1)
        restored = network(degraded)
        total = F.mse_loss(restored, target) + loss(restored, target)
        optimizer.zero_grad()
        total.backward()
        gradients = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
        stepped.append(bool({"loss": total, "gradient": gradients}[judged].isfinite().all()))
        if stepped[-1]:
            optimizer.step()
    weights = torch.cat([parameter.detach().flatten() for parameter in network.parameters()])
    return {"weights": weights, "stepped": stepped}


@pytest.fixture(scope="module")
def ranks(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    """What `train_as_rank` leaves, of each rank; starting the processes takes most of the time."""
    folder = tmp_path_factory.mktemp("ranks")
    train_in_two_processes(train_as_rank, folder, exported[0])
    return [torch.load(folder / f"rank{rank}") for rank in range(2)]


def test_all_ranks_skip_together(ranks: list[dict[str, dict[str, Any]]]) -> None:
    first, second = (rank["scaler"] for rank in ranks)
    assert all(torch.equal(*pair) for pair in zip(first["weights"], second["weights"], strict=True))
    changed = [not torch.equal(*pair) for pair in zip(first["weights"], first["weights"][1:], strict=False)]
    assert changed == [True, True, False, True]
    assert first["weights"][-1].isfinite().all()
    assert first["calls"] == second["calls"] == 4


def test_without_a_scaler_ranks_judge_by_the_gradient(ranks: list[dict[str, dict[str, Any]]]) -> None:
    """It is averaged, and so the same on all; the loss is NaN on one rank alone, the other steps, and both are lost."""
    first, second = (rank["gradient"] for rank in ranks)
    assert first["stepped"] == second["stepped"] == [True, True, False, True]
    assert torch.equal(first["weights"], second["weights"])
    assert first["weights"].isfinite().all()
    first, second = (rank["loss"] for rank in ranks)
    assert first["stepped"][2] is not second["stepped"][2]
    assert first["weights"].isnan().all()
    assert second["weights"].isnan().all()
