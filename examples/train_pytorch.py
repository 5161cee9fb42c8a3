"""Train with DiffLoss in plain PyTorch, with timesteps and weights that change during training.

    python examples/train_pytorch.py BUNDLE [--steps N]

BUNDLE is written by `diffloss-export onnx builtin --batch-size 4 -o BUNDLE`; any other of square RGB images will do.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from arguments import OneLineParser, positive_integer
from diffloss_trt import DiffLoss, DiffLossError
from diffloss_trt.sampling import Annealed, TimestepSampler, snr_weighted
from diffloss_trt.weights import WarmUp
from pairs import Pairs
from restoration_network import RestorationNetwork

BATCH_SIZE = 4


def train(loss_fn: DiffLoss, steps: int) -> list[dict[str, float]]:
    """Train a new network; return each step's pixel loss, DiffLoss and weight of naturalness."""
    torch.manual_seed(0)
    side = loss_fn.resolution[0] if loss_fn.resolution else 64
    network = RestorationNetwork().to(loss_fn.device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    schedule = loss_fn.schedule
    # At first all noise levels, weighted by how much of both signal and noise there is; at last the lower half.
    density = Annealed(snr_weighted(schedule), start=(0, len(schedule)), end=(0, len(schedule) // 2), steps=steps)
    sampler = TimestepSampler(density, low_discrepancy=True, device=loss_fn.device)
    naturalness = WarmUp(loss_fn.naturalness_weight, steps=max(1, steps // 2))
    history = []
    for step, batch in enumerate(DataLoader(Pairs(steps * BATCH_SIZE, side), BATCH_SIZE)):
        degraded, target = (images.to(loss_fn.device) for images in batch)
        loss_fn.naturalness_weight = naturalness(step)
        restored = network(degraded)
        pixel = F.mse_loss(restored, target)
        diffusion = loss_fn(restored, target, timesteps=sampler(len(restored), step))
        optimizer.zero_grad()
        (pixel + diffusion).backward()
        optimizer.step()
        history.append({"pixel": pixel.item(), "diffloss": diffusion.item(), "weight": loss_fn.naturalness_weight})
    return history


def main() -> int:
    parser = OneLineParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", metavar="BUNDLE")
    parser.add_argument("--steps", type=positive_integer, default=10, help="default: 10")
    args = parser.parse_args()
    try:
        history = train(DiffLoss.load(args.bundle, naturalness_weight=0.1, semantic_weight=1e-3), args.steps)
    except DiffLossError as error:
        parser.error(str(error))
    for step, entry in enumerate(history):
        print(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in entry.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
