"""How wrong is the gradient of DiffLoss, in several arithmetics, as the restored image gets nearer to the target?

    python benchmarks/precision.py [--name NAME]     measure, then write all that is named below
    python benchmarks/precision.py --quick           a part of it in under a minute; writes nothing
    python benchmarks/precision.py --from JSON       draw and tabulate an earlier run again
    python benchmarks/precision.py --plain-from JSON measure the difference form alone, and take the rest from there

Every arithmetic computes one function: the weights of each UNet are rounded beforehand to numbers that all formats
hold, and images are float32. The reference is the plain formula in float64. An error is that of one sample:
||a - b|| / ||b|| of the gradient with respect to the restored image, |a - b| / b of the terms.

Written are benchmarks/results/precision-NAME.json, docs/images/precision.png and the tables of docs/precision.md.
The exit status is 1 unless the difference form stays within the tolerances of `diffloss_export` at every sample.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Generator, Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from machine import describe  # noqa: E402
from pictures import to_png  # noqa: E402
from sections import joined  # noqa: E402

from degradations import low_light, rain  # noqa: E402
from diffloss_export.models import load_model  # noqa: E402
from diffloss_trt import DiffLoss, NoiseSchedule  # noqa: E402
from diffloss_trt.contract import (  # noqa: E402
    NATURALNESS_WEIGHT,
    NOISE,
    PRECISIONS,
    RESTORED,
    SEMANTIC_WEIGHT,
    TARGET,
    TIMESTEPS,
)
from diffloss_trt.gradient import trace_gradient  # noqa: E402
from diffloss_trt.objective import combine, mean_square  # noqa: E402
from diffloss_trt.tolerances import DIFFERENCE, Tolerance  # noqa: E402
from diffloss_trt.unet import TappedUNet  # noqa: E402
from photographs import HELD_OUT, RandomCrops  # noqa: E402
from results import markdown_table, write_whole  # noqa: E402

RESULTS, FIGURE, PAGE = ROOT / "benchmarks/results", ROOT / "docs/images/precision.png", ROOT / "docs/precision.md"
BEGIN, END = "<!-- precision:begin -->", "<!-- precision:end -->"

STEPS = (0, 10, 100, 500, 999)
SWEEP_DB = tuple(float(decibels) for decibels in range(15, 61, 5))
ERROR_DB = (20.0, 35.0, 50.0)

Weights = tuple[float, float]  # of naturalness and of semantic
BALANCED: Weights = (1.0, 1.0)
WEIGHTS: tuple[Weights, ...] = (BALANCED, (1.0, 1e-6), (1e-6, 1.0))

WHITE = "white noise"

aten = torch.ops.aten


# What is compared on


@dataclass(frozen=True)
class Model:
    """A UNet whose weights every arithmetic holds exactly, float32, and the side of the images that it is given."""

    name: str
    unet: Any
    schedule: NoiseSchedule
    side: int


class Place(NamedTuple):
    """What an error was measured at."""

    unet: str
    error: str
    photograph: str
    decibels: float
    timestep: int
    weights: Weights


@dataclass(frozen=True)
class Sample:
    """One image and its restoration, [1, 3, H, W] in [-1, 1], and the noise that both are mixed with; float32."""

    place: Place
    restored: Tensor
    target: Tensor
    noise: Tensor


# Two layouts of tests/unets.py, and that of the paper's UNet, ADM for 256x256 images, with few layers and channels.
FOUR_LEVELS: dict[str, Any] = {
    "layers_per_block": 2,
    "block_out_channels": (16, 16, 32, 32),
    "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
}
ADM_STYLE: dict[str, Any] = {
    "out_channels": 6,
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "resnet_time_scale_shift": "scale_shift",
    "attn_norm_num_groups": 8,
}
ADM_SMALL: dict[str, Any] = ADM_STYLE | {
    "layers_per_block": 1,
    "block_out_channels": (16, 32, 32),
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "norm_num_groups": 4,
}
ADM_256: dict[str, Any] = ADM_STYLE | {
    "layers_per_block": 1,
    "block_out_channels": (16, 16, 32, 32, 32, 32),
    "down_block_types": ("ResnetDownsampleBlock2D",) * 3 + ("AttnDownBlock2D",) * 3,
    "up_block_types": ("AttnUpBlock2D",) * 3 + ("ResnetUpsampleBlock2D",) * 3,
    "norm_num_groups": 8,
}


def prior() -> Model:
    """Return the built-in prior."""
    loaded = load_model("builtin")
    return Model("built-in prior", round_weights(loaded.unet), loaded.schedule, 64)


def random_model(name: str, configuration: dict[str, Any], side: int) -> Model:
    """Return a UNet of random weights, none of them left at zero or one, on the paper's schedule."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DModel(sample_size=side, attention_head_dim=8, **configuration)
        for parameter in unet.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
            elif not parameter.any():
                nn.init.normal_(parameter, std=0.05)
    schedule = NoiseSchedule.from_scheduler(DDPMScheduler(1000, beta_schedule="linear"))
    return Model(name, round_weights(unet), schedule, side)


def round_weights(unet: Any) -> Any:
    """Round the weights to bfloat16's 8 digits within float16's range, in place: all formats hold such numbers."""
    for parameter in unet.requires_grad_(False).parameters():
        parameter.copy_(parameter.bfloat16().half())
    return unet.eval()


def photographs(side: int) -> dict[str, Tensor]:
    """Return a crop of each photograph that the prior has not seen, float32 [1, 3, side, side] in [0, 1]."""
    return {name: RandomCrops([name], side, seed=0).batch(1) for name in HELD_OUT}


def at_distance(target: Tensor, error: Tensor, decibels: float) -> Tensor:
    """Return `target`, in [-1, 1], plus so much of `error` as makes the PSNR `decibels`."""
    wanted = 2 * 10 ** (-decibels / 20)
    return (target + error.double() * (wanted / error.double().square().mean().sqrt())).float()


def sweep(model: Model, distances: Sequence[float], timesteps: Sequence[int], names: Iterable[str]) -> Iterator[Sample]:
    """Yield photographs with white noise, the same noise at every distance."""
    generator = Generator().manual_seed(1)
    cut = photographs(model.side)
    for name in names:
        target = cut[name] * 2 - 1
        for timestep in timesteps:
            error, noise = torch.randn(2, *target.shape, generator=generator)
            for decibels in distances:
                place = Place(model.name, WHITE, name, decibels, timestep, BALANCED)
                yield Sample(place, at_distance(target, error, decibels), target, noise)


def blur(clean: Tensor, generator: Generator) -> Tensor:
    """Blur [B, 3, H, W] by a Gaussian of standard deviation 2 pixels; nothing is random."""
    place = torch.arange(-6.0, 7.0)
    line = torch.exp(-(place**2) / 8)
    kernel = (line[:, None] * line / line.sum() ** 2).expand(3, 1, -1, -1)
    return F.conv2d(F.pad(clean, (6, 6, 6, 6), mode="reflect"), kernel, groups=3)


DEGRADATIONS = {"blur": blur, "low light": low_light, "rain": rain}


def restorations(
    model: Model, distances: Sequence[float], timesteps: Iterable[int], weights: Sequence[Weights]
) -> Iterator[Sample]:
    """Yield degraded photographs, restored in part: the degradation's own error, scaled down (or up) to a distance."""
    generator = Generator().manual_seed(2)
    for (kind, degrade), (name, clean) in zip(DEGRADATIONS.items(), photographs(model.side).items(), strict=True):
        target, degraded = clean * 2 - 1, degrade(clean, generator) * 2 - 1
        for timestep in timesteps:
            noise = torch.randn(target.shape, generator=generator)
            for decibels in distances:
                restored = at_distance(target, degraded - target, decibels)
                for pair in weights:
                    yield Sample(Place(model.name, kind, name, decibels, timestep, pair), restored, target, noise)


# The arithmetics

# The operations that multiply and sum, and which of their arguments are the factors.
FACTORS: dict[Any, tuple[int, ...]] = {
    aten.convolution.default: (0, 1),
    aten.convolution_backward.default: (0, 1, 2),
    aten.mm.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.baddbmm.default: (1, 2),
}


class TF32Products(TorchDispatchMode):
    """Rounds the factors of products to TF32's 11 digits, and sums in float32, as NVIDIA's tensor cores do."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        factors = FACTORS.get(func, ())
        args = [to_tf32(arg) if place in factors else arg for place, arg in enumerate(args)]
        return func(*args, **(kwargs or {}))


class HalfProducts(TorchDispatchMode):
    """Sums products of half-precision factors in float32, and rounds once at the end, as tensor cores do.

    PyTorch's own kernels for CPUs do so too where they have any; its float16 convolution is a hundred times slower.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        factors = FACTORS.get(func)
        dtype = args[factors[0]].dtype if factors else torch.float32
        if dtype not in (torch.float16, torch.bfloat16):
            return func(*args, **(kwargs or {}))
        widened = tree_map_only(Tensor, Tensor.float, args)
        return tree_map_only(Tensor, lambda result: result.to(dtype), func(*widened, **(kwargs or {})))


def to_tf32(number: Tensor) -> Tensor:
    """Round float32 numbers to a mantissa of 10 bits, halves to even."""
    bits = number.contiguous().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


class Result(NamedTuple):
    """The two terms, and the gradient [1, 3, H, W] of their weighted sum, float64."""

    naturalness: float
    semantic: float
    gradient: Tensor


Arithmetic = Callable[[Sample], Result]
Mode = Callable[[], AbstractContextManager[Any]]


def converted(model: Model, dtype: torch.dtype) -> Any:
    # Not `unet.to`: diffusers' own logs a warning about modules to be kept in float32, of which there are none.
    return nn.Module.to(copy.deepcopy(model.unet), dtype)


def plain(model: Model, dtype: torch.dtype, *modes: Mode) -> Arithmetic:
    """Return the plain formula: `DiffLoss.from_unet`, with a half UNet through its recompute path.

    That is kinder to half precision than a tape: images are widened up to the UNet, features are subtracted in float32,
    and cotangents are scaled to order one.
    """
    loss = DiffLoss.from_unet(converted(model, dtype), model.schedule, reduction="none", value_range=(-1.0, 1.0))
    outside = torch.promote_types(dtype, torch.float32)

    def compute(sample: Sample) -> Result:
        loss.naturalness_weight, loss.semantic_weight = sample.place.weights
        restored = sample.restored.to(outside, copy=True).requires_grad_()
        target, noise = sample.target.to(outside), sample.noise.to(outside)
        with ExitStack() as stack:
            for mode in modes:
                stack.enter_context(mode())
            terms = loss.terms(restored, target, timesteps=torch.tensor([sample.place.timestep]), noise=noise)
            (gradient,) = torch.autograd.grad(terms.total.sum(), restored)
        return Result(terms.naturalness.item(), terms.semantic.item(), gradient.double())

    return compute


def reference(model: Model) -> Arithmetic:
    """Return the plain formula in float64; each term by itself, so that the same images at other weights are quick."""
    compute = plain(model, torch.float64)
    latest: dict[tuple[int, ...], tuple[Sample, Result, Result]] = {}

    def combined(sample: Sample) -> Result:
        images = (id(sample.restored), id(sample.target), id(sample.noise))
        if images not in latest:
            natural, semantic = (replace(sample, place=sample.place._replace(weights=w)) for w in ((1, 0), (0, 1)))
            latest.clear()
            latest[images] = (sample, compute(natural), compute(semantic))  # holds the images, and so their ids
        _, natural_alone, semantic_alone = latest[images]
        gradient = combine(natural_alone.gradient, semantic_alone.gradient, *sample.place.weights)
        return Result(natural_alone.naturalness, semantic_alone.semantic, gradient)

    return combined


def autocast(model: Model) -> Arithmetic:
    """Return the formula as one writes it with bf16 autocast: both forwards inside, backward through the tape."""
    tapped = TappedUNet(converted(model, torch.float32), model.schedule)

    def features(image: Tensor, sample: Sample, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        noisy = model.schedule.add_noise(image, sample.noise, timesteps)
        with torch.autocast("cpu", torch.bfloat16):
            encoded = tapped.encode(noisy, timesteps)
            return encoded.bottleneck, model.schedule.noise_from(tapped.decode(encoded), noisy, timesteps)

    def compute(sample: Sample) -> Result:
        restored, timesteps = sample.restored.clone().requires_grad_(), torch.tensor([sample.place.timestep])
        with HalfProducts():  # type: ignore[no-untyped-call]
            with torch.no_grad():
                of_target = features(sample.target, sample, timesteps)
            of_restored = features(restored, sample, timesteps)
            semantic, naturalness = (
                mean_square(a.float() - b.float()) for a, b in zip(of_restored, of_target, strict=True)
            )
            (gradient,) = torch.autograd.grad(combine(naturalness, semantic, *sample.place.weights).sum(), restored)
        return Result(naturalness.item(), semantic.item(), gradient.double())

    return compute


def difference_form(model: Model, dtype: torch.dtype) -> Arithmetic:
    """Return the gradient graph's program, run operation by operation."""
    tapped = TappedUNet(converted(model, dtype), model.schedule)
    program = trace_gradient(tapped, 1, (model.side, model.side), with_noise=True)
    run = program.bind(tapped.unet.state_dict())

    def compute(sample: Sample) -> Result:
        inputs = {RESTORED: sample.restored, TARGET: sample.target, NOISE: sample.noise}
        numbers = (sample.place.timestep, *sample.place.weights)
        names = (TIMESTEPS, NATURALNESS_WEIGHT, SEMANTIC_WEIGHT)
        inputs |= {name: torch.tensor([float(number)]) for name, number in zip(names, numbers, strict=True)}
        with torch.no_grad(), HalfProducts():  # type: ignore[no-untyped-call]
            naturalness, semantic, gradient = run(*(inputs[name] for name in program.inputs))
        return Result(naturalness.item(), semantic.item(), gradient.double())

    return compute


def decomposed_attention() -> AbstractContextManager[Any]:
    context: AbstractContextManager[Any] = sdpa_kernel(SDPBackend.MATH)
    return context


ARITHMETICS: dict[str, Callable[[Model], Arithmetic]] = {
    "plain fp32": lambda model: plain(model, torch.float32),
    "plain TF32": lambda model: plain(model, torch.float32, TF32Products, decomposed_attention),
    "plain fp16": lambda model: plain(model, torch.float16, HalfProducts),
    "plain bf16": lambda model: plain(model, torch.bfloat16, HalfProducts),
    "bf16 autocast": autocast,
    "difference fp32": lambda model: difference_form(model, PRECISIONS["fp32"]),
    "difference fp16": lambda model: difference_form(model, PRECISIONS["fp16"]),
    "difference bf16": lambda model: difference_form(model, PRECISIONS["bf16"]),
}
OURS = {f"difference {precision}": tolerance for precision, tolerance in DIFFERENCE.items()}
SHORT = ("plain fp32", "plain fp16", "plain bf16", *OURS)


# Measuring


class Errors(NamedTuple):
    """Relative errors of the terms and of the gradient, and one minus the gradient's cosine."""

    naturalness: float
    semantic: float
    gradient: float
    angle: float


def compare(found: Result, expected: Result) -> Errors:
    a, b = found.gradient, expected.gradient
    norm = float(a.norm() * b.norm())
    # A gradient that has been rounded to zero points nowhere.
    cosine = float((a * b).sum()) / norm if norm else 0.0
    errors = (
        abs(found.naturalness - expected.naturalness) / expected.naturalness,
        abs(found.semantic - expected.semantic) / expected.semantic,
        float((a - b).norm() / b.norm()),
        1 - cosine,
    )
    return Errors(*(error if math.isfinite(error) else math.inf for error in errors))


@dataclass(frozen=True)
class Row:
    """The errors of each arithmetic at one place."""

    place: Place
    errors: dict[str, Errors]


def measure(model: Model, samples: Sequence[Sample], arithmetics: Sequence[str], progress: Progress) -> list[Row]:
    bar = progress.add_task(f"{model.name}: tracing", total=len(samples))
    expected_of = reference(model)
    found_by = {name: ARITHMETICS[name](model) for name in arithmetics}
    rows = []
    for sample in samples:
        place, expected = sample.place, expected_of(sample)
        rows.append(Row(place, {name: compare(compute(sample), expected) for name, compute in found_by.items()}))
        description = f"{model.name}: {place.error}, {place.decibels:g} dB, t = {place.timestep}"
        progress.update(bar, advance=1, description=description)
    return rows


def measure_all(quick: bool, wanted: Collection[str]) -> list[Row]:
    """Return the rows of the whole study, or of a part that takes less than a minute, for some of the arithmetics."""
    every, short = ([name for name in names if name in wanted] for names in (ARITHMETICS, SHORT))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    rows: list[Row] = []
    with Progress(*columns) as progress:
        if quick:
            model = prior()
            samples = [
                *sweep(model, ERROR_DB, STEPS[1::3], ["chelsea"]),
                *restorations(model, ERROR_DB[1:2], STEPS[2:3], WEIGHTS[:1]),
            ]
            return measure(model, samples, every, progress)
        small = (random_model("random, four levels", FOUR_LEVELS, 32), random_model("random, ADM", ADM_SMALL, 32))
        for model in (prior(), *small):
            rows += measure(model, [*sweep(model, SWEEP_DB, STEPS, HELD_OUT)], every, progress)
        for model, steps in ((prior(), STEPS), (random_model("random, ADM at 256x256", ADM_256, 256), STEPS[::2])):
            rows += measure(model, [*restorations(model, ERROR_DB, steps, WEIGHTS)], short, progress)
    return rows


def failures(rows: Iterable[Row]) -> list[str]:
    """Say where the difference form is beyond its tolerances."""
    return [
        f"{name}, {row.place}: {errors}"
        for row in rows
        for name, tolerance in OURS.items()
        if not within(errors := row.errors[name], tolerance)
    ]


def within(errors: Errors, tolerance: Tolerance) -> bool:
    return (
        max(errors.naturalness, errors.semantic) <= tolerance.term
        and errors.gradient <= tolerance.gradient
        and errors.angle <= 1 - tolerance.cosine
    )


# What is written


def with_plain(rows: Sequence[Row], earlier: Sequence[Row]) -> list[Row]:
    """Return rows of the difference form with what an earlier run has found of the other arithmetics."""
    found = {row.place: row.errors for row in earlier}
    return [Row(row.place, {**found[row.place], **row.errors}) for row in rows]


def to_json(rows: Sequence[Row], plain: dict[str, Any] | None = None) -> str:
    """Return machine, versions and every error, to three digits; a place on each line, null for what was left out.

    plain: the head of the run that the other arithmetics than the difference form are from, if that is another one.
    """
    names = tuple(ARITHMETICS)
    head = describe()
    if plain is not None:
        run = plain.get("plain", plain)  # they may have been taken from another one there too
        head["plain"] = {key: run[key] for key in ("device", "date")}
    head |= {"place": Place._fields, "arithmetics": names, "errors": Errors._fields}
    lines = []
    for row in rows:
        errors = [[float(f"{e:.3g}") for e in row.errors[name]] if name in row.errors else None for name in names]
        lines.append(json.dumps([row.place, errors], separators=(",", ":")))
    return json.dumps(head, indent=1).removesuffix("\n}") + ',\n "rows": [\n' + ",\n".join(lines) + "\n]}\n"


def from_json(text: str) -> tuple[dict[str, Any], list[Row]]:
    content = json.loads(text)
    rows = []
    for (*start, weights), errors in content.pop("rows"):
        by_name = zip(content["arithmetics"], errors, strict=True)
        place = Place._make((*start, tuple(weights)))
        rows.append(Row(place, {name: Errors(*e) for name, e in by_name if e}))
    return content, rows


def selected(rows: Iterable[Row], name: str, **wanted: Any) -> np.ndarray:
    """Return the errors [N, 4] of an arithmetic at the places that have these values."""
    return np.array(
        [row.errors[name] for row in rows if all(getattr(row.place, key) == value for key, value in wanted.items())]
    )


def tables(rows: Sequence[Row], head: dict[str, Any]) -> str:
    """Lay the results out in Markdown."""
    white = [row for row in rows if row.place.error == WHITE]
    left = [row for row in rows if row.place.error != WHITE]
    measured = (
        f"Measured on {head['date']} on {head['device']}, with PyTorch {head['versions']['torch']}, by "
        "`python benchmarks/precision.py`"
    )
    if plain := head.get("plain"):
        measured += f"; everything but the difference form was measured on {plain['date']} on {plain['device']}"
    parts = (
        f"{measured}.",
        "Gradient, ||a - b|| / ||b||: median / worst sample, white noise",
        sweep_table(white, lambda errors: errors[:, 2]),
        "Loss terms, |a - b| / b, the larger of the two: median / worst sample, white noise",
        sweep_table(white, lambda errors: errors[:, :2].max(1)),
        "Gradient's cosine: median / worst sample, white noise",
        sweep_table(white, lambda errors: errors[:, 3], lambda angle: f"{1 - angle:.4f}"),
        "Gradient: worst sample over timesteps and weights, partial restorations",
        restoration_table(left),
        "Difference form: worst sample over both test sets, and the limit",
        tolerance_table(rows),
    )
    return joined(parts)


def sweep_table(
    rows: Sequence[Row],
    quantity: Callable[[np.ndarray], np.ndarray],
    text: Callable[[float], str] = lambda error: brief(error),
) -> str:
    distances = sorted({row.place.decibels for row in rows})
    if len(distances) > 5:
        distances = distances[1::2]
    lines = []
    for name in ARITHMETICS:
        errors = [quantity(selected(rows, name, decibels=decibels)) for decibels in distances]
        lines.append([name, *(f"{text(float(np.median(e)))} / {text(float(e.max()))}" for e in errors)])
    return markdown_table(["", *(f"{decibels:g} dB" for decibels in distances)], lines)


def restoration_table(rows: Sequence[Row]) -> str:
    lines = []
    for unet, error, decibels in dict.fromkeys((r.place.unet, r.place.error, r.place.decibels) for r in rows):
        worst = (selected(rows, name, unet=unet, error=error, decibels=decibels)[:, 2].max() for name in SHORT)
        lines.append([f"{unet}, {error}, {decibels:g} dB", *(brief(float(error)) for error in worst)])
    return markdown_table(["", *SHORT], lines)


def tolerance_table(rows: Sequence[Row]) -> str:
    lines = []
    for name, tolerance in OURS.items():
        worst = selected(rows, name).max(0)
        cells = zip(
            (max(worst[0], worst[1]), worst[2], worst[3]),
            (tolerance.term, tolerance.gradient, 1 - tolerance.cosine),
            strict=True,
        )
        held = "yes" if all(within(row.errors[name], tolerance) for row in rows) else "NO"
        lines.append([name, str(len(rows)), *(f"{brief(float(e))} of {brief(limit)}" for e, limit in cells), held])
    return markdown_table(["", "samples", "terms", "gradient", "1 - cosine", "within limits"], lines)


def brief(number: float) -> str:
    """Write a positive number with two digits: 3.2e-4, 0.15, 67, inf."""
    if number >= 0.1 or number == 0:
        return f"{number:.2g}" if number < 100 or math.isinf(number) else f"{number:.0f}"
    mantissa, exponent = f"{number:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


# Colours of Okabe and Ito, which the colour-blind tell apart. Ours are drawn thick and with marks, the plain ones thin
# and dashed, so that the two also part in grey.
COLOURS = {"fp32": "#0072B2", "TF32": "#8F4A77", "fp16": "#D55E00", "bf16": "#007A58"}


def draw(rows: Sequence[Row]) -> Figure:
    """Draw the gradient's error over PSNR: the median sample of each arithmetic, and beside it the worst."""
    white = [row for row in rows if row.place.error == WHITE]
    distances = sorted({row.place.decibels for row in white})
    with matplotlib.rc_context({"font.size": 7.5, "axes.linewidth": 0.6, "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(7.0, 3.0), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        takes: dict[str, Callable[[Any], Any]] = {"median sample": np.median, "worst sample": np.max}
        for axes, (title, take) in zip(panels, takes.items(), strict=True):
            for name in ARITHMETICS:
                errors = [float(take(selected(white, name, decibels=decibels)[:, 2])) for decibels in distances]
                draw_line(axes, name, distances, errors)
            axes.set(title=title, yscale="log", xlabel="PSNR of the restored image (dB)")
            axes.grid(linewidth=0.3, color="0.85")
            axes.spines[["top", "right"]].set_visible(False)
        panels[0].set_ylabel("relative error of the gradient")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure


def draw_line(axes: Axes, name: str, distances: Sequence[float], errors: Sequence[float]) -> None:
    ours = name in OURS
    style: dict[str, Any] = {"linewidth": 1.8, "marker": "o", "markersize": 3} if ours else {"linewidth": 0.9}
    linestyle = "-" if ours else (":" if name == "bf16 autocast" else "--")
    colour = COLOURS[name.removesuffix(" autocast").split()[-1]]
    axes.plot(distances, errors, color=colour, linestyle=linestyle, label=name, **style)


def write_page(text: str) -> None:
    page = PAGE.read_text()
    start, end = page.index(BEGIN) + len(BEGIN), page.index(END)
    write_whole((page[:start] + "\n" + text + page[end:]).encode(), PAGE)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--name", default="cpu", help="name of the results (default: cpu)")
    parser.add_argument("--quick", action="store_true", help="measure a part in under a minute; write nothing")
    parser.add_argument("--from", dest="earlier", type=Path, metavar="JSON", help="results to draw and tabulate again")
    parser.add_argument(
        "--plain-from", type=Path, metavar="JSON", help="results to take all but the difference form from"
    )
    args = parser.parse_args()
    if args.earlier:
        text = args.earlier.read_text()
    elif args.plain_from:
        plain_head, earlier = from_json(args.plain_from.read_text())
        text = to_json(with_plain(measure_all(args.quick, OURS), earlier), plain_head)
    else:
        text = to_json(measure_all(args.quick, ARITHMETICS))
    head, rows = from_json(text)
    page = tables(rows, head)
    print(page)
    if not args.quick:
        if not args.earlier:
            RESULTS.mkdir(parents=True, exist_ok=True)
            write_whole(text.encode(), RESULTS / f"precision-{args.name}.json")
        write_whole(to_png(draw(rows), json.loads(text), dpi=300), FIGURE)
        write_page(page)
    beyond = failures(rows)
    for line in beyond:
        print(f"beyond the tolerance: {line}", file=sys.stderr)
    return 1 if beyond else 0


if __name__ == "__main__":
    sys.exit(main())
