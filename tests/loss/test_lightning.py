"""The callback for Lightning, in a real trainer: what it logs is what the loss returned."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from diffloss_engine.errors import InputError, MissingPackageError
from diffloss_trt import DiffLoss, NoiseSchedule, Terms
from diffloss_trt.lightning import log_terms

pl = pytest.importorskip("lightning.pytorch", reason="Lightning is not installed")
# The trainer's advice on loaders, which here have nothing to load.
pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")

Batch = tuple[Tensor, Tensor, Tensor, Tensor]


class Module(pl.LightningModule):  # type: ignore[misc, name-defined]
    """Learns one image's brightness; keeps the terms that it returns."""

    def __init__(self, loss_fn: DiffLoss, key: str | None) -> None:
        super().__init__()
        self.brightness = nn.Parameter(torch.tensor(0.9))
        self.loss_fn = loss_fn
        self.key = key
        self.returned: list[Terms] = []

    def training_step(self, batch: list[Tensor]) -> Any:
        (target,) = batch
        terms = self.loss_fn.terms(self.brightness * target, target)
        self.returned.append(terms)
        loss = terms.total.mean()
        return loss if self.key is None else {"loss": loss, self.key: terms}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(module: Module, target: Tensor, callback: Any, folder: Path) -> Any:
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[callback],
        logger=False,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
    )
    trainer.fit(module, DataLoader(TensorDataset(target), batch_size=2))
    return trainer


@pytest.fixture
def loss_fn(exported: tuple[Path, Any, NoiseSchedule]) -> DiffLoss:
    return DiffLoss.load(exported[0], device="cpu", naturalness_weight=1.0)


@pytest.fixture
def target(make_batch: Callable[..., Batch]) -> Tensor:
    """Four images, so that a batch has two; in [0, 1]."""
    return (make_batch(count=4, dtype=torch.float32)[1] + 1) / 2


@pytest.mark.parametrize("key", ["diffloss", "prior"])
def test_terms_of_each_step_and_epoch_are_logged(loss_fn: DiffLoss, target: Tensor, key: str, tmp_path: Path) -> None:
    module = Module(loss_fn, key)
    # As a strategy that starts processes would pass it on.
    callback = pickle.loads(pickle.dumps(log_terms(key)))
    logged = train(module, target, callback, tmp_path).callback_metrics
    assert len(module.returned) == 2
    for name in Terms._fields:
        means = [getattr(terms, name).mean().detach() for terms in module.returned]
        assert means[0] != means[1]
        torch.testing.assert_close(logged[f"{key}/{name}_step"], means[1])
        torch.testing.assert_close(logged[f"{key}/{name}_epoch"], torch.stack(means).mean())
    assert module.brightness != 0.9


@pytest.mark.parametrize("key", [None, "other"])
def test_terms_that_are_not_returned_are_missed(
    loss_fn: DiffLoss, target: Tensor, key: str | None, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"expected \{'loss': loss, 'diffloss': terms\}"):
        train(Module(loss_fn, key), target, log_terms(), tmp_path)


def test_without_lightning_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning.pytorch.callbacks", None)
    with pytest.raises(MissingPackageError, match=r"needs Lightning, which cannot be imported .*: install 'lightning'"):
        log_terms()


@pytest.mark.filterwarnings("ignore:.*training_step. returned .None.:UserWarning")
def test_steps_that_are_left_out_log_nothing(loss_fn: DiffLoss, target: Tensor, tmp_path: Path) -> None:
    class Sparing(Module):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:  # type: ignore[override]
            return None if batch_idx == 0 else super().training_step(batch)

    module = Sparing(loss_fn, "diffloss")
    logged = train(module, target, log_terms(), tmp_path).callback_metrics
    (terms,) = module.returned
    assert float(logged["diffloss/total_epoch"]) == pytest.approx(float(terms.total.detach().mean()))
