"""Train with a list of weighted criteria in the style of torch, piq and pyiqa; one of them is DiffLoss.

    python examples/train_criteria.py BUNDLE [--steps N]

BUNDLE is written by `diffloss-export onnx builtin --batch-size 4 -o BUNDLE`; any other of square RGB images will do.
"""

from __future__ import annotations

import sys

import torch
from torch import nn
from torch.utils.data import DataLoader

from arguments import OneLineParser, positive_integer
from diffloss_trt import DiffLossError
from diffloss_trt.conventions import DiffLossCriterion
from pairs import Pairs
from restoration_network import RestorationNetwork

BATCH_SIZE = 4


def train(criteria: dict[str, nn.Module], side: int, steps: int) -> list[dict[str, float]]:
    """Train a new network on the sum of criteria, on crops of `side` pixels; return each step's values of them."""
    torch.manual_seed(0)
    network = RestorationNetwork()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    history = []
    for degraded, target in DataLoader(Pairs(steps * BATCH_SIZE, side), BATCH_SIZE):
        restored = network(degraded)
        losses = {name: criterion(restored, target) for name, criterion in criteria.items()}
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        history.append({name: loss.item() for name, loss in losses.items()})
    return history


def main() -> int:
    parser = OneLineParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", metavar="BUNDLE")
    parser.add_argument("--steps", type=positive_integer, default=10, help="default: 10")
    args = parser.parse_args()
    try:
        diffloss = DiffLossCriterion(
            args.bundle, naturalness_weight=0.1, semantic_weight=1e-3, data_range=1.0, device="cpu"
        )
        side = diffloss.loss_fn.resolution[0] if diffloss.loss_fn.resolution else 64
        history = train({"mse": nn.MSELoss(), "diffloss": diffloss}, side, args.steps)
    except DiffLossError as error:
        parser.error(str(error))
    for step, entry in enumerate(history):
        print(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in entry.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
