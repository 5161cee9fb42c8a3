"""How the cost of the loss grows with batch, image size and processes: `python benchmarks/scaling.py --json FILE`.

A step of the loss, value and gradient, is timed in eager PyTorch in fp32 and in ours, on the fastest backend that is
there, over batch sizes and over image sizes. A size that cannot be run, for want of memory, is left out. Times are
fitted by a power of the size, by least squares on logarithms; memory, of which weights are a fixed part, by a straight
line. Then a training step of a restoration network under DistributedDataParallel is timed on one rank, on all with
nothing exchanged, and on all with gradients exchanged, in turn in the same processes. On a CPU each rank has one
thread; on GPUs each has its own.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import sections
import torch
import torch.distributed as dist
import torch.nn.functional as F
from bundles import load_tapped, make_bundle, workplace
from configurations import CONFIGURATIONS
from machine import build, describe, eager_fp32, reason
from nafnet import WideRestorationNetwork
from timing import Timing, interleaved, wait
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from diffloss_trt import DiffLoss
from diffloss_trt.inputs import choose_device

EAGER: Final = "eager PyTorch, fp32"
OURS: Final = "diffloss-trt"
# What is measured unless said otherwise, by the type of device: architecture, batch sizes (of its own image size), and
# sides of single images.
DEFAULTS: Final = {
    "cpu": ("cifar10", (1, 2, 4, 8), (16, 32, 64)),
    "cuda": ("celebahq256", (1, 2, 4, 8, 16), (128, 192, 256, 384)),
}
PRECISION: Final = {"cpu": "fp32", "cuda": "fp16"}
_RANKS = 2


@dataclass(frozen=True)
class Point:
    """A way to compute the loss, at one size."""

    way: str
    batch_size: int
    side: int


@dataclass(frozen=True)
class Setting:
    """What all points have in common."""

    folder: Path
    configuration: str
    device: torch.device

    def loss(self, point: Point) -> DiffLoss:
        """Return the loss, for images in [0, 1]."""
        if not point.way.startswith(EAGER):
            precision = PRECISION[self.device.type]
            bundle = make_bundle(self.folder, self.configuration, precision, point.batch_size, point.side)
            return DiffLoss.load(bundle.path, "auto", self.device, backward="fused")
        tapped = load_tapped(self.folder, self.configuration, torch.float32, self.device)
        nn.utils.convert_conv2d_weight_memory_format(tapped.unet, torch.channels_last)
        return DiffLoss.from_unet(tapped.unet, tapped.schedule)

    def step(self, point: Point) -> Step:
        target = torch.rand(point.batch_size, 3, point.side, point.side, device=self.device)
        restored = (target + 0.05 * torch.randn_like(target)).requires_grad_()
        return Step(self.loss(point), restored, target)


@dataclass(frozen=True)
class Step:
    """The loss's value and gradient at one point."""

    loss_fn: DiffLoss
    restored: Tensor
    target: Tensor

    def __call__(self) -> object:
        return torch.autograd.grad(self.loss_fn(self.restored, self.target), self.restored)


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Return the exponent p of cost = c * size ** p, fitted by least squares on logarithms."""
    logs = ([math.log(size) for size in sizes], [math.log(cost) for cost in costs])
    return statistics.linear_regression(*logs).slope


def _curve(sizes: Sequence[int], timings: Sequence[Timing], memory: Sequence[int]) -> dict[str, Any]:
    line = statistics.linear_regression(sizes, memory)
    return {
        "points": [
            {"size": size, **timing.to_json(), "peak_memory_bytes": peak}
            for size, timing, peak in zip(sizes, timings, memory, strict=True)
        ],
        "exponent": round(exponent(sizes, [timing.median for timing in timings]), 3),
        "memory": {"fixed_bytes": round(line.intercept), "bytes_each": round(line.slope)},
    }


def measure_sizes(
    setting: Setting, batch_sizes: Sequence[int], sides: Sequence[int], rounds: int
) -> list[dict[str, Any]]:
    """Return a curve for each way over images, and one over pixels; or why there is none, of fewer than two points."""
    own = int(CONFIGURATIONS[setting.configuration]["sample_size"])
    eager = eager_fp32(EAGER, setting.device)
    steps: dict[Point, Step] = {}
    memory: dict[Point, int] = {}
    not_run: dict[Point, str] = {}
    for point in (Point(way, *size) for way in (eager, OURS) for size in _sizes(own, batch_sizes, sides)):
        print(f"building {point} ...", flush=True)
        try:
            steps[point], memory[point] = build(functools.partial(setting.step, point), setting.device)
        # Whatever it is, it must not lose the other points.
        except Exception as error:
            not_run[point] = reason(error, setting.folder)
    timings = interleaved({str(point): step for point, step in steps.items()}, rounds, setting.device)
    curves = []
    for way in (eager, OURS):
        for over, chosen in (
            ("images", {count: Point(way, count, own) for count in batch_sizes}),
            ("pixels", {side**2: Point(way, 1, side) for side in sides}),
        ):
            run = {size: point for size, point in chosen.items() if point in steps}
            curve: dict[str, Any] = {"way": _name(way, [steps[point] for point in run.values()], setting), "over": over}
            left_out = {str(size): not_run[point] for size, point in chosen.items() if point in not_run}
            if len(run) < 2:
                curve["not_run"] = next(iter(left_out.values()), "a curve needs two sizes")
            else:
                points = run.values()
                curve |= _curve([*run], [timings[str(point)] for point in points], [memory[point] for point in points])
                if left_out:
                    curve["left_out"] = left_out
            curves.append(curve)
    return curves


def _name(way: str, steps: Iterable[Step], setting: Setting) -> str:
    """Return what a curve's way is called: ours by the backend that "auto" took, or by each of them."""
    if way != OURS:
        return way
    backends = " and ".join(dict.fromkeys(step.loss_fn.backend for step in steps)) or "auto"
    return f"{OURS}, {backends}, {PRECISION[setting.device.type]}"


def _sizes(own: int, batch_sizes: Sequence[int], sides: Sequence[int]) -> list[tuple[int, int]]:
    return sorted({(count, own) for count in batch_sizes} | {(1, side) for side in sides})


def measure_processes(setting: Setting, point: Point, rounds: int) -> dict[str, Any]:
    """Return what a training step takes on one rank, on all, and on all with an exchange of gradients."""
    if setting.device.type == "cuda" and torch.cuda.device_count() < _RANKS:
        return {"ranks": _RANKS, "not_run": f"it needs {_RANKS} GPUs"}
    try:
        setting.loss(point)  # the ranks find bundle and plan made
        with TemporaryDirectory() as meeting:
            torch.multiprocessing.spawn(_rank, (setting, point, rounds, Path(meeting)), nprocs=_RANKS)
            found: dict[str, Any] = json.loads((Path(meeting) / "result.json").read_text())
    # Whatever it is, it must not lose the curves.
    except Exception as error:
        return {"ranks": _RANKS, "not_run": reason(error, setting.folder)}
    return found


def _rank(rank: int, setting: Setting, point: Point, rounds: int, meeting: Path) -> None:
    on_gpu = setting.device.type == "cuda"
    device = torch.device("cuda", rank) if on_gpu else setting.device
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    method = f"file://{meeting / 'ranks'}"
    dist.init_process_group("nccl" if on_gpu else "gloo", init_method=method, rank=rank, world_size=_RANKS)
    loss_fn = Setting(setting.folder, setting.configuration, device).loss(point)
    network = WideRestorationNetwork().to(device)
    parallel = DistributedDataParallel(network, device_ids=[rank] if on_gpu else None)
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=1e-4)
    target = torch.rand(point.batch_size, 3, point.side, point.side, device=device)
    gradients = torch.zeros(sum(parameter.numel() for parameter in network.parameters()), device=device)

    def train(exchange: bool) -> None:
        with nullcontext() if exchange else parallel.no_sync():
            restored = parallel(0.5 * target)
            loss = F.mse_loss(restored, target) + loss_fn(restored, target)
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()

    def train_one() -> None:
        if rank == 0:
            train(exchange=False)

    steps: dict[str, Callable[[], object]] = {
        "one": train_one,
        "all": lambda: train(exchange=False),
        "all_exchanging": lambda: train(exchange=True),
        "exchange": lambda: dist.all_reduce(gradients),
    }
    for _ in range(2):
        # In its first steps DistributedDataParallel agrees with the other ranks on how to exchange.
        train(exchange=True)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            dist.barrier()
            started = time.perf_counter()
            step()
            wait(device)
            slowest = torch.tensor(time.perf_counter() - started, device=device)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            seconds[name].append(slowest.item())
    if rank == 0:
        found = {
            "ranks": _RANKS,
            "batch_size": point.batch_size,
            "side": point.side,
            "exchanged_bytes": gradients.nbytes,
            **{name: Timing.of(values).to_json() for name, values in seconds.items()},
        }
        (meeting / "result.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    device = choose_device(None)
    configuration, batch_sizes, sides = DEFAULTS[device.type]
    parser.add_argument("configuration", nargs="?", choices=CONFIGURATIONS, default=configuration)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=batch_sizes)
    parser.add_argument("--sides", type=int, nargs="+", default=sides, help="of single images, in pixels")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="keep bundles and what is compiled there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the result")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with workplace(args.work) as folder:
        setting = Setting(folder, args.configuration, device)
        curves = measure_sizes(setting, args.batch_sizes, args.sides, args.rounds)
        own = int(CONFIGURATIONS[args.configuration]["sample_size"])
        largest = Point(OURS, max(args.batch_sizes), own)
        processes = measure_processes(setting, largest, args.rounds)
    result = {**describe(), "configuration": args.configuration, "curves": curves, "processes": processes}
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(sections.joined(sections.scaling(result)))


if __name__ == "__main__":
    main()
