"""Train with DiffLoss in Lightning: a LightningModule, and the callback that logs the terms.

    python examples/train_lightning.py BUNDLE --out FOLDER [--steps N]

BUNDLE is written by `diffloss-export onnx builtin --batch-size 4 -o BUNDLE`; any other of square RGB images will do.
FOLDER receives the logged terms, `metrics.csv`, and a checkpoint.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader

from arguments import OneLineParser, output_folder, positive_integer
from diffloss_trt import DiffLoss, DiffLossError, Terms
from diffloss_trt.lightning import log_terms
from pairs import Pairs
from restoration_network import RestorationNetwork

BATCH_SIZE = 4


class Restoration(LightningModule):
    """A restoration network in training; the loss's frozen weights are in neither its optimizer nor its checkpoints.

    If the loss has a seed, a checkpoint holds the position in its draws.
    """

    def __init__(self, loss_fn: DiffLoss) -> None:
        super().__init__()
        self.network = RestorationNetwork()
        self.loss_fn = loss_fn

    def training_step(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor | Terms]:
        degraded, target = batch
        restored = self.network(degraded)
        terms = self.loss_fn.terms(restored, target)
        return {"loss": F.mse_loss(restored, target) + terms.total.mean(), "diffloss": terms}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.network.parameters(), lr=1e-3)


def train(loss_fn: DiffLoss, steps: int, out: Path) -> Restoration:
    """Train a new network and return it; `out` receives `metrics.csv` and `last.ckpt`."""
    seed_everything(0, verbose=False)
    side = loss_fn.resolution[0] if loss_fn.resolution else 64
    module = Restoration(loss_fn)
    trainer = Trainer(
        max_steps=steps,
        logger=CSVLogger(out, name="", version=""),
        callbacks=[log_terms(), ModelCheckpoint(out, filename="last")],
        log_every_n_steps=1,
        accelerator=loss_fn.device.type,
        devices=1,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(Pairs(steps * BATCH_SIZE, side), BATCH_SIZE))
    return module


def main() -> int:
    parser = OneLineParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", metavar="BUNDLE")
    parser.add_argument("--out", type=output_folder, required=True, help="folder for log and checkpoint")
    parser.add_argument("--steps", type=positive_integer, default=10, help="default: 10")
    args = parser.parse_args()
    try:
        # A seed, because `seed_everything` makes all processes draw alike; the loss mixes its rank into its own.
        loss_fn = DiffLoss.load(args.bundle, naturalness_weight=0.1, semantic_weight=1e-3, seed=0)
        train(loss_fn, args.steps, args.out)
    except DiffLossError as error:
        parser.error(str(error))
    print((args.out / "metrics.csv").read_text(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
