"""docs/training.md: every piece of code on the page runs as it stands."""

from __future__ import annotations

import copy
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffloss_trt import DiffLoss, NoiseSchedule
from layout import ROOT

Batch = tuple[Tensor, Tensor, Tensor, Tensor]
PIECES = re.findall(
    r"^```python\n(.*?)^```", (ROOT / "docs" / "training.md").read_text("utf-8"), flags=re.MULTILINE | re.DOTALL
)


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


def run(piece: int, names: dict[str, Any]) -> bool:
    """Run a piece of code; return whether it has trained the network."""
    before = copy.deepcopy(names["network"].state_dict())
    exec(compile(PIECES[piece], f"docs/training.md, {piece}", "exec"), names)
    return any((tensor != before[name]).any() for name, tensor in names["network"].state_dict().items())


def test_every_piece_of_code_is_run_here() -> None:
    assert len(PIECES) == 4


def test_distributed(names: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """As `torchrun` would start it, alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1}
    for name, value in settings.items():
        monkeypatch.setenv(name, str(value))
    try:
        assert run(0, names)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the page leaves it to its reader to move images to a GPU")
def test_compiled(names: dict[str, Any]) -> None:
    assert run(1, names)


def test_saved_and_resumed(names: dict[str, Any]) -> None:
    loss = names["loss_fn"] = DiffLoss.load("bundle", device="cpu", seed=3)
    images = names["loader"].dataset.tensors
    loss(*images)
    assert not run(2, names)
    other = DiffLoss.load("bundle", device="cpu", seed=0)
    other.load_state_dict(torch.load("last.pt", weights_only=True)["loss"])
    assert torch.equal(other(*images), loss(*images))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the page leaves it to its reader to move images to a GPU")
def test_skipping(names: dict[str, Any]) -> None:
    assert run(3, names)
    degraded, target = names["loader"].dataset.tensors
    names["loader"] = [(degraded, target), (degraded * torch.nan, target)]
    assert run(3, names)
    assert all(bool(tensor.isfinite().all()) for tensor in names["network"].state_dict().values())
    assert names["scaler"].get_scale() == 0.5
