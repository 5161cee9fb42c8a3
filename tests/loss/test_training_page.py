"""docs/training.md: every piece of code on the page runs as it stands."""

from __future__ import annotations

import builtins
import copy
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffloss_engine import errors
from diffloss_engine.plan_cache import PlanCache
from diffloss_trt import DiffLoss, NoiseSchedule
from layout import ROOT

Batch = tuple[Tensor, Tensor, Tensor, Tensor]
Pair = tuple[Tensor, Tensor]
PAGE = (ROOT / "docs" / "training.md").read_text("utf-8")
PIECES = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def names(
    exported: tuple[Path, Any, NoiseSchedule],
    make_batch: Callable[..., Batch],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, Any]:
    """Return what the page takes for granted, and let the current folder have a bundle."""
    (tmp_path / "bundle").symlink_to(exported[0])
    monkeypatch.chdir(tmp_path)
    degraded, target, *_ = ((tensor + 1) / 2 for tensor in make_batch(dtype=torch.float32))
    network = nn.Conv2d(3, 3, 1)
    return {
        "network": network,
        "loader": torch.utils.data.DataLoader(torch.utils.data.TensorDataset(degraded, target), batch_size=2),
        "optimizer": torch.optim.Adam(network.parameters(), lr=0.1),
    }


@pytest.fixture
def large(names: dict[str, Any]) -> list[Pair]:
    """A batch of images that are larger than the bundle's, by one tile at the right and some rows at the bottom."""
    wide = (torch.cat([images, images.flip(2, 3)], 3) for images in names["loader"].dataset.tensors)
    degraded, target = (torch.cat([images, images[:, :, :3]], 2) for images in wide)
    return [(degraded, target)]


def run(piece: int, names: dict[str, Any]) -> bool:
    """Run a piece of code; return whether it has trained the network."""
    before = copy.deepcopy(names["network"].state_dict())
    exec(compile(PIECES[piece], f"docs/training.md, {piece}", "exec"), names)
    return any((tensor != before[name]).any() for name, tensor in names["network"].state_dict().items())


def test_every_piece_of_code_is_run_here() -> None:
    assert len(PIECES) == 9


@pytest.mark.skipif(torch.cuda.is_available(), reason="the page leaves it to its reader to move images to a GPU")
def test_choosing_weights(names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert not run(0, names)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["naturalness", "semantic"]
    for line in lines:
        low, high = (float(number) for number in line.partition(": ")[2].split(" to "))
        assert 0 < low < high
    # Of the weights that were tried none is left.
    weights = names["loss_fn"].weights
    assert list(weights) == names["chosen"]
    assert all(0 < weight < 1e3 for weight in weights)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the page leaves it to its reader to move images to a GPU")
def test_crops_of_another_size(names: dict[str, Any], large: list[Pair]) -> None:
    names["loader"] = large
    assert run(1, names)


def test_distributed(names: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """As `torchrun` would start it, alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1}
    for name, value in settings.items():
        monkeypatch.setenv(name, str(value))
    try:
        assert run(2, names)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the page leaves it to its reader to move images to a GPU")
def test_compiled(names: dict[str, Any]) -> None:
    assert run(3, names)


def test_saved_and_resumed(names: dict[str, Any]) -> None:
    loss = names["loss_fn"] = DiffLoss.load("bundle", device="cpu", seed=3)
    images = names["loader"].dataset.tensors
    loss(*images)
    assert not run(4, names)
    other = DiffLoss.load("bundle", device="cpu", seed=0)
    other.load_state_dict(torch.load("last.pt", weights_only=True)["loss"])
    assert torch.equal(other(*images), loss(*images))


def test_sampler_saved_and_resumed(names: dict[str, Any]) -> None:
    names["loss_fn"] = DiffLoss.load("bundle", device="cpu")
    assert not run(5, names)
    sampler, state = names["sampler"], torch.load("sampler.pt", weights_only=True)["sampler"]
    drawn = sampler(8)
    assert not torch.equal(sampler(8), drawn)
    sampler.generator.set_state(state)
    assert torch.equal(sampler(8), drawn)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the page leaves it to its reader to move images to a GPU")
def test_validating(names: dict[str, Any]) -> None:
    assert not run(6, names)
    first = names["values"]
    assert not run(6, names)
    assert first == names["values"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the page leaves it to its reader to move images to a GPU")
def test_validating_in_tiles(names: dict[str, Any], large: list[Pair]) -> None:
    names["loader"] = large
    assert not run(7, names)
    (value,) = names["values"]
    assert value > 0
    (_, target), *_ = large
    height, width = names["loss_fn"].resolution
    tiles = names["tiles"](target)
    assert len(tiles) == 2 * len(target)
    assert torch.equal(tiles[1], target[0, :, :height, width : 2 * width])


@pytest.mark.skipif(torch.cuda.is_available(), reason="the page leaves it to its reader to move images to a GPU")
def test_skipping(names: dict[str, Any]) -> None:
    assert run(8, names)
    degraded, target = names["loader"].dataset.tensors
    # Were the scale halved each time, its inverse would be infinite after 128 times, and so the next step.
    names["loader"] = [*[(degraded * torch.nan, target)] * 140, (degraded, target)]
    assert run(8, names)
    assert all(bool(tensor.isfinite().all()) for tensor in names["network"].state_dict().values())
    assert names["scaler"].get_scale() == 1.0


def test_table_of_errors_is_whole() -> None:
    rows = dict(re.findall(r"^\| `(\w+Error)` \| `(\w+)` \|", PAGE, flags=re.MULTILINE))
    kinds = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type)}
    assert rows.keys() == kinds.keys() - {"DiffLossError"}
    for name, base in rows.items():
        assert issubclass(kinds[name], kinds.get(base) or getattr(builtins, base))


def without_numbers(text: str) -> str:
    return re.sub(r"-?\d+(\.\d+)?", "N", " ".join(text.split()))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the messages are those of a loss on the CPU")
def test_messages_are_those_of_the_page(
    names: dict[str, Any], large: list[Pair], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    degraded, target = names["loader"].dataset.tensors
    loss = DiffLoss.load("bundle", device="cpu")
    said = []
    for images in (*large, (degraded, 2 * target - 1), (degraded * torch.nan, target)):
        with pytest.raises(errors.InputError) as caught:
            loss(*images)
        said.append(str(caught.value))
    caplog.clear()
    for _ in range(2):
        loss(degraded[:1], target[:1])
    loss.value_range = (0.0, 255.0)
    loss(degraded, target)
    said += [caplog.messages[0], caplog.messages[1].partition(": ")[2]]
    cache = tmp_path / "cache"
    cache.mkdir()
    cache.chmod(0o777)
    with pytest.raises(errors.InputError) as caught:
        PlanCache(cache).get({}, lambda: b"")
    said.append(str(caught.value).replace(str(cache), "/home/user/.cache/diffloss-trt"))
    section = without_numbers(PAGE[PAGE.index("## Troubleshooting\n") :])
    # Which images are NaN, and how many there are, depends on the batch.
    assert [what for what in said if without_numbers(re.sub(r"\[\d(, \d)*\] of", "[2] of", what)) not in section] == []
