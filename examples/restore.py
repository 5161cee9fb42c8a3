"""Train a small restoration network without and with DiffLoss, and compare the two on held-out photographs.

    python examples/restore.py --out FOLDER [--task lowlight|rain|haze|all] [--bundle BUNDLE] [--steps N]

Without --bundle the built-in prior is exported and verified first, by the same commands that a user would type.
For each task two networks start from the same weights and see the same crops; one minimises the pixel error,
the other the pixel error and DiffLoss. FOLDER receives, for each task, a grid of pictures and the loss curves, and
a table of PSNR and SSIM.
"""

from __future__ import annotations

import copy
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from arguments import OneLineParser, output_folder, positive_integer, weight
from degradations import DEGRADATIONS, Degradation
from diffloss_trt import DiffLoss, DiffLossError
from measures import fidelity
from photographs import HELD_OUT, TRAINING, RandomCrops, load
from restoration_network import RestorationNetwork
from results import labelled_grid, markdown_table, write_figure, write_json, write_picture, write_whole

BATCH_SIZE = 8
LEARNING_RATE = 3e-3
EVALUATED = 256  # side of the centre crop of a held-out photograph, in pixels


@dataclass
class Run:
    """One network in training and what was recorded of it."""

    network: RestorationNetwork
    loss: DiffLoss | None
    pixel: list[float] = field(default_factory=list)
    diffusion: list[float] = field(default_factory=list)


def train(task: str, degrade: Degradation, loss: DiffLoss, steps: int, progress: Progress) -> dict[str, Run]:
    """Train two networks alike but for DiffLoss; return them under the names of their columns."""
    torch.manual_seed(0)
    start = RestorationNetwork()
    runs = {"without DiffLoss": Run(start, None), "with DiffLoss": Run(copy.deepcopy(start), loss)}
    side = loss.resolution[0] if loss.resolution else 64
    for name, run in runs.items():
        crops = RandomCrops(list(TRAINING), side, seed=0)
        degrading, diffusing = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
        optimizer = torch.optim.AdamW(run.network.parameters(), lr=LEARNING_RATE)
        rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
        bar = progress.add_task(f"{task} {name}", total=steps)
        for _ in range(steps):
            target = crops.batch(BATCH_SIZE)
            restored = run.network(degrade(target, degrading))
            pixel = F.mse_loss(restored, target)
            diffusion = torch.zeros(()) if run.loss is None else run.loss(restored, target, generator=diffusing)
            optimizer.zero_grad()
            (pixel + diffusion).backward()
            torch.nn.utils.clip_grad_norm_(run.network.parameters(), 1.0)
            optimizer.step()
            rate.step()
            run.pixel.append(pixel.item())
            run.diffusion.append(diffusion.item())
            progress.update(bar, advance=1, description=f"{task} {name}, pixel loss {pixel.item():.4f}")
    return runs


def held_out(name: str) -> Tensor:
    """Return the centre of a held-out photograph, [1, 3, EVALUATED, EVALUATED] in [0, 1]."""
    photograph = load(name)
    top, left = (photograph.shape[1] - EVALUATED) // 2, (photograph.shape[2] - EVALUATED) // 2
    return photograph[None, :, top : top + EVALUATED, left : left + EVALUATED]


@torch.no_grad()
def evaluate(task: str, degrade: Degradation, runs: dict[str, Run], out: Path) -> list[dict[str, str | float]]:
    """Restore the held-out photographs; write the grid of pictures and return PSNR and SSIM of each."""
    rows: list[dict[str, str | float]] = []
    pictures, captions = [], []
    generator = torch.Generator().manual_seed(1)
    for name in HELD_OUT:
        target = held_out(name)
        degraded = degrade(target, generator)
        images = {"degraded": degraded, **{column: run.network(degraded) for column, run in runs.items()}}
        pictures.append([*(image[0] for image in images.values()), target[0]])
        texts = []
        for column, image in images.items():
            psnr, ssim = fidelity(image[0], target[0])
            rows.append({"task": task, "photograph": name, "image": column, "psnr": psnr, "ssim": ssim})
            texts.append(f"{psnr:.2f} dB, {ssim:.3f}")
        captions.append([*texts, name])
    write_picture(labelled_grid(pictures, [*images, "ground truth"], captions), out / f"grid_{task}.png")
    return rows


def draw_losses(task: str, runs: dict[str, Run], path: Path) -> None:
    """Draw the pixel loss of both runs and DiffLoss of the second, smoothed over 20 steps."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()

    def smooth(values: list[float]) -> list[float]:
        return [sum(values[max(0, i - 19) : i + 1]) / (min(i, 19) + 1) for i in range(len(values))]

    for name, run in runs.items():
        axes.plot(smooth(run.pixel), label=f"pixel loss, {name}")
    axes.plot(smooth(runs["with DiffLoss"].diffusion), label="DiffLoss, weighted", linestyle="--")
    axes.set(yscale="log", xlabel="step", ylabel="loss, mean of the last 20 steps", title=task)
    axes.legend()
    axes.grid(alpha=0.3)
    write_figure(figure, path)


def tabulate(rows: list[dict[str, str | float]]) -> str:
    """Lay the results out, a line for each photograph and a mean for each task."""
    columns = list(dict.fromkeys(str(row["image"]) for row in rows))
    lines = []
    for task in dict.fromkeys(row["task"] for row in rows):
        of_task = [row for row in rows if row["task"] == task]
        for name in [*dict.fromkeys(str(row["photograph"]) for row in of_task), "mean"]:
            cells = []
            for column in columns:
                chosen = [r for r in of_task if r["image"] == column and name in ("mean", r["photograph"])]
                psnr, ssim = (sum(float(row[key]) for row in chosen) / len(chosen) for key in ("psnr", "ssim"))
                cells.append(f"{psnr:.2f} / {ssim:.3f}")
            lines.append([f"{task}, {name}", *cells])
    return markdown_table(["PSNR in dB / SSIM", *columns], lines)


def make_bundle(model: str, folder: Path) -> Path:
    """Export and verify `model`, unless an earlier run left its bundle; `CalledProcessError` if either fails."""
    bundle = folder / "bundle"
    command = [sys.executable, "-m", "diffloss_export"]
    if not bundle.exists():
        subprocess.run([*command, "onnx", model, "-o", str(bundle), "--batch-size", str(BATCH_SIZE)], check=True)
    # Where the loss is computed below.
    subprocess.run([*command, "verify", str(bundle), "--device", "cpu"], check=True)
    return bundle


def main() -> int:
    parser = OneLineParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=output_folder, required=True, help="folder for pictures, curves and table")
    parser.add_argument("--task", choices=(*DEGRADATIONS, "all"), default="all")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--bundle", type=Path, help="a bundle from diffloss-export, for square RGB images")
    source.add_argument("--model", default="builtin", help="model to export without --bundle (default: builtin)")
    parser.add_argument("--steps", type=positive_integer, default=90, help="of each training run (default: 90)")
    # Beside a pixel loss, the paper's 1e-3 and 1e-6 move a network over hundreds of thousands of steps. In hundreds,
    # only larger weights show; with these the gradients are of the same order once the pixel loss has fallen.
    parser.add_argument("--naturalness-weight", type=weight, default=0.1, help="default: 0.1, for short training runs")
    parser.add_argument("--semantic-weight", type=weight, default=1e-3, help="default: 1e-3, for short training runs")
    args = parser.parse_args()

    started = time.monotonic()
    out: Path = args.out
    out.mkdir(exist_ok=True)
    try:
        bundle = args.bundle or make_bundle(args.model, out)
        loss = DiffLoss.load(
            bundle, naturalness_weight=args.naturalness_weight, semantic_weight=args.semantic_weight, device="cpu"
        )
    except DiffLossError as error:
        parser.error(str(error))
    except subprocess.CalledProcessError as error:
        return error.returncode  # the command has said why
    if loss.resolution is not None and loss.resolution[0] != loss.resolution[1]:
        parser.error(f"{bundle} is for images of {loss.resolution[0]}x{loss.resolution[1]}; crops are square")
    rows: list[dict[str, str | float]] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        for task in DEGRADATIONS if args.task == "all" else (args.task,):
            runs = train(task, DEGRADATIONS[task], loss, args.steps, progress)
            rows += evaluate(task, DEGRADATIONS[task], runs, out)
            draw_losses(task, runs, out / f"loss_curve_{task}.png")
    table = tabulate(rows)
    write_whole(table.encode(), out / "table.md")
    write_json(rows, out / "table.json")
    print(table)
    print(f"pictures, curves and table are in {out}, after {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
