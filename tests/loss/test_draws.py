"""The draws of a loss with a seed: what they depend on, and what of them is saved."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from diffloss_engine.errors import BackendError, InputError
from diffloss_trt import DiffLoss
from diffloss_trt.draws import Draws
from unets import make_unet

CPU = torch.device("cpu")
STATE = "draws._extra_state"


def draw(draws: Draws, count: int = 4) -> Tensor:
    return torch.stack([torch.randn(8, generator=draws.generator(CPU)) for _ in range(count)])


def test_draws_follow_from_the_seed_alone() -> None:
    first = draw(Draws(5))
    torch.manual_seed(1)
    torch.randn(100)
    assert torch.equal(draw(Draws(5)), first)
    assert not torch.isclose(draw(Draws(6)), first).any()
    rows = first.flatten()
    assert rows.unique().numel() == rows.numel()


def test_draws_do_not_depend_on_the_default_device() -> None:
    with torch.device("meta"):
        assert torch.equal(Draws(5).generator(CPU).get_state(), Draws(5).generator(CPU).get_state())


def test_one_number_is_taken_from_the_global_generator() -> None:
    state = torch.get_rng_state()
    draw(Draws(5), 1)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    torch.randint(2**62, ())
    assert torch.equal(torch.get_rng_state(), after)


def test_neighbouring_seeds_ranks_and_calls_are_unrelated() -> None:
    """Noise of one call is not that of another one's next image."""
    draws = torch.cat([draw(Draws(seed), 50) for seed in range(20)])
    assert draws.unique(dim=0).shape == (1000, 8)
    correlation = torch.corrcoef(draws.T)
    assert correlation.fill_diagonal_(0).abs().max() < 0.15
    assert draws.mean().abs() < 0.05
    assert abs(float(draws.std()) - 1) < 0.05


def test_copies_go_on_by_themselves() -> None:
    draws = Draws(5)
    draw(draws)
    copies = [copy.deepcopy(draws), pickle.loads(pickle.dumps(draws))]
    expected = draw(draws)
    for copied in copies:
        assert torch.equal(draw(copied), expected)
        assert not torch.equal(draw(copied), expected)
    assert not torch.equal(draw(draws), expected)


def test_the_state_is_on_the_cpu_whatever_the_default_device(make_loss: Callable[[int | None], DiffLoss]) -> None:
    loss = make_loss(5)
    with torch.device("meta"):
        state = loss.state_dict()
    assert state[STATE].tolist() == [5, 0]


def test_a_copied_loss_draws_by_itself(make_loss: Callable[[int | None], DiffLoss]) -> None:
    loss = make_loss(5)
    for other in (copy.copy(loss), copy.deepcopy(loss)):
        assert loss.draws is not None
        before = loss.draws.get_extra_state()
        assert other.draws is not None
        draw(other.draws)
        other.seed = 7
        assert loss.seed == 5
        assert torch.equal(loss.draws.get_extra_state(), before)


def test_a_call_in_a_backward_pass_repeats_that_with_the_same_ticket() -> None:
    """Restoring the global generator's state restores the tickets: as checkpointing does it."""
    draws = Draws(5)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, other = draw(draws, 1), draw(draws, 1)
    found: list[Tensor] = []

    def repeat(gradient: Tensor) -> None:
        torch.set_rng_state(state)
        found.extend((draw(draws, 1), draw(draws, 1)))

    leaf = torch.ones((), requires_grad=True)
    leaf.register_hook(repeat)
    leaf.backward()
    assert torch.equal(found[0], first)
    assert torch.equal(found[1], other)
    assert draws.count == 2
    # Outside a backward pass the same ticket is that of a new call.
    torch.set_rng_state(state)
    assert not torch.equal(draw(draws, 1), first)


def test_a_call_that_is_not_found_again_is_an_error() -> None:
    draws = Draws(5)
    draw(draws)
    leaf = torch.ones((), requires_grad=True)

    def repeat(gradient: Tensor) -> None:
        draws.generator(CPU)

    leaf.register_hook(repeat)
    with pytest.raises(BackendError, match="the draw is not found: checkpoint with preserve_rng_state=True"):
        leaf.backward()


@pytest.fixture
def make_loss(scheduler: Any) -> Callable[[int | None], DiffLoss]:
    """(seed) -> a small loss."""
    unet = make_unet(dtype=torch.float32)
    return lambda seed: DiffLoss.from_unet(unet, scheduler, seed=seed, reduction="none")


def test_an_assigned_seed_is_that_of_a_new_loss(make_loss: Callable[[int | None], DiffLoss]) -> None:
    assigned = make_loss(None)
    assert assigned.seed is None
    assigned.seed = 5
    images = torch.rand(2, 1, 3, 16, 16)
    terms = assigned.terms(*images)
    assert list(assigned.state_dict()) == [STATE]
    loaded = make_loss(5)
    assert all(torch.equal(*both) for both in zip(terms, loaded.terms(*images), strict=True))
    assert not torch.equal(assigned.terms(*images).total, terms.total)
    assigned.seed = 5
    assert torch.equal(assigned.terms(*images).total, terms.total)
    assigned.seed = None
    assert assigned.draws is None
    assert not assigned.state_dict()
    with pytest.raises(InputError, match="seed"):
        assigned.seed = -1


def saved(state: dict[str, Any]) -> dict[str, Any]:
    """Write and read a state dict as trainers do that trust no pickles."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def test_the_state_of_the_draws_is_saved_and_nothing_else(make_loss: Callable[[int | None], DiffLoss]) -> None:
    image, other = torch.rand(2, 2, 3, 16, 16)
    loss = make_loss(5)
    loss(image, other)
    state = saved(loss.state_dict())
    assert set(state) == {STATE}
    assert not list(loss.parameters())
    assert not list(loss.buffers())  # DistributedDataParallel would make them equal on all ranks
    expected = loss(image, other)
    resumed = make_loss(0)
    assert not torch.equal(resumed(image, other), expected)
    resumed.load_state_dict(state)
    assert torch.equal(resumed(image, other), expected)
    assert "seed=5" in repr(resumed)
    with pytest.raises(InputError, match="the state of a loss's draws is"):
        resumed.load_state_dict({STATE: torch.tensor([5, -1])})


def test_checkpoints_with_and_without_a_seed_are_taken_with_a_warning(
    make_loss: Callable[[int | None], DiffLoss], caplog: pytest.LogCaptureFixture
) -> None:
    """As part of a training's module, and strictly; what else is missing or unexpected is still an error."""
    image, other = torch.rand(2, 2, 3, 16, 16)

    def module(seed: int | None) -> torch.nn.ModuleDict:
        return torch.nn.ModuleDict({"net": torch.nn.Conv2d(3, 3, 1), "loss": make_loss(seed)})

    seeded, plain = module(5), module(None)
    seeded["loss"](image, other)
    with_draws, without = saved(seeded.state_dict()), saved(plain.state_dict())
    plain.load_state_dict(with_draws)
    assert [record.getMessage()[:25] for record in caplog.records] == ["the state holds the draws"]
    caplog.clear()
    expected = copy.deepcopy(seeded)["loss"](image, other)
    seeded.load_state_dict(without)
    assert [record.getMessage()[:24] for record in caplog.records] == ["the state holds no draws"]
    assert torch.equal(seeded["loss"](image, other), expected)  # the draws go on
    for whole in (with_draws, without):
        for altered in ({**whole, "loss.more": torch.ones(1)}, {key: whole[key] for key in whole if "net" not in key}):
            with pytest.raises(RuntimeError, match=r"Unexpected key|Missing key"):
                module(5).load_state_dict(altered)


def test_a_draw_is_made_where_one_is_needed(make_loss: Callable[[int | None], DiffLoss]) -> None:
    """And a loss with a seed draws as with a generator: timesteps first, then noise."""
    image, other = torch.rand(2, 2, 3, 16, 16)
    loss = make_loss(5)
    assert loss.draws is not None
    noise, timesteps = torch.randn(2, 3, 16, 16), torch.tensor([5, 800])
    loss(image, other, noise=noise, timesteps=timesteps)
    loss(image, other, generator=torch.Generator())
    assert loss.draws.count == 0
    generator = copy.deepcopy(loss.draws).generator(CPU)
    given: dict[str, Any] = {
        "timesteps": torch.randint(1000, (2,), generator=generator),
        "noise": torch.randn(2, 3, 16, 16, generator=generator),
    }
    assert torch.equal(loss(image, other), loss(image, other, **given))
    loss(image, other, noise=noise)
    loss(image, other, timesteps=timesteps)
    assert loss.draws.count == 3


def test_no_draw_is_made_while_a_cuda_graph_is_captured(
    make_loss: Callable[[int | None], DiffLoss], monkeypatch: pytest.MonkeyPatch
) -> None:
    image, other = torch.rand(2, 2, 3, 16, 16)
    loss = make_loss(5)
    assert loss.draws is not None
    monkeypatch.setattr("diffloss_trt.loss._is_capturing", lambda device: device == loss.device)
    given: dict[str, Any] = {"timesteps": torch.tensor([5, 800]), "noise": torch.randn(2, 3, 16, 16)}
    for part in ({}, {"timesteps": given["timesteps"]}, {"noise": given["noise"]}):
        with pytest.raises(BackendError, match="cannot draw while a CUDA graph is captured: pass timesteps and noise"):
            loss(image, other, **part)
    assert loss.draws.count == 0
    loss(image, other, **given)


@pytest.mark.gpu
def test_no_draw_is_recorded_in_a_cuda_graph(make_loss: Callable[[int | None], DiffLoss]) -> None:
    loss = make_loss(5).to("cuda")
    image, other = torch.rand(2, 2, 3, 16, 16, device="cuda")
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros(1, device="cuda")  # PyTorch warns of a graph without anything in it
        with pytest.raises(BackendError, match="cannot draw while a CUDA graph is captured"):
            loss(image, other)


@pytest.mark.gpu
def test_it_is_the_capture_of_the_loss_s_own_device_that_counts(make_loss: Callable[[int | None], DiffLoss]) -> None:
    """Which need not be the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    loss = make_loss(5).to("cuda:1")
    image, other = torch.rand(2, 2, 3, 16, 16, device="cuda:1")
    # PyTorch's own stream for captures is one for the whole process, on the GPU of the first that there was.
    with torch.cuda.device(1), torch.cuda.graph(torch.cuda.CUDAGraph(), stream=torch.cuda.Stream(1)):
        torch.zeros(1, device="cuda:1")
        with torch.cuda.device(0), pytest.raises(BackendError, match="cannot draw while a CUDA graph is captured"):
            loss(image, other)


class Drawing(Dataset[Tensor]):
    """A data set whose images are what a loss's draws give: as one that holds a loss, and calls it in the workers."""

    def __init__(self) -> None:
        self.draws = Draws(5)

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Tensor:
        return draw(self.draws, 1)[0]


# Python 3.12 and later warn of forking.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_workers_and_epochs_draw_apart() -> None:
    def epochs() -> Tensor:
        torch.manual_seed(3)
        loader = DataLoader(Drawing(), num_workers=2)
        return torch.stack([torch.cat(list(loader)) for _ in range(2)])

    found = epochs()
    assert found.flatten(0, 1).unique(dim=0).shape == (16, 8)
    assert torch.equal(found, epochs())
    torch.manual_seed(3)
    assert torch.equal(torch.cat(list(DataLoader(Drawing()))), draw(Draws(5), 8))  # without workers as ever
