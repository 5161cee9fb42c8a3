"""What training for real does with a loss: several processes, mixed precision, checkpoints of both kinds, long runs."""

from __future__ import annotations

import copy
import io
import logging
import multiprocessing
import os
import pickle
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
import torch.multiprocessing
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

from diffloss_engine.errors import BackendError
from diffloss_trt import DiffLoss, NoiseSchedule
from ranks import train_in_two_processes

Exported = tuple[Path, Any, NoiseSchedule]
SETTINGS: dict[str, Any] = {"naturalness_weight": 1.0, "semantic_weight": 0.5, "value_range": (-1, 1)}
# Those of the paper's code, beside a pixel loss of weight 1.
PAPER: dict[str, Any] = {"naturalness_weight": 1e-3, "semantic_weight": 1e-6}


def load(folder: Path, device: str = "cpu", **settings: Any) -> DiffLoss:
    return DiffLoss.load(folder, "onnxruntime", device, **SETTINGS | settings)


def make_network() -> nn.Module:
    """Return a network whose weights and dropout follow from the global seed."""
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GELU(), nn.Dropout(0.1), nn.Conv2d(8, 3, 3, padding=1))


def images(number: int = 0, count: int = 4) -> tuple[Tensor, Tensor]:
    """Return degraded and target images of batch `number`, in [-1, 1], [count, 3, 16, 16]."""
    generator = torch.Generator().manual_seed(number)
    target = torch.rand(count, 3, 16, 16, generator=generator) * 2 - 1
    return target + 0.3 * torch.randn(target.shape, generator=generator), target


def gradients(network: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None]


def relative(found: list[Tensor], expected: list[Tensor]) -> float:
    """Return ||a - b|| / ||b|| of all tensors together."""
    assert len(found) == len(expected) > 0
    a, b = (torch.cat([tensor.flatten().double() for tensor in tensors]) for tensors in (found, expected))
    return float((a - b).norm() / b.norm())


class Step(nn.Module):
    """A network and its loss in one module, as some trainers hold them."""

    def __init__(self, network: nn.Module, loss: DiffLoss) -> None:
        super().__init__()
        self.network = network
        self.loss = loss

    def forward(self, degraded: Tensor, target: Tensor, **given: Any) -> Tensor:
        restored = self.network(degraded)
        return F.mse_loss(restored, target) + self.loss(restored, target, **given)


def train_as_rank(rank: int, folder: Path, bundle: Path, device: str) -> None:
    """Train one step in each of two processes; leave what was drawn, and the gradients, in a file."""
    torch.manual_seed(0)  # the same everywhere, as many trainers have it
    loss = load(bundle, device, seed=11)
    assert loss.device.index == (rank if device == "cuda" else None)
    network = make_network().eval().to(loss.device)
    degraded, target = (image.chunk(2)[rank].to(loss.device) for image in images())
    generator = copy.deepcopy(loss).draws.generator(loss.device)  # type: ignore[union-attr]
    drawn = {
        "timesteps": torch.randint(1000, (2,), generator=generator, device=loss.device),
        "noise": torch.randn(2, 3, 16, 16, generator=generator, device=loss.device),
    }
    # The gradients are compared with those of a CPU.
    torch.backends.cudnn.allow_tf32 = False
    # The loss beside what is wrapped, and inside of it.
    inside = Step(copy.deepcopy(network), load(bundle, device, seed=11))
    beside_it, around_it = DistributedDataParallel(network), DistributedDataParallel(inside)
    restored = beside_it(degraded)
    (F.mse_loss(restored, target) + loss(restored, target)).backward()
    around_it(degraded, target).backward()
    # The first rank's state resumes all of them.
    states = [loss.state_dict() if rank == 0 else None]
    torch.distributed.broadcast_object_list(states)
    resumed = load(bundle, device, seed=0)
    assert states[0] is not None
    resumed.load_state_dict(states[0])
    with torch.no_grad():
        assert torch.equal(resumed(degraded, target), loss(degraded, target))
    torch.save({"drawn": drawn, "gradients": [gradients(network), gradients(inside)]}, folder / f"rank{rank}")


@pytest.mark.parametrize(("backend", "device"), [("gloo", "cpu"), pytest.param("nccl", "cuda", marks=pytest.mark.gpu)])
def test_two_processes_average_their_gradients(backend: str, device: str, exported: Exported, tmp_path: Path) -> None:
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    train_in_two_processes(train_as_rank, tmp_path, exported[0], device, backend=backend)
    ranks = [torch.load(tmp_path / f"rank{rank}", map_location="cpu") for rank in range(2)]
    assert not torch.isclose(ranks[0]["drawn"]["noise"], ranks[1]["drawn"]["noise"]).any()
    torch.manual_seed(0)
    step = Step(make_network().eval(), load(exported[0]))
    of_ranks = []
    for rank in range(2):
        step.zero_grad()
        step(*(image.chunk(2)[rank] for image in images()), **ranks[rank]["drawn"]).backward()
        of_ranks.append(gradients(step))
    expected = [torch.stack(pair).mean(0) for pair in zip(*of_ranks, strict=True)]
    for found in (*ranks[0]["gradients"], *ranks[1]["gradients"]):
        assert relative(found, expected) < 1e-5
    assert relative(of_ranks[0], expected) > 1e-2


def load_compiled(rank: int, folder: Path, bundle: Path) -> None:
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("diffloss_engine").addHandler(handler)
    logging.getLogger("diffloss_engine").setLevel(logging.INFO)
    loss = DiffLoss.load(bundle, "inductor", "cpu")
    with torch.no_grad():
        assert loss(*(image / 2 + 0.5 for image in images())).isfinite()
    (folder / f"rank{rank}").write_text("\n".join(records))


@pytest.mark.slow
def test_two_processes_build_one_plan(exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFLOSS_CACHE", str(tmp_path / "plans"))
    torch.multiprocessing.spawn(load_compiled, (tmp_path, exported[0]), nprocs=2)
    said = "".join((tmp_path / f"rank{rank}").read_text() for rank in range(2))
    assert said.count("compiling a program with inductor") == 1
    assert said.count("another process is at work on the same plan") == 1
    assert len(list((tmp_path / "plans").glob("*.plan"))) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_around_network_and_loss(exported: Exported, dtype: torch.dtype) -> None:
    """Given the same restored images the loss is the same to the last bit: it leaves them no digits to lose."""
    loss, network = load(exported[0]), make_network()
    degraded, target = images()
    given: dict[str, Any] = {"noise": torch.randn(4, 3, 16, 16), "timesteps": torch.tensor([5, 100, 400, 999])}
    with torch.autocast("cpu", dtype):
        restored = network(degraded)
        assert restored.dtype == dtype
        total = loss(restored, target, **given)
        (gradient,) = torch.autograd.grad(total, restored)
    assert total.dtype == torch.float32
    leaf = restored.detach().float().requires_grad_()
    plain = loss(leaf, target, **given)
    assert torch.equal(total, plain)
    assert torch.equal(gradient, torch.autograd.grad(plain, leaf)[0].to(dtype))


def scaled_step(
    network: nn.Module, loss: DiffLoss, scaler: Any, dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """Do a step of SGD under autocast; return unscaled gradients and the change of the weights."""
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    degraded, target = images()
    before = [parameter.detach().clone() for parameter in network.parameters()]
    optimizer.zero_grad()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        # The loss alone, whose gradient is a millionth of the pixel loss's.
        total = loss(network(degraded), target)
    scaler.scale(total).backward()
    scaler.unscale_(optimizer)
    found = gradients(network)
    scaler.step(optimizer)
    scaler.update()
    return found, [after.detach() - old for after, old in zip(network.parameters(), before, strict=True)]


def test_grad_scaler_brings_small_gradients_through_half_precision(exported: Exported) -> None:
    """With the paper's weights they are below what fp16 can hold; the loss scales them in fp32, behind the upstream."""
    errors = {}
    for name, scaler, dtype in (
        ("expected", torch.amp.GradScaler("cpu", enabled=False), torch.float32),
        ("scaled", torch.amp.GradScaler("cpu", init_scale=2.0**16), torch.float16),
        ("unscaled", torch.amp.GradScaler("cpu", enabled=False), torch.float16),
    ):
        torch.manual_seed(0)
        network = make_network().eval()
        errors[name], _ = scaled_step(network, load(exported[0], **PAPER, seed=1), scaler, dtype)
    scaled, unscaled = (relative(errors[name], errors["expected"]) for name in ("scaled", "unscaled"))
    assert scaled < 2e-2
    assert unscaled > 50 * scaled, (scaled, unscaled)


def test_grad_scaler_skips_a_step(exported: Exported) -> None:
    """The scale is too large by far; the step is left out, and the next one is as good as any."""
    loss, network = load(exported[0], seed=1, naturalness_weight=1e6), make_network().eval()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-100)
    found, change = scaled_step(network, loss, scaler, torch.float32)
    assert not all(gradient.isfinite().all() for gradient in found)
    assert not any(part.any() for part in change)
    assert scaler.get_scale() == 2.0**27
    found, change = scaled_step(network, loss, scaler, torch.float32)
    assert all(gradient.isfinite().all() for gradient in found)
    assert relative(change, [-gradient for gradient in found]) < 1e-3
    # The step that was skipped has drawn like any other.
    assert loss.draws is not None
    assert loss.draws.count == 2


def test_gradients_accumulate_over_small_batches(exported: Exported) -> None:
    step = Step(make_network().eval(), load(exported[0]))
    given: dict[str, Any] = {"noise": torch.randn(4, 3, 16, 16), "timesteps": torch.tensor([5, 100, 400, 999])}
    step(*images(), **given).backward()
    whole = gradients(step)
    step.zero_grad()
    for part in range(4):
        small = {name: tensor[part : part + 1] for name, tensor in given.items()}
        (step(*(image[part : part + 1] for image in images()), **small) / 4).backward()
    assert relative(gradients(step), whole) < 1e-5


@pytest.mark.parametrize("seed", [None, 7])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(exported: Exported, seed: int | None, reentrant: bool) -> None:
    """Around the loss, around the network too, and around both together, in two batches before one backward pass."""
    torch.manual_seed(0)
    network = make_network()

    def run(*checkpointed: str) -> list[Tensor]:
        loss = load(exported[0], seed=seed)
        calls: dict[str, Callable[..., Tensor]] = {
            "network": network,
            "loss": lambda *pair: loss(*pair) * loss(*pair),
            "step": lambda *pair: calls["loss"](calls["network"](pair[0]), pair[1]),
        }
        for name in checkpointed:
            function = calls[name]
            calls[name] = lambda *inputs, f=function: checkpoint(f, *inputs, use_reentrant=reentrant)
        torch.manual_seed(1)
        network.zero_grad()
        leaves = [images(number)[0].requires_grad_() for number in range(2)]
        totals = [calls["step"](leaf, images(number)[1]) for number, leaf in enumerate(leaves)]
        torch.stack(totals).sum().backward()
        # The generators, too, are left as they would be.
        return [*(total.detach() for total in totals), *gradients(network), torch.rand(1), loss(*images()).detach()]

    expected = run()
    for checkpointed in (["loss"], ["network", "loss"], ["step"]):
        assert all(torch.equal(*pair) for pair in zip(run(*checkpointed), expected, strict=True)), checkpointed


def test_noise_that_cannot_be_drawn_again_is_noticed(exported: Exported) -> None:
    """By a loss with a seed; another one repeats the call with other noise, as PyTorch says of this option."""
    degraded, target = images()
    leaf = degraded.requires_grad_()

    def gradient(loss: DiffLoss, preserve: bool = True) -> Tensor:
        def step(image: Tensor) -> Tensor:
            return loss(image, target).square()

        torch.manual_seed(1)
        total: Tensor = checkpoint(step, leaf, use_reentrant=False, preserve_rng_state=preserve)
        return torch.autograd.grad(total, leaf)[0]

    loss, seeded = load(exported[0]), load(exported[0], seed=7)
    assert relative([gradient(loss, preserve=False)], [gradient(loss)]) > 0.1
    with pytest.raises(BackendError, match="the draw is not found: checkpoint with preserve_rng_state=True"):
        gradient(seeded, preserve=False)


def train(bundle: Path, steps: range, resume: bytes | None = None, seed: int = 5) -> bytes:
    """Train, from the start or from what a former call has returned; return all state there is."""
    torch.manual_seed(0)
    network = make_network()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    loss = load(bundle, seed=seed)
    parts: dict[str, Any] = {"network": network, "optimizer": optimizer, "loss": loss}
    if resume is not None:
        state = torch.load(io.BytesIO(resume), weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        torch.set_rng_state(state["global"])  # for the dropout
    for number in steps:
        degraded, target = images(number)
        restored = network(degraded)
        total = F.mse_loss(restored, target) + loss(restored, target)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    file = io.BytesIO()
    torch.save({name: part.state_dict() for name, part in parts.items()} | {"global": torch.get_rng_state()}, file)
    return file.getvalue()


def test_training_resumes_bit_for_bit(exported: Exported) -> None:
    def weights(state: bytes) -> list[Tensor]:
        return list(torch.load(io.BytesIO(state))["network"].values())

    whole = weights(train(exported[0], range(6)))
    half = train(exported[0], range(3))
    # The seed, too, is in the state: another one given by mistake does not matter.
    resumed = weights(train(exported[0], range(3, 6), half, seed=6))
    assert all(torch.equal(*pair) for pair in zip(resumed, whole, strict=True))
    state = torch.load(io.BytesIO(half))
    state["loss"]["draws._extra_state"][1] = 0
    file = io.BytesIO()
    torch.save(state, file)
    forgotten = weights(train(exported[0], range(3, 6), file.getvalue()))
    assert not any(torch.equal(*pair) for pair in zip(forgotten, whole, strict=True))


def test_copies_and_pickles_go_on_alike_and_apart(exported: Exported) -> None:
    loss = load(exported[0], seed=7)
    loss(*images())
    copies = [copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))]
    expected = [loss(*images()) for _ in range(2)]
    for copied in copies:
        assert torch.equal(copied(*images()), expected[0])
        assert torch.equal(copied(*images()), expected[1])


class Judged(Dataset[Tensor]):
    """Batches, each with its loss if it is asked for, as a curriculum would have it."""

    def __init__(self, loss: DiffLoss, called: bool) -> None:
        self.loss = loss
        self.called = called

    def __len__(self) -> int:
        return 4

    def __getitem__(self, number: int) -> Tensor:
        torch.manual_seed(number)
        with torch.no_grad():
            value = self.loss(*images(number)) if self.called else torch.zeros(())
        return torch.stack([value, torch.tensor(float(torch.get_num_threads()))])


@pytest.mark.parametrize(("method", "called"), [("fork", False), ("fork", True), ("spawn", True)])
# Python 3.12 and later warn of what is tested here.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_data_loader_workers(method: str, called: bool, exported: Exported) -> None:
    """A worker that holds a loss may call it, or not, and ends; beside it the training goes on."""
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"there is no {method} here")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        loss = load(exported[0])
        dataset = Judged(loss, called)
        expected = [dataset[number] for number in range(len(dataset))]
        step = Step(make_network(), loss)
        loader = DataLoader(
            dataset, batch_size=None, num_workers=2, multiprocessing_context=method, persistent_workers=True, timeout=60
        )
        for number, (found, wanted) in enumerate(zip(loader, expected, strict=True)):
            torch.testing.assert_close(found[0], wanted[0], rtol=1e-6, atol=0)
            assert found[1] == 1  # torch's threads, of which ONNX Runtime takes as many
            step(*images(number)).backward()
        del loader
    finally:
        torch.set_num_threads(before)


def test_an_idle_engine_leaves_the_cores_alone(exported: Exported) -> None:
    """Threads that wait for the next step by spinning would take them from data loaders."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        loss = load(exported[0])
        spent = []
        for _ in range(5):
            loss(*images())
            start = time.process_time()
            time.sleep(0.1)
            spent.append(time.process_time() - start)
    finally:
        torch.set_num_threads(before)
    assert statistics.median(spent) < 0.01


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def growth(step: Callable[[], object], steps: int) -> int:
    """Return by how many bytes the process has grown since the first quarter of the steps."""
    sizes = []
    for _ in range(steps):
        step()
        sizes.append(resident_bytes())
    return sizes[-1] - sizes[steps // 4]


def times_as_long(step: Callable[[], object], other: Callable[[], object], rounds: int = 60) -> float:
    """Return how many times as long `step` takes as `other`, which take turns: a machine's speed changes meanwhile.

    It is the fastest tenth that counts: other processes make a step slower, and never faster.
    """
    times: list[list[float]] = [[], []]
    for _ in range(rounds):
        for run, found in zip((step, other), times, strict=True):
            start = time.process_time()
            run()
            found.append(time.process_time() - start)
    first, second = (statistics.quantiles(found, n=10)[0] for found in times)
    return first / second


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read as Linux shows it")
@pytest.mark.parametrize(
    ("steps", "weights"), [(400, (0.0, 1.0)), pytest.param(2000, (1e-3, 1e-6), marks=pytest.mark.slow)]
)
def test_long_training_stays_flat(steps: int, weights: tuple[float, float], exported: Exported) -> None:
    degraded, target = images()
    kept: list[Tensor] = []

    def begin() -> Callable[..., None]:
        loss = DiffLoss.load(exported[0], "onnxruntime", "cpu", *weights, value_range=(-1, 1), seed=3)
        step = Step(make_network(), loss)
        optimizer = torch.optim.Adam(step.parameters())

        def train_step(keep: bool = False) -> None:
            total = step(degraded, target)
            optimizer.zero_grad()
            total.backward(retain_graph=keep)
            optimizer.step()
            if keep:
                kept.append(total)

        return train_step

    train_step = begin()
    assert growth(train_step, steps) < 4 * 2**20
    # What a loss would show that keeps each step's tape.
    assert growth(lambda: train_step(keep=True), steps) > 4 * 2**20
    assert times_as_long(train_step, begin()) < 1.25
