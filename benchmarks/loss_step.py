"""What a step of the loss costs, beside its accuracy: `python benchmarks/loss_step.py cifar10 --json FILE`.

A step is the value and the gradient with respect to the restored images. Every row runs in turn in each round; medians
are compared with eager PyTorch in float32 in the same run. The gradient's error is against float64 eager PyTorch, for
restored images at 30 dB. Peak memory is that of a process of its own, weights included, less what it held before.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from configurations import CONFIGURATIONS, make_model
from machine import describe, forget_peak_memory, peak_memory
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from diffloss_engine.bundle import Bundle
from diffloss_export.pipeline import export_bundle
from diffloss_trt import DiffLoss
from diffloss_trt.contract import SCHEDULE
from diffloss_trt.gradient import trace_gradient
from diffloss_trt.objective import combine, mean_square
from diffloss_trt.probe import Probe
from diffloss_trt.schedule import NoiseSchedule
from diffloss_trt.unet import TappedUNet, reload_unet

DECIBELS = 30.0
WEIGHTS = (1.0, 1.0)
_CPU = torch.device("cpu")

Step = Callable[[], Tensor]


@dataclass(frozen=True)
class Setting:
    """What every row computes on."""

    bundle: Bundle
    bundle_bf16: Bundle
    probe: Probe

    def tapped(self, dtype: torch.dtype) -> TappedUNet:
        schedule = NoiseSchedule.from_json(self.bundle.read_json(SCHEDULE))
        return TappedUNet(reload_unet(self.bundle, dtype, _CPU), schedule)

    def images(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
        return self.probe.restored.to(dtype), self.probe.target.to(dtype), self.probe.noise.to(dtype)


def _of_loss(loss: DiffLoss, setting: Setting, dtype: torch.dtype = torch.float32) -> Step:
    restored, target, noise = setting.images(dtype)

    def step() -> Tensor:
        leaf = restored.detach().requires_grad_()
        total = loss(leaf, target, timesteps=setting.probe.timesteps, noise=noise)
        (gradient,) = torch.autograd.grad(total.sum(), leaf)
        return gradient

    return step


def _plain_step(
    tapped: TappedUNet,
    setting: Setting,
    weights: tuple[float, float],
    *,
    autocast: bool = False,
    compiled: bool = False,
) -> Step:
    """The formula as a user would write it: target without gradient, frozen weights, PyTorch's own tape."""
    restored, target, noise = setting.images()
    timesteps = setting.probe.timesteps

    def features(noisy: Tensor) -> tuple[Tensor, Tensor | None]:
        encoded = tapped.encode(noisy, timesteps)
        return encoded.bottleneck, tapped.decode(encoded) if weights[0] else None

    run = torch.compile(features) if compiled else features

    def step() -> Tensor:
        leaf = restored.detach().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            with torch.no_grad():
                h_x, e_x = run(tapped.schedule.add_noise(target, noise, timesteps))
            h_z, e_z = run(tapped.schedule.add_noise(leaf, noise, timesteps))
        semantic = mean_square(h_z - h_x)
        naturalness = torch.zeros_like(semantic) if e_z is None or e_x is None else mean_square(e_z - e_x)
        (gradient,) = torch.autograd.grad(combine(naturalness, semantic, *weights).sum(), leaf)
        return gradient

    return step


def _ours(bundle: Bundle, backend: str, setting: Setting, weights: tuple[float, float]) -> Step:
    loss = DiffLoss.load(
        bundle.path,
        backend,
        "cpu",
        naturalness_weight=weights[0],
        semantic_weight=weights[1],
        backward="fused",
        reduction="none",
        value_range=(-1.0, 1.0),
    )
    return _of_loss(loss, setting)


def _program(setting: Setting, dtype: torch.dtype) -> Step:
    tapped = setting.tapped(dtype)
    program = trace_gradient(tapped, setting.bundle.batch_size, setting.bundle.resolution, with_noise=True)
    run = program.bind(tapped.unet.state_dict())
    size = (setting.bundle.batch_size,)
    inputs = (*setting.images(), setting.probe.timesteps.float(), *(torch.full(size, weight) for weight in WEIGHTS))

    def step() -> Tensor:
        with torch.no_grad():
            gradient: Tensor = run(*inputs)[-1]
            return gradient

    return step


_SEMANTIC = (0.0, 1.0)
EAGER = "eager PyTorch, fp32"
SEMANTIC = "semantic term alone: "
ROWS: dict[str, Callable[[Setting], Step]] = {
    EAGER: lambda setting: _plain_step(setting.tapped(torch.float32), setting, WEIGHTS),
    "eager PyTorch, bf16 autocast": lambda setting: _plain_step(
        setting.tapped(torch.float32), setting, WEIGHTS, autocast=True
    ),
    "torch.compile, fp32": lambda setting: _plain_step(setting.tapped(torch.float32), setting, WEIGHTS, compiled=True),
    "diffloss-trt, ONNX Runtime, fp32": lambda setting: _ours(setting.bundle, "onnxruntime", setting, WEIGHTS),
    "diffloss-trt, PyTorch, bf16": lambda setting: _program(setting, torch.bfloat16),
    "diffloss-trt, inductor, bf16": lambda setting: _ours(setting.bundle_bf16, "inductor", setting, WEIGHTS),
    f"{SEMANTIC}eager PyTorch, fp32": lambda setting: _plain_step(setting.tapped(torch.float32), setting, _SEMANTIC),
    f"{SEMANTIC}diffloss-trt, ONNX Runtime, fp32": lambda setting: _ours(
        setting.bundle, "onnxruntime", setting, _SEMANTIC
    ),
    f"{SEMANTIC}diffloss-trt, inductor, bf16": lambda setting: _ours(
        setting.bundle_bf16, "inductor", setting, _SEMANTIC
    ),
}


def _expected(setting: Setting, weights: tuple[float, float]) -> Tensor:
    tapped = setting.tapped(torch.float64)
    loss = DiffLoss.from_unet(
        tapped.unet,
        tapped.schedule,
        naturalness_weight=weights[0],
        semantic_weight=weights[1],
        reduction="none",
        value_range=(-1.0, 1.0),
    )
    return _of_loss(loss, setting, torch.float64)()


def _error(found: Tensor, expected: Tensor) -> float:
    """Return the worst sample's ||a - b|| / ||b||."""
    a, b = found.double().flatten(1), expected.flatten(1)
    return float(((a - b).norm(dim=1) / b.norm(dim=1)).max())


def _peak_memory(path: Path, row: str) -> int:
    """Run a row in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--peak-memory", row, str(path), "--threads", str(torch.get_num_threads())],
        check=True,
        capture_output=True,
        text=True,
    )
    return int(done.stdout.splitlines()[-1])


def _print_peak_memory(setting: Setting, row: str) -> None:
    held = forget_peak_memory()
    step = ROWS[row](setting)
    for _ in range(3):
        step()
    print(peak_memory() - held)


def _setting(path: Path) -> Setting:
    bundle, bundle_bf16 = Bundle.open(path / "fp32"), Bundle.open(path / "bf16")
    timesteps = torch.linspace(10, 900, bundle.batch_size).round().long()
    return Setting(bundle, bundle_bf16, Probe.make(3, bundle.resolution, timesteps, [DECIBELS] * bundle.batch_size))


def measure(path: Path, rounds: int) -> list[dict[str, Any]]:
    """Return a row for each way to compute the step on the bundles below `path`, called fp32 and bf16."""
    setting = _setting(path)
    expected = {False: _expected(setting, WEIGHTS), True: _expected(setting, _SEMANTIC)}
    steps, errors = {}, {}
    for name in track(ROWS, "warming up"):
        steps[name] = ROWS[name](setting)
        errors[name] = _error(steps[name](), expected[name.startswith(SEMANTIC)])
        steps[name]()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in track(range(rounds), "measuring"):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append((time.perf_counter() - start) * 1e3)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return [
        {
            "name": name,
            "median_ms": round(medians[name], 1),
            "spread_ms": [round(min(values), 1), round(max(values), 1)],
            "speedup_vs_eager": round(medians[EAGER] / medians[name], 3),
            "gradient_error": float(f"{errors[name]:.2g}"),
            "peak_memory_bytes": _peak_memory(path, name),
        }
        for name, values in times.items()
    ]


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("configuration", help=f"one of {', '.join(CONFIGURATIONS)}")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the result")
    parser.add_argument("--peak-memory", metavar="ROW", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak_memory:
        _print_peak_memory(_setting(Path(args.configuration)), args.peak_memory)
        return

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        # What is compiled here nobody else wants.
        os.environ["DIFFLOSS_CACHE"] = str(path / "plans")
        for precision in ("fp32", "bf16"):
            model = make_model(args.configuration)
            export_bundle(model, path / precision, batch_size=args.batch_size, precision=precision, on_stage=print)
        rows = measure(path, args.rounds)
    result = {**describe(), "configuration": args.configuration, "batch_size": args.batch_size, "rows": rows}
    table = Table(
        "row", "ms", "times eager", "gradient error", "peak MiB", title=f"{result['device']}, batch {args.batch_size}"
    )
    for row in rows:
        table.add_row(
            row["name"],
            f"{row['median_ms']:.0f}",
            f"{row['speedup_vs_eager']:.2f}",
            f"{row['gradient_error']:.1e}",
            f"{row['peak_memory_bytes'] / 2**20:.0f}",
        )
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
