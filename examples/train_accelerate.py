"""Train with DiffLoss in Hugging Face Accelerate: on one device, or on several with a launcher.

    python examples/train_accelerate.py BUNDLE [--steps N]
    accelerate launch examples/train_accelerate.py BUNDLE [--steps N]
    ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 examples/train_accelerate.py BUNDLE [--steps N]

BUNDLE is written by `diffloss-export onnx builtin --batch-size 4 -o BUNDLE`; any other of square RGB images will do.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader

from arguments import OneLineParser, positive_integer
from diffloss_trt import DiffLoss, DiffLossError
from pairs import Pairs
from restoration_network import RestorationNetwork

BATCH_SIZE = 4


def train(accelerator: Accelerator, bundle: str, steps: int) -> list[dict[str, float]]:
    """Train a new network; return each step's terms, means over all processes."""
    # The loss is not prepared: nothing of it is trained. Each process loads one for its own device, with the same seed,
    # into which the loss mixes the rank: every process draws its own timesteps and noise.
    loss_fn = DiffLoss.load(bundle, device=accelerator.device, naturalness_weight=0.1, semantic_weight=1e-3, seed=0)
    set_seed(0)
    side = loss_fn.resolution[0] if loss_fn.resolution else 64
    network = RestorationNetwork()
    network, optimizer, loader = accelerator.prepare(
        network,
        torch.optim.AdamW(network.parameters(), lr=1e-3),
        DataLoader(Pairs(steps * BATCH_SIZE * accelerator.num_processes, side), BATCH_SIZE),
    )
    history = []
    for degraded, target in loader:
        with accelerator.accumulate(network):
            restored = network(degraded)
            terms = loss_fn.terms(restored, target)
            accelerator.backward(F.mse_loss(restored, target) + terms.total.mean())
            optimizer.step()
            optimizer.zero_grad()
        everywhere = accelerator.gather({name: term.detach() for name, term in terms._asdict().items()})
        history.append({name: term.mean().item() for name, term in everywhere.items()})
    return history


def main() -> int:
    parser = OneLineParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", metavar="BUNDLE")
    parser.add_argument("--steps", type=positive_integer, default=10, help="default: 10")
    args = parser.parse_args()
    accelerator = Accelerator()
    try:
        history = train(accelerator, args.bundle, args.steps)
    except DiffLossError as error:
        parser.error(str(error))
    for step, entry in enumerate(history):
        accelerator.print(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in entry.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
