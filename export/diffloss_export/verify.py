"""Parity: every graph of a bundle, and the loss and gradient made from them, against eager PyTorch in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from diffloss_engine.batching import run_batched
from diffloss_engine.bundle import Bundle
from diffloss_engine.errors import BundleError, ParityError
from diffloss_engine.session import Session, open_graph, open_session
from diffloss_engine.tensors import TensorSpec
from diffloss_engine.torch_session import TorchSession
from diffloss_export.build import compiled_graphs
from diffloss_export.programs import Program
from diffloss_export.reference import Reference
from diffloss_export.widened import widened_specs, write_widened
from diffloss_trt.contract import PRECISIONS, check_graphs
from diffloss_trt.evaluators import FusedEvaluator, RecomputeEvaluator
from diffloss_trt.inputs import choose_device
from diffloss_trt.opening import check_bf16
from diffloss_trt.probe import CHECK_WEIGHTS, Result, deviations, held_to, run_evaluator, run_gradient, worst_ratio
from diffloss_trt.tolerances import DIFFERENCE, FEATURE, PLAIN, PLAIN_DB, PLAIN_PLACES, Tolerance

# Backends that run no ONNX graphs.
_PYTORCH = ("inductor", "torch")


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


@dataclass
class Report:
    """What `verify_bundle` found; `notes` say what could not be checked in the way one would expect."""

    backend: str
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def worst(self) -> Row:
        """The comparison that is nearest to its tolerance, or furthest beyond it."""
        return max(self.rows, key=lambda row: (not row.passed, row.error / row.tolerance))

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values; an error that is no finite number is null."""
        rows = [
            {**asdict(row), "error": row.error if math.isfinite(row.error) else None, "passed": row.passed}
            for row in self.rows
        ]
        return {"backend": self.backend, "passed": self.worst.passed, "rows": rows, "notes": self.notes}

    def raise_for_failure(self) -> None:
        """Raise `ParityError`, naming the worst comparison, unless all passed."""
        worst = self.worst
        if not worst.passed:
            raise ParityError(
                f"{worst.check}, {worst.quantity}: "
                f"the error against float64 is {worst.error:.2g}, allowed {worst.tolerance:.2g}"
            )


def verify_bundle(
    bundle: Bundle,
    *,
    backend: str = "auto",
    device: torch.device | str | None = None,
    reference: Reference | None = None,
    on_stage: Callable[[str], None] = lambda _: None,
) -> Report:
    """Compare each graph's outputs, the loss and its gradient among them, with float64 eager PyTorch.

    The reference is by default the bundle's own UNet, its stored weights widened; it is released when it has been
    asked. `device` is by default the GPU if there is one. Images are synthetic, from a fixed seed. The loss is also
    computed with `backward="recompute"`. Raises as `DiffLoss.load` does; a difference beyond its tolerance is in the
    report, and `raise_for_failure` raises it.
    """
    device = choose_device(device)
    check_bf16(bundle, backend, device)
    if backend == "inductor":
        compiled_graphs(bundle)  # raises if there are none
    on_stage("checking hashes")
    bundle.verify_hashes()
    check_graphs(bundle)
    widens = bundle.precision == "bf16" and device.type == "cpu" and backend in ("auto", *_PYTORCH)
    report = Report(backend=("torch" if widens else "onnxruntime") if backend == "auto" else backend)
    replay = _Replay(report, bundle, device, widens=widens, program=backend if backend in _PYTORCH else None)
    # A large UNet in float64 and an engine's copies of its weights do not fit into memory together: the reference is
    # gone when the gradient graphs, which need most, are opened.
    reference = reference or Reference.of_bundle(bundle)
    for program in reference.programs():
        on_stage(f"replaying the {program.name} graph")
        with replay.open(program.name) as session:
            _compare_graph(report, program, session, FEATURE[replay.precision])
    del program
    reference.compute(on_stage)
    reference.release()
    for name in (name for name in CHECK_WEIGHTS if name in bundle.graphs):
        on_stage(f"replaying the {name} graph")
        for check, opened, precision in replay.open_gradient(name):
            with opened as session:
                found = run_gradient(session, reference.probe, CHECK_WEIGHTS[name])
            _compare(report, check, found, reference.expected[name], DIFFERENCE[precision])
    on_stage("comparing loss and gradient of PyTorch's backward")
    backend = "torch" if report.backend in _PYTORCH else report.backend
    # Not `DiffLoss.load`, which refuses what is to be reported here.
    evaluator = RecomputeEvaluator.unchecked(bundle, backend, device)
    precision = held_to(evaluator, bundle)
    places = PLAIN_PLACES[precision]
    rows = [index for index, (place, db) in enumerate(reference.places) if db <= PLAIN_DB and place in places]
    for name, weights in CHECK_WEIGHTS.items():
        found = run_evaluator(evaluator, reference.probe.part(rows), weights, torch.float32)
        check = "recomputed loss" if weights[0] else "recomputed semantic loss alone"
        _compare(report, check, found, reference.expected[name].part(rows), PLAIN[precision])
    return report


class _Replay:
    """Opens a bundle's graphs on the backend that the loss runs on; where that runs no graphs, on ONNX Runtime.

    program: the backend that was asked for, if it is one that runs no graphs.
    """

    def __init__(
        self,
        report: Report,
        bundle: Bundle,
        device: torch.device,
        *,
        widens: bool,
        program: str | None,
    ) -> None:
        self._report = report
        self._bundle = bundle
        self._device = device
        self._backend = "onnxruntime" if report.backend in _PYTORCH else report.backend
        self._widens = widens
        self._program = program
        self.precision = "fp32" if self._widens else bundle.precision

    @contextmanager
    def open(self, name: str) -> Iterator[Session]:
        """Yield a session on a graph, which is closed afterwards."""
        if not self._widens:
            with closing(open_graph(self._bundle, name, backend=self._backend, device=self._device)) as session:
                yield session
            return
        self._report.notes.append(
            f"the {name} graph was replayed in float32: ONNX Runtime has no bfloat16 kernels for the CPU"
        )
        file, graph = self._bundle.graph_file(name), self._bundle.graphs[name]
        inputs, outputs = widened_specs(graph.inputs), widened_specs(graph.outputs)
        # The copy has all the weights, twice as large as the bundle's: one at a time is enough.
        with TemporaryDirectory() as scratch:
            widened = Path(scratch) / file.name
            write_widened(file, widened)
            with closing(open_session(widened, inputs, outputs, backend=self._backend, device=self._device)) as session:
                yield session

    def open_gradient(self, name: str) -> Iterator[tuple[str, AbstractContextManager[Session], str]]:
        """Yield each way in which a gradient graph is run: its name, a session to enter, the precision to hold it to.

        The graph is replayed; the program is run where the loss runs that and no graphs; and of a graph that is widened
        the program shows the rounding that it lacks.
        """
        yield name, self.open(name), self.precision
        bundle, graph = self._bundle, self._bundle.graphs[name]
        if self._program is not None:
            evaluator = FusedEvaluator(bundle, self._program, self._device)
            yield f"{name}, run by {self._program}", closing(evaluator.open(name)), held_to(evaluator, bundle)
        if self._widens and self._program != "inductor":
            run, _ = FusedEvaluator(bundle, "torch", self._device).trace(name, PRECISIONS[bundle.precision])
            session = TorchSession(run, graph.inputs, graph.outputs, self._device)
            yield f"{name}, run in PyTorch", closing(session), bundle.precision


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
    return worst_ratio(difference, expected.flatten(1).abs().amax(1))


def _compare(report: Report, check: str, found: Result, expected: Result, tolerance: Tolerance) -> None:
    report.rows += [Row(check, *deviation) for deviation in deviations(found, expected, tolerance)]
