"""Parity: every graph of a bundle, and the loss and gradient made from them, against eager PyTorch in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from diffloss_engine.batching import run_batched
from diffloss_engine.bundle import Bundle
from diffloss_engine.errors import BundleError, ParityError
from diffloss_engine.session import Session, open_session
from diffloss_engine.tensors import TensorSpec
from diffloss_export.programs import Program, feature_programs
from diffloss_export.tolerances import PLAIN, RESTORED_DB, Tolerance
from diffloss_export.widened import widened_specs, write_widened
from diffloss_trt import DiffLoss
from diffloss_trt.contract import SCHEDULE
from diffloss_trt.schedule import NoiseSchedule
from diffloss_trt.unet import TappedUNet, reload_unet

_WHOLE_SCHEDULE = (0.0, 0.01, 0.1, 0.5, 1.0)


@dataclass(frozen=True)
class Row:
    """One comparison: the worst error found over all samples, and what is allowed."""

    check: str
    quantity: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the error is a number within the tolerance."""
        return self.error <= self.tolerance

    @property
    def excess(self) -> float:
        """The error as a multiple of the tolerance."""
        return self.error / self.tolerance if self.tolerance else math.inf


@dataclass
class Report:
    """What `verify_bundle` found; `notes` say what could not be checked in the way one would expect."""

    backend: str
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def worst(self) -> Row:
        """The comparison that is nearest to its tolerance, or furthest beyond it."""
        return max(self.rows, key=lambda row: (not row.passed, row.excess))

    def raise_for_failure(self) -> None:
        """Raise `ParityError`, naming the worst comparison, unless all passed."""
        worst = self.worst
        if not worst.passed:
            raise ParityError(
                f"{worst.check}, {worst.quantity}: "
                f"the error against float64 is {worst.error:.2g}, allowed {worst.tolerance:.2g}"
            )


@dataclass(frozen=True)
class Probe:
    """Images to compare on, in [-1, 1], [N, C, H, W], float64: `restored` is `target` and white noise at 20 dB."""

    target: Tensor
    restored: Tensor
    noise: Tensor
    timesteps: Tensor

    @classmethod
    def make(cls, channels: int, resolution: tuple[int, int], timesteps: Tensor, seed: int = 0) -> Probe:
        """Draw one image for each of `timesteps` [N], with the falling spectrum of photographs."""
        generator = torch.Generator().manual_seed(seed)
        shape = (len(timesteps), channels, *resolution)

        def normal() -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        frequency = torch.hypot(
            *torch.meshgrid(*(torch.fft.fftfreq(side).double() for side in resolution), indexing="ij")
        )
        spectrum = torch.fft.fft2(normal()) / frequency.clamp(min=1 / max(resolution))
        image = torch.fft.ifft2(spectrum).real
        target = (image / (3 * image.std(dim=(1, 2, 3), keepdim=True))).clamp(-1, 1)
        restored = target + 2 * 10 ** (-RESTORED_DB / 20) * normal()
        return cls(target, restored, normal(), timesteps)


def verify_bundle(
    bundle: Bundle,
    *,
    backend: str = "auto",
    device: torch.device | str = "cpu",
    on_stage: Callable[[str], None] = lambda _: None,
) -> Report:
    """Compare each graph's outputs, then the loss and its gradient through `DiffLoss`, with float64 eager PyTorch.

    The reference is the bundle's own UNet, its stored weights widened. Images are synthetic, from a fixed seed. Raises
    as `DiffLoss.load` does; a difference beyond its tolerance is in the report, and `raise_for_failure` raises it.
    """
    device = torch.device(device)
    on_stage("checking hashes")
    bundle.verify_hashes()
    schedule = NoiseSchedule.from_json(bundle.read_json(SCHEDULE))
    reference = TappedUNet(reload_unet(bundle, torch.float64, torch.device("cpu")), schedule)
    loss = DiffLoss.load(bundle.path, backend=backend, device=device, value_range=(-1.0, 1.0), reduction="none")
    report = Report(backend=loss.evaluator.backend)
    # The torch backend computes in float32, whatever the precision of the stored weights.
    tolerance = PLAIN["fp32" if report.backend == "torch" else bundle.precision]
    whole = Probe.make(reference.channels, bundle.resolution, _timesteps(schedule, _WHOLE_SCHEDULE))
    noisy = schedule.add_noise(whole.restored, whole.noise, whole.timesteps)
    with TemporaryDirectory() as scratch:
        for program in feature_programs(reference, noisy, whole.timesteps.double()):
            on_stage(f"replaying the {program.name} graph")
            with closing(_open_graph(report, bundle, program.name, device, Path(scratch))) as session:
                _compare_graph(report, program, session, PLAIN[bundle.precision])
    on_stage("comparing loss and gradient")
    probe = Probe.make(reference.channels, bundle.resolution, _timesteps(schedule, tolerance.places))
    eager = DiffLoss.from_unet(reference.unet, schedule, value_range=(-1.0, 1.0), reduction="none")
    _compare_loss(report, loss, eager, probe, tolerance)
    return report


def _timesteps(schedule: NoiseSchedule, places: Sequence[float]) -> Tensor:
    return torch.tensor([round(place * (len(schedule) - 1)) for place in places])


def _open_graph(report: Report, bundle: Bundle, name: str, device: torch.device, scratch: Path) -> Session:
    """Open a graph on the backend that the loss runs on; where that runs no graphs, on ONNX Runtime."""
    file = bundle.graph_file(name)
    graph = bundle.graphs[name]
    backend = "onnxruntime" if report.backend == "torch" else report.backend
    if bundle.precision == "bf16" and device.type == "cpu":
        report.notes.append(
            f"the {name} graph was replayed in float32: ONNX Runtime has no bfloat16 kernels for the CPU"
        )
        write_widened(file, scratch / file.name)
        return open_session(
            scratch / file.name,
            widened_specs(graph.inputs),
            widened_specs(graph.outputs),
            backend=backend,
            device=device,
        )
    return open_session(file, graph.inputs, graph.outputs, backend=backend, device=device)


def _compare_graph(report: Report, program: Program, session: Session, tolerance: Tolerance) -> None:
    """Feed the graph what the reference feeds its own half, so that one graph's error is not counted in the next."""
    with torch.no_grad():
        expected = program.module(*program.inputs.values())
    _check_names(program.name, "takes", session.inputs, program.inputs)
    _check_names(program.name, "returns", session.outputs, program.outputs)
    found = run_batched(
        session, {spec.name: program.inputs[spec.name].to(session.device, spec.torch_dtype) for spec in session.inputs}
    )
    for name, value in zip(program.outputs, expected, strict=True):
        report.rows.append(Row(program.name, name, _worst_relative(found[name], value), tolerance.feature))


def _check_names(graph: str, verb: str, specs: Iterable[TensorSpec], expected: Iterable[str]) -> None:
    """Raise `BundleError` unless the graph was made of a UNet and a schedule such as the bundle's."""
    names = [spec.name for spec in specs]
    if set(names) != set(expected):
        raise BundleError(f"the {graph} graph {verb} {names}, and the bundle's UNet and schedule {list(expected)}")


def _worst_relative(found: Tensor, expected: Tensor) -> float:
    """Return max |a - b| / max |b|, the worst sample; infinity if anything is not finite."""
    difference = (found.cpu().double() - expected).flatten(1).abs().amax(1)
    return _worst(difference / expected.flatten(1).abs().amax(1))


def _worst(errors: Tensor) -> float:
    return float(torch.where(errors.isfinite(), errors, torch.inf).max())


def _compare_loss(report: Report, loss: DiffLoss, reference: DiffLoss, probe: Probe, tolerance: Tolerance) -> None:
    for check, weights in (("loss", (1e-3, 1e-6)), ("semantic loss alone", (0.0, 1.0))):
        found, gradient = _terms_and_gradient(loss, probe, weights, torch.float32)
        expected, expected_gradient = _terms_and_gradient(reference, probe, weights, torch.float64)
        names = ("naturalness", "semantic") if weights[0] else ("semantic",)
        for name in names:
            error = _worst((found[name] - expected[name]).abs() / expected[name])
            report.rows.append(Row(check, name, error, tolerance.term))
        a, b = gradient.flatten(1), expected_gradient.flatten(1)
        report.rows.append(Row(check, "gradient", _worst((a - b).norm(dim=1) / b.norm(dim=1)), tolerance.gradient))
        cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
        report.rows.append(Row(check, "1 - cosine of gradient", _worst(1 - cosine), 1 - tolerance.cosine))


def _terms_and_gradient(
    loss: DiffLoss, probe: Probe, weights: tuple[float, float], dtype: torch.dtype
) -> tuple[dict[str, Tensor], Tensor]:
    loss.naturalness_weight, loss.semantic_weight = weights
    place = loss.device
    restored = probe.restored.to(place, dtype).requires_grad_()
    terms = loss.terms(
        restored, probe.target.to(place, dtype), timesteps=probe.timesteps.to(place), noise=probe.noise.to(place, dtype)
    )
    (gradient,) = torch.autograd.grad(terms.total.sum(), restored)
    return {name: value.detach().cpu().double() for name, value in terms._asdict().items()}, gradient.cpu().double()
