"""What DiffLoss adds to a training step of a restoration network: `python benchmarks/train_step.py --json FILE`.

A step is everything: the network forward, a pixel loss and the loss in question, backward, and the optimizer. The
network has the layout of NAFNet at width 32; on a GPU it runs under bf16 autocast, as one would. Unless said otherwise
the UNet is the paper's, on 256x256 crops, on a GPU, and the small one of google/ddpm-cifar10-32, on 64x64 crops, on a
CPU. Weights are random. Rows are timed in turn; memory is that of a process of its own.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import sections
import torch
import torch.nn.functional as F
from bundles import load_tapped, make_bundle, workplace
from configurations import CONFIGURATIONS
from machine import build, describe, eager_fp32, reason
from nafnet import WideRestorationNetwork
from perceptual import PerceptualLoss
from timing import interleaved
from torch import Tensor, nn
from ways import TERMS, Images, objective

from diffloss_engine.inductor import has_bfloat16
from diffloss_trt import DiffLoss
from diffloss_trt.inputs import choose_device
from diffloss_trt.unet import TappedUNet

Loss = Callable[[Tensor, Tensor], Tensor]
NONE: Final = "none"
# Backend and precision of what a user would take, by the type of device.
OURS: Final = {
    "cpu": (("onnxruntime", "fp32"), ("inductor", "bf16")),
    "cuda": (("tensorrt", "fp16"), ("tensorrt-rtx", "fp16"), ("onnxruntime", "fp16"), ("inductor", "fp16")),
}
# What is measured unless said otherwise: architecture, side of the crops, batch size, rounds.
DEFAULTS: Final = {"cpu": ("cifar10", 64, 2, 7), "cuda": ("adm256", 256, 8, 20)}


@dataclass(frozen=True)
class Setting:
    """What every row has in common."""

    folder: Path
    configuration: str
    side: int
    batch_size: int
    device: torch.device

    def ours(self, backend: str, precision: str) -> Loss:
        bundle = make_bundle(self.folder, self.configuration, precision, self.batch_size, self.side)
        return DiffLoss.load(bundle.path, backend, self.device, backward="fused")

    def tapped(self) -> TappedUNet:
        tapped = load_tapped(self.folder, self.configuration, torch.float32, self.device)
        nn.utils.convert_conv2d_weight_memory_format(tapped.unet, torch.channels_last)
        return tapped

    def eager(self) -> Loss:
        tapped = self.tapped()
        return DiffLoss.from_unet(tapped.unet, tapped.schedule)

    def autocast(self) -> Loss:
        """Return the formula as a user would write it under `torch.autocast`, on images in [0, 1]."""
        tapped = self.tapped()
        total = objective(tapped, TERMS["both"], autocast=True)

        def loss(restored: Tensor, target: Tensor) -> Tensor:
            restored, target = 2 * restored - 1, 2 * target - 1
            timesteps = torch.randint(len(tapped.schedule), (len(target),), device=target.device)
            return total(restored, Images(restored, target, torch.randn_like(target), timesteps))

        return loss

    def perceptual(self) -> Loss:
        loss = PerceptualLoss().to(self.device)
        nn.utils.convert_conv2d_weight_memory_format(loss, torch.channels_last)
        return loss

    def losses(self) -> dict[str, Callable[[], Loss]]:
        """Return what makes each row's loss, by the row's name."""
        rows: dict[str, Callable[[], Loss]] = {
            NONE: lambda: lambda restored, _: torch.zeros((), device=restored.device),
            "perceptual, VGG-16 as in LPIPS": self.perceptual,
            eager_fp32("DiffLoss, eager PyTorch", self.device): self.eager,
        }
        if has_bfloat16(self.device):
            rows["DiffLoss, eager PyTorch, bf16 autocast"] = self.autocast
        for backend, precision in OURS[self.device.type]:
            rows[f"DiffLoss, diffloss-trt {backend}, {precision}"] = functools.partial(self.ours, backend, precision)
        return rows

    def step(self, row: str) -> Callable[[], None]:
        """Return a row's training step; raises BackendUnavailableError if it cannot be run here."""
        loss_fn = self.losses()[row]()
        torch.manual_seed(0)
        network = WideRestorationNetwork().to(self.device)
        nn.utils.convert_conv2d_weight_memory_format(network, torch.channels_last)
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
        target = torch.rand(self.batch_size, 3, self.side, self.side, device=self.device)
        degraded = 0.5 * target

        def run() -> None:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                restored = network(degraded)
            restored = restored.float()
            loss = F.mse_loss(restored, target) + loss_fn(restored, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return run


def measure(setting: Setting, rounds: int) -> list[dict[str, Any]]:
    """Return a row for each loss: time, and the loss's share of it; or why it was not run."""
    steps: dict[str, Callable[[], object]] = {}
    memory: dict[str, int] = {}
    not_run: dict[str, str] = {}
    for row in setting.losses():
        print(f"building {row} ...", flush=True)
        try:
            steps[row], memory[row] = build(functools.partial(setting.step, row), setting.device)
        # Whatever it is, it must not lose the other rows.
        except Exception as error:
            not_run[row] = reason(error, setting.folder)
    timings = interleaved(steps, rounds, setting.device)
    rows: list[dict[str, Any]] = []
    for row in setting.losses():
        if row in not_run:
            rows.append({"loss": row, "not_run": not_run[row]})
            continue
        seconds = timings[row].median
        rows.append(
            {
                "loss": row,
                **timings[row].to_json(),
                "images_per_s": float(f"{setting.batch_size / seconds:.4g}"),
                "share": round(1 - timings[NONE].median / seconds, 3),
                "peak_memory_bytes": memory[row],
            }
        )
    return rows


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    device = choose_device(None)
    configuration, side, batch_size, rounds = DEFAULTS[device.type]
    parser.add_argument("configuration", nargs="?", choices=CONFIGURATIONS, default=configuration)
    parser.add_argument("--side", type=int, default=side, help="of the crops, in pixels")
    parser.add_argument("--batch-size", type=int, default=batch_size)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="keep bundles and what is compiled there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the result")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with workplace(args.work) as folder:
        setting = Setting(folder, args.configuration, args.side, args.batch_size, device)
        rows = measure(setting, args.rounds)
    result = {
        **describe(),
        "configuration": args.configuration,
        "side": args.side,
        "batch_size": args.batch_size,
        "network_parameters": sum(parameter.numel() for parameter in WideRestorationNetwork().parameters()),
        "rows": rows,
    }
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(sections.joined(sections.train_step(result)))


if __name__ == "__main__":
    main()
