"""What the loss does to small restoration networks: `python benchmarks/study.py --work FOLDER`.

Trains networks without DiffLoss and with it, on the built-in prior, and measures them on photographs that neither the
networks nor the prior have seen: each term alone and both; the loss in half precision, plain and in difference form,
from networks that are good already; other weights and timesteps, of which the best are chosen by other photographs
than those that are reported. Every network is trained on one thread; `--processes` of them at a time.

A run that is done is kept in FOLDER, and not done again. The result is benchmarks/results/study.json, of which
`python benchmarks/study_page.py` makes docs/study.md.
"""

from __future__ import annotations

import functools
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from machine import describe
from plain import PlainLoss
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Generator, Tensor

from diffloss_export.models import load_model
from diffloss_trt import DiffLoss
from diffloss_trt.sampling import TimestepSampler, uniform_range
from diffloss_trt.unet import TappedUNet

ROOT: Final = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from arguments import OneLineParser, output_folder, positive_integer  # noqa: E402
from degradations import DEGRADATIONS, Degradation  # noqa: E402
from measures import quality  # noqa: E402
from photographs import HELD_OUT, TRAINING, VALIDATION, RandomCrops, load  # noqa: E402
from restoration_network import RestorationNetwork  # noqa: E402
from results import to_picture, write_json, write_picture  # noqa: E402

RESULT: Final = ROOT / "benchmarks/results/study.json"
SEEDS: Final = (0, 1, 2)
BATCH_SIZE, SIDE = 4, 64
STEPS, START_STEPS = 300, 900
LEARNING_RATE, LEARNING_RATE_FROM_START = 3e-3, 5e-4
# The crop that is shown: a photograph; top, left and side, in pixels.
SHOWN: Final = ("coffee", (60, 210, 144))

WEIGHTS: Final = (0.1, 1e-3)  # of naturalness and semantic
TERMS: Final = {"naturalness": (WEIGHTS[0], 0.0), "semantic": (0.0, WEIGHTS[1]), "both": WEIGHTS}
EVERYWHERE: Final = (0, 1000)
NONE: Final = "none"
FUSED: Final = "fp32"
# How the loss is computed where precision is the question.
FORMS: Final = (NONE, FUSED, "bf16 difference", "bf16 autocast", "fp16")
NOISE: Final = "noise"

Setting = tuple[tuple[float, float], tuple[int, int]]  # weights; timesteps, [low, high)
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (restored, target, timesteps, noise) -> the batch's mean


def slight_noise(clean: Tensor, generator: Generator) -> Tensor:
    """Add Gaussian noise of 8/255, at which an image has some 30 dB."""
    noise = torch.randn(clean.shape, generator=generator, device=generator.device)
    return (clean + 8 / 255 * noise).clamp(0, 1)


TASKS: Final[dict[str, Degradation]] = {**DEGRADATIONS, NOISE: slight_noise}


@dataclass(frozen=True)
class Run:
    """One training. `low`, `high`: from which timesteps the loss draws, [low, high); `form`: how it is computed."""

    task: str
    seed: int
    naturalness_weight: float = 0.0
    semantic_weight: float = 0.0
    low: int = EVERYWHERE[0]
    high: int = EVERYWHERE[1]
    form: str = FUSED
    steps: int = STEPS

    @property
    def weights(self) -> tuple[float, float]:
        return self.naturalness_weight, self.semantic_weight

    @property
    def name(self) -> str:
        """Of the file with its result."""
        weights = f"{self.naturalness_weight:g}-{self.semantic_weight:g}"
        return f"{self.task}-{self.form.replace(' ', '_')}-{weights}-{self.low}-{self.high}-{self.seed}"


def without(task: str, seed: int) -> Run:
    """Return the training with the pixel loss alone."""
    return Run(task, seed, form=NONE)


def terms_runs() -> list[Run]:
    """Each term alone, both, and neither."""
    cases = list(itertools.product(DEGRADATIONS, SEEDS))
    return [without(*case) for case in cases] + [Run(*case, *pair) for case in cases for pair in TERMS.values()]


def precision_runs() -> list[Run]:
    """The same loss in every form, from a network that is good already."""
    return [
        without(NOISE, seed) if form == NONE else Run(NOISE, seed, *WEIGHTS, form=form)
        for seed in SEEDS
        for form in FORMS
    ]


def settings() -> list[Setting]:
    """Return the weights and timesteps that are tried: less of the loss, and parts of the schedule.

    In what is left of it, from 500 on, the gradient is a thousandth of the pixel loss's.
    """
    less = (0.2 * WEIGHTS[0], 0.2 * WEIGHTS[1])
    return [(WEIGHTS, EVERYWHERE), (less, EVERYWHERE), (WEIGHTS, (0, 250)), (WEIGHTS, (250, 500))]


def settings_runs(chosen: Sequence[Setting], seeds: Iterable[int]) -> list[Run]:
    """Return the trainings with some of `settings`."""
    return [Run(task, seed, *weights, *part) for weights, part in chosen for task in DEGRADATIONS for seed in seeds]


def choose(results: Sequence[dict[str, Any]]) -> Setting:
    """Return the setting with the lowest GMSD on the photographs of `VALIDATION`, the mean over the tasks at seed 0."""

    def mean(setting: Setting) -> float:
        names = {run.name for run in settings_runs([setting], SEEDS[:1])}
        values = [
            result["quality"][photograph]["gmsd"]
            for result in results
            if result["name"] in names
            for photograph in VALIDATION
        ]
        return float(sum(values) / len(values))

    return min(settings(), key=mean)


# One training


def make_loss(run: Run, folder: Path) -> Loss | None:
    """Return how the loss of a run is computed; None where there is none."""
    if run.form == NONE:
        return None
    if run.form in (FUSED, "bf16 difference"):
        backend = "onnxruntime" if run.form == FUSED else "inductor"
        return _called(DiffLoss.load(folder / f"bundle-{run.form[:4]}", backend, "cpu", *run.weights))
    model = load_model("builtin")
    return PlainLoss(TappedUNet(model.unet, model.schedule), run.form, run.weights)


def _called(loss: DiffLoss) -> Loss:
    return lambda restored, target, timesteps, noise: loss(restored, target, timesteps=timesteps, noise=noise)


def push(loss: Callable[..., Tensor], restored: Tensor, *others: Tensor) -> Tensor:
    """Return the gradient of `loss(restored, *others)` at the restored images."""
    leaf = restored.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf, *others), leaf)
    return gradient


def train(run: Run, folder: Path) -> dict[str, Any]:
    """Train a network, and return what was recorded of it as JSON values.

    share: the size of the loss's gradient at the restored images, beside the pixel loss's, in the first and in the last
        tenth of the steps. gradient_error: where the training ended, against float64; for the task `NOISE`.
    """
    started = time.monotonic()
    torch.manual_seed(run.seed)
    network = RestorationNetwork()
    rate = LEARNING_RATE
    if run.task == NOISE and (start := start_of(run.seed, folder).with_suffix(".pt")).exists():
        network.load_state_dict(torch.load(start, weights_only=True))
        rate = LEARNING_RATE_FROM_START
    loss, schedule, degrade = make_loss(run, folder), load_model("builtin").schedule, TASKS[run.task]
    crops = RandomCrops(list(TRAINING), SIDE, seed=run.seed)
    degrading, diffusing = Generator().manual_seed(run.seed), Generator().manual_seed(run.seed)
    sampler = TimestepSampler(uniform_range(schedule, run.low, run.high), low_discrepancy=True, generator=diffusing)
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=run.steps, pct_start=0.1)
    shares, curve = [], []
    for step in range(run.steps):
        target = crops.batch(BATCH_SIZE)
        restored = network(degrade(target, degrading))
        gradient = push(F.mse_loss, restored, target)
        # Drawn by every run, so that what follows is the same for all.
        timesteps, noise = sampler(BATCH_SIZE), torch.randn(target.shape, generator=diffusing)
        if loss is not None:
            pushed = push(loss, restored, target, timesteps, noise)
            shares.append(float(pushed.norm() / gradient.norm()))
            gradient = gradient + pushed
        optimizer.zero_grad()
        restored.backward(gradient)
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        rates.step()
        if run.task == NOISE and (step + 1) % max(1, run.steps // 10) == 0:
            psnr = [measured["psnr"] for measured in evaluate(network, run.task, HELD_OUT).values()]
            curve.append({"step": step + 1, "psnr": sum(psnr) / len(psnr)})
    result = asdict(run) | {"name": run.name, "quality": evaluate(network, run.task, [*HELD_OUT, *VALIDATION])}
    if shares:
        tenth = max(1, run.steps // 10)
        result["share"] = [sum(part) / tenth for part in (shares[:tenth], shares[-tenth:])]
    if curve:
        result["curve"] = curve
    if run.task == NOISE and loss is not None:
        result["gradient_error"] = gradient_error(loss, run, network)
    if run.seed == SEEDS[0] and run.task in DEGRADATIONS:
        photograph, place = SHOWN
        write_picture(to_picture(cut(restore(network, run.task, photograph), place)), folder / f"{run.name}.png")
    torch.save(network.state_dict(), folder / f"{run.name}.pt")
    return result | {"seconds": round(time.monotonic() - started, 1)}


def cut(image: Tensor, place: tuple[int, int, int]) -> Tensor:
    """Return a square of an image [3, H, W]; `place`: top, left and side."""
    top, left, side = place
    return image[:, top : top + side, left : left + side]


def degraded(task: str, photograph: str) -> Tensor:
    """Return a whole photograph with the degradation of a task, [3, H, W], the same for every network."""
    return TASKS[task](load(photograph)[None], Generator().manual_seed(1))[0]


@torch.no_grad()
def restore(network: RestorationNetwork, task: str, photograph: str) -> Tensor:
    """Return what a network makes of `degraded`."""
    restored: Tensor = network(degraded(task, photograph)[None])[0]
    return restored


def evaluate(network: RestorationNetwork, task: str, photographs: Iterable[str]) -> dict[str, dict[str, float]]:
    """Return every measure of whole photographs, by the photograph."""
    return {photograph: quality(restore(network, task, photograph), load(photograph)) for photograph in photographs}


def gradient_error(loss: Loss, run: Run, network: RestorationNetwork) -> float:
    """Return how far the gradient is from that of float64, relative, on crops restored by the network: the median."""
    model = load_model("builtin")
    exact = DiffLoss.from_unet(
        model.unet.double(),
        model.schedule,
        naturalness_weight=run.naturalness_weight,
        semantic_weight=run.semantic_weight,
    )
    target = RandomCrops(list(TRAINING), SIDE, seed=99).batch(4 * BATCH_SIZE)
    generator = Generator().manual_seed(99)
    with torch.no_grad():
        restored = network(TASKS[run.task](target, generator))
    errors = []
    for first in range(0, len(target), BATCH_SIZE):
        rows = slice(first, first + BATCH_SIZE)
        timesteps = torch.linspace(run.low + 10, run.high - 100, BATCH_SIZE).long()
        noise = torch.randn(target[rows].shape, generator=generator)
        found = push(loss, restored[rows], target[rows], timesteps, noise)
        expected = push(_called(exact), restored[rows].double(), target[rows].double(), timesteps, noise.double())
        difference = (found.double() - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
        errors += difference.tolist()
    return float(torch.tensor(errors).median())


# All of them


def one(run: Run, folder: Path) -> None:
    """Do a run in this process, on one thread, and keep its result."""
    torch.set_num_threads(1)
    write_json(train(run, folder), folder / f"{run.name}.json")


def do(runs: Iterable[Run], folder: Path, processes: int, bar: Callable[[int, int], None]) -> list[dict[str, Any]]:
    """Do what is not done yet, and return the results of all; `bar` is told how many there are and are done."""
    every = list(dict.fromkeys(runs))
    missing = [run for run in every if not (folder / f"{run.name}.json").exists()]
    bar(len(every), len(every) - len(missing))
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        waiting = [pool.submit(one, run, folder) for run in missing]
        for done, future in enumerate(as_completed(waiting), len(every) - len(missing) + 1):
            future.result()
            bar(len(every), done)
    return [json.loads((folder / f"{run.name}.json").read_text()) for run in every]


def start_of(seed: int, folder: Path) -> Path:
    """Return the path, without suffix, of what is kept of the training that makes the good network of a seed."""
    return folder / "starts" / without(NOISE, seed).name


def prepare(folder: Path, processes: int) -> None:
    """Export the prior in both precisions, and train the networks that are good already."""
    for precision in ("fp32", "bf16"):
        bundle = folder / f"bundle-{precision}"
        if not bundle.exists():
            command = [sys.executable, "-m", "diffloss_export", "onnx", "builtin", "-o", str(bundle)]
            subprocess.run([*command, "--batch-size", str(BATCH_SIZE), "--precision", precision], check=True)
    starts = folder / "starts"
    starts.mkdir(exist_ok=True)
    do([Run(NOISE, seed, form=NONE, steps=START_STEPS) for seed in SEEDS], starts, processes, lambda *_: None)


def main() -> int:
    parser = OneLineParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=output_folder, required=True, help="folder for what is done")
    parser.add_argument("--processes", type=positive_integer, default=os.cpu_count(), help="default: as many as cores")
    args = parser.parse_args()
    folder: Path = args.work
    folder.mkdir(exist_ok=True)
    os.environ["DIFFLOSS_CACHE"] = str(folder.resolve() / "plans")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:

        def bar(what: str) -> Callable[[int, int], None]:
            shown = progress.add_task(what, total=None)
            return lambda total, completed: progress.update(shown, total=total, completed=completed)

        progress.add_task("exporting the prior, and training what to start from", total=None)
        prepare(folder, args.processes)
        work = functools.partial(do, folder=folder, processes=args.processes)
        terms = work(terms_runs(), bar=bar("each term"))
        precision = work(precision_runs(), bar=bar("half precision"))
        tried = work(settings_runs(settings(), SEEDS[:1]), bar=bar("settings"))
        chosen = choose(tried)
        confirmed = work(settings_runs([chosen], SEEDS), bar=bar("the chosen setting"))
    starts = [json.loads(start_of(seed, folder).with_suffix(".json").read_text()) for seed in SEEDS]
    results = {result["name"]: result for result in (*terms, *precision, *tried, *confirmed)}
    write_json(
        describe() | {"chosen": chosen, "starts": starts, "runs": list(results.values())},
        RESULT,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
