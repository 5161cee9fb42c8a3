"""Parity: every graph of a bundle, and the loss and gradient made from them, against eager PyTorch in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import astuple, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from diffloss_engine.batching import run_batched
from diffloss_engine.bundle import Bundle
from diffloss_engine.errors import BundleError, ParityError
from diffloss_engine.session import Session, open_session
from diffloss_engine.tensors import TensorSpec
from diffloss_engine.torch_session import TorchSession
from diffloss_export.programs import Program, feature_programs
from diffloss_export.tolerances import DIFFERENCE, FEATURE, PLAIN, PLAIN_DB, Tolerance
from diffloss_export.widened import widened_specs, write_widened
from diffloss_trt import DiffLoss
from diffloss_trt.contract import (
    GRADIENT,
    NATURALNESS,
    NATURALNESS_WEIGHT,
    NOISE,
    PRECISIONS,
    RESTORED,
    SCHEDULE,
    SEMANTIC,
    SEMANTIC_GRADIENT,
    SEMANTIC_WEIGHT,
    TARGET,
    TIMESTEPS,
)
from diffloss_trt.gradient import trace_gradient
from diffloss_trt.schedule import NoiseSchedule
from diffloss_trt.unet import TappedUNet, reload_unet

# Where the loss is compared: timesteps as fractions of the last one, and the restored image's PSNR in dB.
_PLACES = ((0.0, 35.0), (0.01, 20.0), (0.1, 50.0), (0.5, 20.0), (1.0, 35.0))
# Of a network whose parameters times pixels are more than this, a step in float64 takes minutes.
_LARGE = 1e12
_ONE_PLACE = ((0.1, 20.0),)
# The weights of naturalness and semantic to compare each gradient graph with: balanced, so that an error in either
# term shows in the gradient.
_CHECKS = {GRADIENT: (1.0, 1.0), SEMANTIC_GRADIENT: (0.0, 1.0)}


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
    """Images to compare on, in [-1, 1], [N, C, H, W]: float64 tensors of float32 numbers."""

    target: Tensor
    restored: Tensor
    noise: Tensor
    timesteps: Tensor

    @classmethod
    def make(
        cls, channels: int, resolution: tuple[int, int], timesteps: Tensor, decibels: Sequence[float], seed: int = 0
    ) -> Probe:
        """Draw one target for each of `timesteps` [N], with the falling spectrum of photographs.

        `restored` is that and white noise, of a PSNR of so many `decibels` [N].
        """
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
        error = 2 * 10 ** (-torch.tensor(decibels, dtype=torch.float64) / 20)
        restored = target + error.view(-1, 1, 1, 1) * normal()
        target, restored, noise = (image.float().double() for image in (target, restored, normal()))
        return cls(target, restored, noise, timesteps)

    def part(self, rows: Sequence[int]) -> Probe:
        """Return some of the samples."""
        return Probe(self.target[rows], self.restored[rows], self.noise[rows], self.timesteps[rows])


@dataclass(frozen=True)
class _Expected:
    """What the loss is in float64, for each sample of a probe."""

    naturalness: Tensor
    semantic: Tensor
    gradient: Tensor

    def part(self, rows: Sequence[int]) -> _Expected:
        """Return some of the samples."""
        return _Expected(self.naturalness[rows], self.semantic[rows], self.gradient[rows])


def verify_bundle(
    bundle: Bundle,
    *,
    backend: str = "auto",
    device: torch.device | str = "cpu",
    on_stage: Callable[[str], None] = lambda _: None,
) -> Report:
    """Compare each graph's outputs, the loss and its gradient among them, with float64 eager PyTorch.

    The reference is the bundle's own UNet, its stored weights widened. Images are synthetic, from a fixed seed. The
    loss is also computed with `backward="recompute"`. Raises as `DiffLoss.load` does; a difference beyond its tolerance
    is in the report, and `raise_for_failure` raises it.
    """
    device = torch.device(device)
    on_stage("checking hashes")
    bundle.verify_hashes()
    widens = bundle.precision == "bf16" and device.type == "cpu"
    report = Report(backend=("torch" if widens else "onnxruntime") if backend == "auto" else backend)
    places = _PLACES if bundle.unet["parameters"] * math.prod(bundle.resolution) < _LARGE else _ONE_PLACE
    with TemporaryDirectory() as scratch:
        replay = _Replay(report, bundle, device, Path(scratch), widens=widens)
        # A large UNet in float64 and an engine's copies of its weights do not fit into memory together: the reference
        # is gone when the gradient graphs, which need most, are opened.
        reference = _Reference(bundle)
        for program in reference.programs([(place, PLAIN_DB) for place, _ in places]):
            on_stage(f"replaying the {program.name} graph")
            with closing(replay.open(program.name)) as session:
                _compare_graph(report, program, session, FEATURE[replay.precision])
        del program
        expected = {}
        for name, weights in _CHECKS.items():
            on_stage(f"computing what the {name} graph should return")
            expected[name] = reference.loss(places, weights)
        probe = reference.probe(places)
        del reference
        for name in (name for name in _CHECKS if name in bundle.graphs):
            on_stage(f"replaying the {name} graph")
            for check, session, precision in replay.open_gradient(name):
                with closing(session):
                    found = _run_gradient(session, probe, _CHECKS[name])
                _compare_loss(report, check, found, expected[name], DIFFERENCE[precision], _CHECKS[name])
    on_stage("comparing loss and gradient of PyTorch's backward")
    loss = DiffLoss.load(
        bundle.path, report.backend, device, backward="recompute", value_range=(-1.0, 1.0), reduction="none"
    )
    # The torch backend computes in float32, whatever the precision of the stored weights.
    plain = PLAIN["fp32" if report.backend == "torch" else bundle.precision]
    rows = [index for index, (place, db) in enumerate(places) if db <= PLAIN_DB and place in plain.places]
    for name, weights in _CHECKS.items():
        found = _run_loss(loss, probe.part(rows), weights, torch.float32)
        check = "recomputed loss" if weights[0] else "recomputed semantic loss alone"
        _compare_loss(report, check, found, expected[name].part(rows), plain, weights)
    return report


class _Reference:
    """The bundle's UNet in float64, in eager PyTorch."""

    def __init__(self, bundle: Bundle) -> None:
        self._schedule = NoiseSchedule.from_json(bundle.read_json(SCHEDULE))
        self._resolution = bundle.resolution
        self._tapped = TappedUNet(reload_unet(bundle, torch.float64, torch.device("cpu")), self._schedule)
        # The tape of a large UNet in float64 fills a machine.
        self._tapped.unet.enable_gradient_checkpointing()

    def probe(self, places: Sequence[tuple[float, float]]) -> Probe:
        """Return images for `places`: timesteps as fractions of the last one, and decibels."""
        timesteps = torch.tensor([round(place * (len(self._schedule) - 1)) for place, _ in places])
        decibels = [decibels for _, decibels in places]
        return Probe.make(self._tapped.channels, self._resolution, timesteps, decibels)

    def programs(self, places: Sequence[tuple[float, float]]) -> tuple[Program, Program]:
        """Return encoder and noise head, and what they are fed."""
        probe = self.probe(places)
        noisy = self._schedule.add_noise(probe.restored, probe.noise, probe.timesteps)
        return feature_programs(self._tapped, noisy, probe.timesteps.double())

    def loss(self, places: Sequence[tuple[float, float]], weights: tuple[float, float]) -> _Expected:
        """Return terms and gradient, of one sample at a time."""
        loss = DiffLoss.from_unet(self._tapped.unet, self._schedule, value_range=(-1.0, 1.0), reduction="none")
        probe = self.probe(places)
        samples = [_run_loss(loss, probe.part([row]), weights, torch.float64) for row in range(len(places))]
        return _Expected(*(torch.cat(parts) for parts in zip(*map(astuple, samples), strict=True)))


class _Replay:
    """Opens a bundle's graphs on the backend that the loss runs on; where that runs no graphs, on ONNX Runtime."""

    def __init__(self, report: Report, bundle: Bundle, device: torch.device, scratch: Path, *, widens: bool) -> None:
        self._report = report
        self._bundle = bundle
        self._device = device
        self._scratch = scratch
        self._backend = "onnxruntime" if report.backend == "torch" else report.backend
        self._widens = widens
        self.precision = "fp32" if self._widens else bundle.precision

    def open(self, name: str) -> Session:
        file, graph = self._bundle.graph_file(name), self._bundle.graphs[name]
        inputs, outputs = graph.inputs, graph.outputs
        if self._widens:
            self._report.notes.append(
                f"the {name} graph was replayed in float32: ONNX Runtime has no bfloat16 kernels for the CPU"
            )
            write_widened(file, self._scratch / file.name)
            file, inputs, outputs = self._scratch / file.name, widened_specs(inputs), widened_specs(outputs)
        return open_session(
            file,
            inputs,
            outputs,
            backend=self._backend,
            device=self._device,
            digest=self._bundle.graph_digest(name),
            precision=self._bundle.precision,
        )

    def open_gradient(self, name: str) -> Iterator[tuple[str, Session, str]]:
        """Yield what to call it, a session, and the precision to hold it to; of a widened graph the program too."""
        yield name, self.open(name), self.precision
        if self._widens:
            graph, bundle = self._bundle.graphs[name], self._bundle
            schedule = NoiseSchedule.from_json(bundle.read_json(SCHEDULE))
            tapped = TappedUNet(reload_unet(bundle, PRECISIONS[bundle.precision], self._device), schedule)
            program = trace_gradient(tapped, bundle.batch_size, bundle.resolution, with_noise=name == GRADIENT)
            run = program.bind(tapped.unet.state_dict())
            yield (
                f"{name}, run in PyTorch",
                TorchSession(run, graph.inputs, graph.outputs, self._device),
                bundle.precision,
            )


def _compare_graph(report: Report, program: Program, session: Session, tolerance: float) -> None:
    """Feed the graph what the reference feeds its own half, so that one graph's error is not counted in the next."""
    _check_names(program.name, "takes", session.inputs, program.inputs)
    _check_names(program.name, "returns", session.outputs, program.outputs)
    errors = dict.fromkeys(program.outputs, 0.0)
    parts = (tensor.split(session.inputs[0].shape[0]) for tensor in program.inputs.values())
    for part in zip(*parts, strict=True):
        inputs = dict(zip(program.inputs, part, strict=True))
        with torch.no_grad():
            expected = program.module(*inputs.values())
        found = run_batched(
            session, {spec.name: inputs[spec.name].to(session.device, spec.torch_dtype) for spec in session.inputs}
        )
        for name, value in zip(program.outputs, expected, strict=True):
            errors[name] = max(errors[name], _worst_relative(found[name], value))
    report.rows += [Row(program.name, name, error, tolerance) for name, error in errors.items()]


def _check_names(graph: str, verb: str, specs: Iterable[TensorSpec], expected: Iterable[str]) -> None:
    """Raise `BundleError` unless the graph was made of a UNet and a schedule such as the bundle's."""
    names = [spec.name for spec in specs]
    if set(names) != set(expected):
        raise BundleError(f"the {graph} graph {verb} {names}, and the bundle's UNet and schedule {list(expected)}")


def _worst_relative(found: Tensor, expected: Tensor) -> float:
    """Return max |a - b| / max |b|, the worst sample; infinity if anything is not finite."""
    difference = (found.cpu().double() - expected).flatten(1).abs().amax(1)
    return _worst_ratio(difference, expected.flatten(1).abs().amax(1))


def _worst_ratio(error: Tensor, size: Tensor) -> float:
    """Return the largest error / size; both are zero where a schedule ends in pure noise."""
    ratios = torch.where(error == 0, 0.0, error / size)
    return float(torch.where(ratios.isfinite(), ratios, torch.inf).max())


def _compare_loss(
    report: Report,
    check: str,
    found: _Expected,
    expected: _Expected,
    tolerance: Tolerance,
    weights: tuple[float, float],
) -> None:
    terms = {"semantic": (found.semantic, expected.semantic)}
    if weights[0]:
        terms["naturalness"] = (found.naturalness, expected.naturalness)
    for name, (a, b) in terms.items():
        report.rows.append(Row(check, name, _worst_ratio((a - b).abs(), b), tolerance.term))
    a, b = found.gradient.flatten(1), expected.gradient.flatten(1)
    report.rows.append(Row(check, "gradient", _worst_ratio((a - b).norm(dim=1), b.norm(dim=1)), tolerance.gradient))
    product = a.norm(dim=1) * b.norm(dim=1)
    error = _worst_ratio(product - (a * b).sum(1), product)
    report.rows.append(Row(check, "1 - cosine of gradient", error, 1 - tolerance.cosine))


def _run_gradient(session: Session, probe: Probe, weights: tuple[float, float]) -> _Expected:
    tensors = {RESTORED: probe.restored, TARGET: probe.target, NOISE: probe.noise, TIMESTEPS: probe.timesteps}
    for name, weight in zip((NATURALNESS_WEIGHT, SEMANTIC_WEIGHT), weights, strict=True):
        tensors[name] = torch.full((len(probe.timesteps),), weight)
    results = run_batched(
        session, {spec.name: tensors[spec.name].to(session.device).float() for spec in session.inputs}
    )
    results = {name: value.cpu().double() for name, value in results.items()}
    return _Expected(results.get(NATURALNESS, torch.zeros(())), results[SEMANTIC], results[GRADIENT])


def _run_loss(loss: DiffLoss, probe: Probe, weights: tuple[float, float], dtype: torch.dtype) -> _Expected:
    loss.naturalness_weight, loss.semantic_weight = weights
    place = loss.device
    restored = probe.restored.to(place, dtype).requires_grad_()
    terms = loss.terms(
        restored, probe.target.to(place, dtype), timesteps=probe.timesteps.to(place), noise=probe.noise.to(place, dtype)
    )
    (gradient,) = torch.autograd.grad(terms.total.sum(), restored)
    return _Expected(*(tensor.detach().cpu().double() for tensor in (terms.naturalness, terms.semantic, gradient)))
