"""Train with DiffLoss in BasicSR: added to its registry of losses, chosen in YAML options, trained by SRModel.

    python examples/train_basicsr.py BUNDLE [--steps N]

BUNDLE is written by `diffloss-export onnx builtin --batch-size 4 -o BUNDLE`; any other of square RGB images will do.
BasicSR and torchvision are not among the dependencies of the examples: pip install basicsr torchvision.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.utils.data import DataLoader

from arguments import OneLineParser, positive_integer
from diffloss_trt import DiffLossError
from diffloss_trt.conventions import PerceptualDiffLoss
from pairs import Pairs
from restoration_network import RestorationNetwork

BATCH_SIZE = 4


def import_basicsr() -> tuple[Any, Any, Any]:
    """Return BasicSR's registries of networks and of losses, and SRModel. Raises ImportError without BasicSR."""
    # BasicSR 1.4.2, the last one, imports a module that torchvision has no longer since 0.17; its content is here.
    functional = importlib.import_module("torchvision.transforms.functional")
    sys.modules.setdefault("torchvision.transforms.functional_tensor", functional)
    registry = importlib.import_module("basicsr.utils.registry")
    return registry.ARCH_REGISTRY, registry.LOSS_REGISTRY, importlib.import_module("basicsr.models.sr_model").SRModel


def train(bundle: str, steps: int) -> tuple[Any, list[dict[str, float]]]:
    """Train a new network; return BasicSR's model, and each step's losses as it logs them."""
    torch.manual_seed(0)
    networks, losses, model_class = import_basicsr()
    for registry, entry in ((networks, RestorationNetwork), (losses, PerceptualDiffLoss)):
        if entry.__name__ not in registry:
            registry.register(entry)
    options = yaml.safe_load(Path(__file__).with_suffix(".yml").read_text())
    options["train"]["perceptual_opt"]["bundle"] = bundle
    model = model_class(options)
    side = model.cri_perceptual.criterion.loss_fn.resolution[0]
    history: list[dict[str, float]] = []
    for degraded, target in DataLoader(Pairs(steps * BATCH_SIZE, side), BATCH_SIZE):
        model.feed_data({"lq": degraded, "gt": target})
        model.optimize_parameters(len(history) + 1)
        history.append(dict(model.get_current_log()))
    return model, history


def main() -> int:
    parser = OneLineParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", metavar="BUNDLE")
    parser.add_argument("--steps", type=positive_integer, default=10, help="default: 10")
    args = parser.parse_args()
    try:
        _, history = train(args.bundle, args.steps)
    except ImportError as error:
        parser.error(f"BasicSR cannot be imported: {error}")
    except DiffLossError as error:
        parser.error(str(error))
    for step, entry in enumerate(history):
        print(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in entry.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
