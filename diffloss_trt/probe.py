"""Images to compare a loss on, what it should be there, and how far off it is; a bundle carries some of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import torch
from torch import Tensor

from diffloss_engine.bundle import Bundle
from diffloss_engine.errors import BundleError, DiffLossError, ParityError
from diffloss_engine.fp32_precision import fp32_settings
from diffloss_engine.session import Session
from diffloss_engine.tensor_files import load_tensors, save_tensors
from diffloss_trt.contract import (
    GRADIENT,
    NATURALNESS,
    REFERENCE,
    SEMANTIC,
    SEMANTIC_GRADIENT,
    agreed_shape,
    read_channels,
    read_schedule,
)
from diffloss_trt.gradient import run_gradient_graph
from diffloss_trt.tolerances import DIFFERENCE, PLAIN, PLAIN_DB, PLAIN_PLACES, Tolerance, timestep_at

if TYPE_CHECKING:
    from diffloss_trt.evaluators import Evaluator
    from diffloss_trt.objective import Terms

# The weights of naturalness and semantic with which each gradient graph is compared: balanced, so that an error in
# either term shows in the gradient.
CHECK_WEIGHTS: Final = {GRADIENT: (1.0, 1.0), SEMANTIC_GRADIENT: (0.0, 1.0)}


@dataclass(frozen=True)
class Probe:
    """Images to compare on, in [-1, 1], [N, C, H, W]: float64 tensors of float32 numbers."""

    target: Tensor
    restored: Tensor
    noise: Tensor
    timesteps: Tensor

    @classmethod
    def make(cls, channels: int, resolution: tuple[int, int], timesteps: Tensor, decibels: Sequence[float]) -> Probe:
        """Draw one target for each of `timesteps` [N], with the falling spectrum of photographs.

        `restored` is that and white noise, of a PSNR of so many `decibels` [N]. Equal arguments give equal images.
        """
        generator = torch.Generator().manual_seed(0)
        shape = (len(timesteps), channels, *resolution)

        def normal() -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        frequency = torch.hypot(
            *torch.meshgrid(*(torch.fft.fftfreq(side).double() for side in resolution), indexing="ij")
        )
        spectrum = torch.fft.fft2(normal()) / frequency.clamp(min=1 / max(resolution))
        image = torch.fft.ifft2(spectrum).real
        target = (image / (3 * image.std(dim=(1, 2, 3), keepdim=True))).clamp(-1, 1)
        error = 2 * 10 ** (-torch.tensor(decibels, dtype=torch.float64) / 20)
        restored = target + error.view(-1, 1, 1, 1) * normal()
        target, restored, noise = (image.float().double() for image in (target, restored, normal()))
        return cls(target, restored, noise, timesteps)

    def part(self, rows: Sequence[int]) -> Probe:
        """Return some of the samples."""
        return Probe(self.target[rows], self.restored[rows], self.noise[rows], self.timesteps[rows])


@dataclass(frozen=True)
class Result:
    """The loss on a probe, for each sample, in float64: terms [N] (None: not computed) and gradient [N, C, H, W]."""

    naturalness: Tensor | None
    semantic: Tensor
    gradient: Tensor

    @classmethod
    def of(cls, terms: Terms, gradient: Tensor) -> Result:
        """Return terms and a gradient, on any device, without their tape."""
        return cls(*(part.detach().cpu().double() for part in (terms.naturalness, terms.semantic, gradient)))

    def part(self, rows: Sequence[int]) -> Result:
        """Return some of the samples."""
        naturalness = None if self.naturalness is None else self.naturalness[rows]
        return Result(naturalness, self.semantic[rows], self.gradient[rows])


class Deviation(NamedTuple):
    """The worst error of one quantity over the samples, and what is allowed."""

    quantity: str
    error: float
    tolerance: float


def run_gradient(session: Session, probe: Probe, weights: tuple[float, float]) -> Result:
    """Run a gradient graph on a probe, with weights for naturalness and semantic."""
    restored, target, noise, timesteps = (
        tensor.to(session.device) for tensor in (probe.restored, probe.target, probe.noise, probe.timesteps)
    )
    results = run_gradient_graph(session, restored, target, noise, timesteps, weights)
    results = {name: value.cpu().double() for name, value in results.items()}
    return Result(results.get(NATURALNESS), results[SEMANTIC], results[GRADIENT])


def run_evaluator(evaluator: Evaluator, probe: Probe, weights: tuple[float, float], dtype: torch.dtype) -> Result:
    """Compute terms and gradient of a probe in `dtype`, with weights for naturalness and semantic.

    Not by way of a `DiffLoss`, which raises where there is NaN to be compared.
    """
    restored, target, noise = (x.to(evaluator.device, dtype) for x in (probe.restored, probe.target, probe.noise))
    timesteps = probe.timesteps.long().to(evaluator.device)
    with torch.enable_grad():
        restored.requires_grad_()
        terms, gradient = evaluator.evaluate(restored, target, noise, timesteps, weights)
        if gradient is None:
            (gradient,) = torch.autograd.grad(terms.total.sum(), restored)
    result = Result.of(terms, gradient)
    return result if weights[0] else replace(result, naturalness=None)


def deviations(found: Result, expected: Result, tolerance: Tolerance) -> list[Deviation]:
    """Compare terms and gradient, sample by sample."""
    terms = {SEMANTIC: (found.semantic, expected.semantic)}
    if found.naturalness is not None and expected.naturalness is not None:
        terms[NATURALNESS] = (found.naturalness, expected.naturalness)
    rows = [Deviation(name, worst_ratio((a - b).abs(), b), tolerance.term) for name, (a, b) in terms.items()]
    a, b = found.gradient.flatten(1), expected.gradient.flatten(1)
    rows.append(Deviation(GRADIENT, worst_ratio((a - b).norm(dim=1), b.norm(dim=1)), tolerance.gradient))
    product = a.norm(dim=1) * b.norm(dim=1)
    error = worst_ratio(product - (a * b).sum(1), product)
    return [*rows, Deviation("1 - cosine of gradient", error, 1 - tolerance.cosine)]


def worst_ratio(error: Tensor, size: Tensor) -> float:
    """Return the largest error / size; both are zero where a schedule ends in pure noise."""
    ratios = torch.where(error == 0, 0.0, error / size)
    return float(torch.where(ratios.isfinite(), ratios, torch.inf).max())


def record(path: Path, probe: Probe, expected: Mapping[str, Result]) -> None:
    """Write a probe, and what each gradient graph should return on it with `CHECK_WEIGHTS`, as a safetensors file."""
    tensors: dict[str, Tensor] = asdict(probe)
    for graph, result in expected.items():
        tensors |= {f"{graph}.{name}": tensor for name, tensor in asdict(result).items() if tensor is not None}
    # In float32: probes hold no more, and results are compared less exactly than that.
    save_tensors({name: tensor.float() for name, tensor in tensors.items()}, path)


def recorded(bundle: Bundle) -> tuple[Probe, dict[str, Result]] | None:
    """Return what `record` wrote into a bundle, or None if it has no such file.

    Raises IntegrityError if the file was altered, BundleError if it is not of the bundle's images.
    """
    if REFERENCE not in bundle.files:
        return None
    path = bundle.file(REFERENCE)
    tensors = {name: tensor.double() for name, tensor in load_tensors(path).items()}
    try:
        probe = Probe(*(tensors[name] for name in ("target", "restored", "noise", "timesteps")))
        expected = {
            graph: Result(
                tensors[f"{graph}.{NATURALNESS}"] if naturalness else None,
                tensors[f"{graph}.{SEMANTIC}"],
                tensors[f"{graph}.{GRADIENT}"],
            )
            for graph, (naturalness, _) in CHECK_WEIGHTS.items()
        }
    except KeyError as error:
        raise BundleError(f"{path} does not hold reference values: it has no {error}") from error
    # At least one image: what is compared on none is not compared.
    images = (max([1, *probe.target.shape[:1]]), read_channels(bundle), *bundle.resolution)
    for name, tensor in tensors.items():
        shape = agreed_shape(name.rpartition(".")[2], images)
        if shape is not None and tensor.shape != shape:
            raise BundleError(
                f"{path} does not hold reference values for images {list(images)}: "
                f"{name} has shape {list(tensor.shape)}, expected {list(shape)}"
            )
    last = len(read_schedule(bundle)) - 1
    usable = (probe.timesteps >= 0) & (probe.timesteps <= last) & (probe.timesteps == probe.timesteps.floor())
    if not bool(usable.all()):
        raise BundleError(f"{path} does not hold reference values: not every timestep is a whole number up to {last}")
    return probe, expected


def check_session(session: Session, graph: str, bundle: Bundle) -> None:
    """Raise ParityError unless a gradient graph's session gives what the bundle has recorded for it, if it has."""
    found = recorded(bundle)
    if found is None:
        return
    probe, expected = found
    result = run_gradient(session, probe, CHECK_WEIGHTS[graph])
    tolerance = DIFFERENCE[_held_to(session, bundle)]
    _expect_within(
        f"{session.backend} on {session.device} computes the {graph} graph", result, expected[graph], tolerance
    )


def check_evaluator(evaluator: Evaluator, bundle: Bundle) -> None:
    """Raise ParityError unless loss and gradient in plain form are what the bundle has recorded, if it has.

    That is compared where the plain form can be held to something. Raises BundleError if the UNet of the bundle cannot
    be run at all.
    """
    found = recorded(bundle)
    if found is None:
        return
    probe, expected = found
    precision = held_to(evaluator, bundle)
    places = {timestep_at(place, len(evaluator.schedule)) for place in PLAIN_PLACES[precision]}
    distances = (probe.restored - probe.target).square().flatten(1).mean(1)
    # One restored image is drawn at PLAIN_DB; of its noise, the mean square is not exactly what was asked for.
    near = 0.5 * 4 * 10 ** (-PLAIN_DB / 10)
    rows = [
        row
        for row, (timestep, distance) in enumerate(zip(probe.timesteps.tolist(), distances.tolist(), strict=True))
        if timestep in places and distance > near
    ]
    if not rows:
        return
    probe, expected_there = probe.part(rows), expected[GRADIENT].part(rows)
    try:
        result = run_evaluator(evaluator, probe, CHECK_WEIGHTS[GRADIENT], torch.float32)
    except (DiffLossError, torch.OutOfMemoryError):
        raise
    # A configuration may say anything, and diffusers looks at most of it only when it computes.
    except Exception as error:
        raise BundleError(f"{bundle.path}: its UNet cannot be run: {error}") from error
    what = f"{evaluator.backend} on {evaluator.device} computes the loss"
    _expect_within(what, result, expected_there, PLAIN[precision])


def held_to(evaluator: Evaluator, bundle: Bundle) -> str:
    """Return the precision whose tolerances hold."""
    # One that recomputes has PyTorch differentiate, whatever runs forward.
    return _held_to(evaluator, bundle, differentiates=evaluator.backward == "recompute")


def _held_to(runs: Session | Evaluator, bundle: Bundle, *, differentiates: bool = False) -> str:
    if not differentiates and runs.backend not in ("torch", "inductor"):
        return bundle.precision
    if runs.device.type == "cuda":
        # There PyTorch multiplies float32 with the mantissa of fp16 (TF32), unless told not to.
        return "bf16" if bundle.precision == "bf16" else "fp16"
    # On a CPU it rounds the factors if it is told that it may and the processor can; what is compiled does so too.
    settings = fp32_settings("mkldnn")
    allowed = {settings["matmul"], settings["conv"]}
    if "bf16" in allowed:
        return "bf16"
    precision = "fp32" if runs.backend == "torch" else bundle.precision  # it widens the weights
    return "fp16" if "tf32" in allowed and precision == "fp32" else precision


def first_beyond(found: Result, expected: Result, allowed: Tolerance) -> Deviation | None:
    """Return the first quantity that is further off than is allowed, or is not a number; None if there is none."""
    return next((row for row in deviations(found, expected, allowed) if not row.error <= row.tolerance), None)


def _expect_within(what: str, found: Result, expected: Result, allowed: Tolerance) -> None:
    if beyond := first_beyond(found, expected, allowed):
        raise ParityError(
            f"{what} wrongly: on the images that the bundle carries for this check, "
            f"{beyond.quantity} is off by {beyond.error:.2g}, and {beyond.tolerance:.2g} is allowed"
        )
