"""How the terms of the loss are computed: eager PyTorch, engines alone, or engines forward and PyTorch backward."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from diffloss_engine.batching import run_batched
from diffloss_engine.bundle import Bundle
from diffloss_engine.cuda_graph import GraphedSession
from diffloss_engine.forking import ProcessLock
from diffloss_engine.fp32_precision import fp32_precision
from diffloss_engine.inductor import check_compiler, compile_program, has_bfloat16, open_compiled, package_key
from diffloss_engine.session import Session, open_graph
from diffloss_engine.torch_session import TorchSession
from diffloss_trt.autograd import Cotangents, Recompute
from diffloss_trt.contract import (
    BOTTLENECK,
    ENCODER,
    GRADIENT,
    NATURALNESS,
    NOISE,
    NOISE_HEAD,
    NOISY,
    PRECISIONS,
    SEMANTIC,
    SEMANTIC_GRADIENT,
    TIMESTEPS,
    check_graphs,
    read_channels,
    read_schedule,
)
from diffloss_trt.gradient import program_version, run_gradient_graph, trace_gradient
from diffloss_trt.inputs import Backward
from diffloss_trt.objective import Terms, combine, mean_square
from diffloss_trt.probe import check_evaluator, check_session, held_to
from diffloss_trt.recheck import expect_alike, open_reference
from diffloss_trt.schedule import NoiseSchedule
from diffloss_trt.unet import Features, TappedUNet, reload_unet

# Restored, target and noise [B, C, H, W], timesteps [B].
Images = tuple[Tensor, Tensor, Tensor, Tensor]

# Of a call: its number, its images, the weights, and the terms and the gradient that `evaluate` has returned.
Check = Callable[[int, Images, tuple[float, float], Terms, Tensor], None]


class Evaluator(Protocol):
    """Computes DiffLoss on images in [-1, 1]; holds everything frozen, so that copies may share it."""

    backend: str
    backward: Backward
    schedule: NoiseSchedule
    channels: int
    resolution_multiple: int
    # How many images are computed at a time: fewer take as long.
    batch_size: int

    @property
    def device(self) -> torch.device:
        """Where images are expected."""
        ...

    @property
    def on_tape(self) -> bool:
        """Whether PyTorch's own tape leads from `total` to `restored`, and with it all that can be done with a tape."""
        ...

    @property
    def resolution(self) -> tuple[int, int] | None:
        """The one image size that can be taken, or None for any multiple of `resolution_multiple`."""
        ...

    @property
    def precision(self) -> str | None:
        """That of the bundle, or None for a UNet that came without one."""
        ...

    @property
    def check(self) -> Check | None:
        """Raises ParityError if results are not those of a reference; None where there is no reference."""
        ...

    def evaluate(
        self, restored: Tensor, target: Tensor, noise: Tensor, timesteps: Tensor, weights: tuple[float, float]
    ) -> tuple[Terms, Tensor | None]:
        """Return the terms [B], and the gradient of their `total` with respect to `restored`, like `restored`.

        With `backward` "fused" neither is on a tape. Otherwise the gradient is None: `total` leads to it, if it is on
        a tape.

        `restored`, `target` and `noise` are [B, C, H, W] in float32 or float64, `timesteps` integers [B]. `weights` are
        those of naturalness and semantic, not both zero; a term of weight zero is not computed: it is zero.
        """
        ...

    def to(self, device: torch.device) -> Self:
        """Return the same evaluator on another device."""
        ...


def _measure(restored: Features, target: Features, weights: tuple[float, float]) -> Terms:
    pairs = {"semantic": (restored.bottleneck, target.bottleneck)} if weights[1] else {}
    if restored.noise is not None and target.noise is not None:
        pairs["naturalness"] = (restored.noise, target.noise)
    terms = {name: mean_square(of_restored - of_target) for name, (of_restored, of_target) in pairs.items()}
    zero = torch.zeros_like(next(iter(terms.values())))
    naturalness, semantic = terms.get("naturalness", zero), terms.get("semantic", zero)
    return Terms(combine(naturalness, semantic, *weights), naturalness.detach(), semantic.detach())


def _recompute_terms(
    features: Callable[[Tensor, Tensor, bool], Features],
    unet: TappedUNet,
    restored: Tensor,
    target: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    weights: tuple[float, float],
) -> Terms:
    noisy = unet.schedule.add_noise(restored, noise, timesteps)
    with_noise = weights[0] > 0
    with torch.no_grad():
        of_target = features(unet.schedule.add_noise(target, noise, timesteps), timesteps, with_noise)
        of_restored = features(noisy.detach(), timesteps, with_noise)
        terms = _measure(of_restored, of_target, weights)
    if not (torch.is_grad_enabled() and noisy.requires_grad):
        return terms
    cotangents = Cotangents(of_restored, of_target, *weights)
    total = Recompute.apply(  # type: ignore[no-untyped-call]
        noisy, terms.total, timesteps, cotangents, unet
    )
    return terms._replace(total=total)


class EagerEvaluator:
    """The reference: PyTorch forward and backward, in the precision of the UNet and where it is.

    The UNet is the user's too, who may move or cast it in place at any time.
    """

    backend = "torch"
    backward: Backward = "recompute"
    resolution = None
    precision = None
    check = None
    batch_size = 1

    def __init__(self, unet: TappedUNet) -> None:
        self.unet = unet
        self.schedule = unet.schedule
        self.channels = unet.channels
        self.resolution_multiple = unet.resolution_multiple

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def on_tape(self) -> bool:
        # In half precision the tape would carry cotangents of order 1e-9, which are flushed to zero.
        return self.unet.dtype not in (torch.float16, torch.bfloat16)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def to(self, device: torch.device) -> Self:
        # Moving a module is done in place, and copies of the loss share this one.
        with torch.inference_mode(False):  # of weights made in it there could be no gradient later
            return type(self)(copy.deepcopy(self.unet).to(device))

    def _features(self, noisy: Tensor, timesteps: Tensor, with_noise: bool) -> Features:
        return self.unet.features(noisy, timesteps, with_noise=with_noise)

    def evaluate(
        self, restored: Tensor, target: Tensor, noise: Tensor, timesteps: Tensor, weights: tuple[float, float]
    ) -> tuple[Terms, None]:
        if not self.on_tape:
            return _recompute_terms(self._features, self.unet, restored, target, noise, timesteps, weights), None
        with_noise = weights[0] > 0
        with torch.no_grad():
            of_target = self._features(self.schedule.add_noise(target, noise, timesteps), timesteps, with_noise)
        of_restored = self._features(self.schedule.add_noise(restored, noise, timesteps), timesteps, with_noise)
        return _measure(of_restored, of_target, weights), None


class _BundleEvaluator:
    """What the evaluators on a bundle have in common: copies share it, and a pickle holds the bundle's place alone."""

    def __init__(self, bundle: Bundle, backend: str, device: torch.device) -> None:
        check_graphs(bundle)
        self.bundle = bundle
        self.backend = backend
        self.device = device
        self.schedule = read_schedule(bundle)
        self.resolution = bundle.resolution
        self.precision = bundle.precision
        self.batch_size = bundle.batch_size
        self.channels = read_channels(bundle)
        self.resolution_multiple = 1  # there is but one resolution

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.bundle, self.backend, self.device)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def to(self, device: torch.device) -> Self:
        make, (bundle, backend, _, *settings) = self.__reduce__()
        moved: Self = make(bundle, backend, device, *settings)
        return moved

    @property
    def dtype(self) -> torch.dtype:
        """The precision in which PyTorch runs the UNet, or what is traced of it."""
        # A CPU has no fast convolution in fp16, and PyTorch's in bf16 are fast only with weights that are laid out for
        # them beforehand, which is what a compiler does; elsewhere the stored weights are widened.
        as_stored = self.device.type == "cuda" or (
            self.backend == "inductor" and self.precision == "bf16" and has_bfloat16(self.device)
        )
        return PRECISIONS[self.precision] if as_stored else torch.float32

    def _tapped(self, dtype: torch.dtype) -> TappedUNet:
        return TappedUNet(reload_unet(self.bundle, dtype, self.device), self.schedule)


class FusedEvaluator(_BundleEvaluator):
    """A bundle's gradient graphs: value and gradient come from the engine together, and no UNet runs in PyTorch."""

    backward: Backward = "fused"
    on_tape = False

    def __init__(self, bundle: Bundle, backend: str, device: torch.device, cuda_graph: bool = False) -> None:
        super().__init__(bundle, backend, device)
        self.cuda_graph = cuda_graph
        self.sessions: dict[str, Session] = {}
        # What `check` compares with: that of one graph, the last that was asked for.
        self.references: dict[str, Session] = {}
        self._opening = ProcessLock()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.bundle, self.backend, self.device, self.cuda_graph)

    def session(self, name: str) -> Session:
        """Return the session of a gradient graph; it is opened, and checked, the first time that it is asked for.

        Raises as `open_session` does, and ParityError if an engine does not return what the bundle has recorded.
        """
        if name not in self.sessions:
            # Threads that share a loss wait for the one that opens it: the weights shall be there once.
            with self._opening.lock:
                if name not in self.sessions:
                    self.sessions[name] = self._open_checked(name)
        return self.sessions[name]

    def _open_checked(self, name: str) -> Session:
        with torch.inference_mode(False):  # what is made in it could not be written to outside of it
            session = self.open(name)
            # A miscompiled engine must not train anyone's network, nor a UNet that is not the one that was exported.
            check_session(session, name, self.bundle)
        return session

    def open(self, name: str) -> Session:
        """Return a new session of a gradient graph, unchecked. Raises as `open_session` does."""
        graph = self.bundle.graphs[name]
        if self.backend == "torch":
            session: Session = TorchSession(self.trace(name, self.dtype)[0], graph.inputs, graph.outputs, self.device)
        elif self.backend == "inductor":
            session = open_compiled(*self.package(name), graph.inputs, graph.outputs, self.device)
        else:
            session = open_graph(self.bundle, name, backend=self.backend, device=self.device)
        # A loss that is back from the CPU is recorded again.
        return GraphedSession(session) if self.cuda_graph and self.device.type == "cuda" else session

    def package(self, name: str) -> tuple[dict[str, Any], Callable[[], bytes]]:
        """Return the key in the plan cache of what inductor makes of a gradient graph, and a function that makes it.

        That takes minutes, and raises as `compile_program` does.
        """
        key = package_key(
            self.bundle.graph_digest(name),
            program_version(),
            str(self.dtype).removeprefix("torch."),
            self.bundle.graphs[name].inputs,
            self.device,
        )

        def make() -> bytes:
            check_compiler(self.device)  # before a large UNet is read and traced
            return compile_program(*self.trace(name, self.dtype))

        return key, make

    def trace(self, name: str, dtype: torch.dtype) -> tuple[nn.Module, list[Tensor]]:
        """Return a gradient graph as a PyTorch module, and inputs like those that it takes."""
        tapped = self._tapped(dtype)
        program = trace_gradient(tapped, self.bundle.batch_size, self.bundle.resolution, with_noise=name == GRADIENT)
        return program.bind(tapped.unet.state_dict()), list(program.inputs.values())

    def evaluate(
        self, restored: Tensor, target: Tensor, noise: Tensor, timesteps: Tensor, weights: tuple[float, float]
    ) -> tuple[Terms, Tensor]:
        return _evaluate(self.session(gradient_graph(weights)), (restored, target, noise, timesteps), weights)

    def check(self, call: int, images: Images, weights: tuple[float, float], terms: Terms, gradient: Tensor) -> None:
        """Raise ParityError unless `evaluate` has returned for the first image what eager PyTorch does in fp32."""
        name = gradient_graph(weights)
        restored, target, noise, timesteps = (tensor[:1] for tensor in images)
        with self._opening.lock, torch.inference_mode(False):
            reference = self.references.get(name)
            if reference is None:
                self.references.clear()  # each has the weights in fp32
                reference = self.references[name] = open_reference(self.bundle, name, self.device, self.schedule)
        with fp32_precision("ieee"):
            expected = _evaluate(reference, (restored, target, noise, timesteps), weights)
        what = f"call {call:,} of this loss: {self.backend} on {self.device} computes the {name} graph"
        expect_alike(what, (Terms(*(term[:1] for term in terms)), gradient[:1]), expected, held_to(self, self.bundle))


def _evaluate(session: Session, images: Images, weights: tuple[float, float]) -> tuple[Terms, Tensor]:
    results = run_gradient_graph(session, *images, weights)
    zero = torch.zeros_like(results[SEMANTIC])
    naturalness = results.get(NATURALNESS, zero)
    semantic = results[SEMANTIC] if weights[1] else zero
    return Terms(combine(naturalness, semantic, *weights), naturalness, semantic), results[GRADIENT]


def gradient_graph(weights: tuple[float, float]) -> str:
    """Return the name of the graph that computes the terms of these weights, naturalness and semantic."""
    return GRADIENT if weights[0] else SEMANTIC_GRADIENT


class RecomputeEvaluator(_BundleEvaluator):
    """A bundle's encoder and noise head on an engine; gradients by re-running the bundle's UNet in PyTorch.

    With the backend "torch" the UNet runs forward in PyTorch too, in float32. Nothing is opened before it computes: a
    loss may be moved to where its backend cannot run, as by a trainer that leaves what it has trained on the CPU.
    """

    backward: Backward = "recompute"
    check = None

    def __init__(self, bundle: Bundle, backend: str, device: torch.device) -> None:
        super().__init__(bundle, backend, device)
        self.on_tape = backend == "torch"
        if self.on_tape:
            self.batch_size = EagerEvaluator.batch_size
        self.opened: EagerEvaluator | _Engines | None = None
        self._opening = ProcessLock()

    @classmethod
    def unchecked(cls, bundle: Bundle, backend: str, device: torch.device) -> Self:
        """Return one that is open, whatever it computes. Raises as `open_session` does."""
        evaluator = cls(bundle, backend, device)
        if evaluator.on_tape:
            evaluator.opened = EagerEvaluator(evaluator._tapped(torch.float32))
        else:
            evaluator.opened = _Engines(bundle, backend, evaluator._tapped(evaluator.dtype), device)
        return evaluator

    def open(self) -> EagerEvaluator | _Engines:
        """Return what computes the loss; it is opened, and compared with the bundle's record, the first time.

        Raises as `open_session` and `check_evaluator` do, and BundleError for a UNet that cannot be reloaded.
        """
        if self.opened is None:
            # The check takes gradients, and weights made for inference could have none later.
            with self._opening.lock, torch.inference_mode(False):
                if self.opened is None:
                    evaluator = self.unchecked(self.bundle, self.backend, self.device)
                    check_evaluator(evaluator, self.bundle)
                    self.opened = evaluator.opened
        assert self.opened is not None
        return self.opened

    def evaluate(
        self, restored: Tensor, target: Tensor, noise: Tensor, timesteps: Tensor, weights: tuple[float, float]
    ) -> tuple[Terms, None]:
        return self.open().evaluate(restored, target, noise, timesteps, weights)


class _Engines:
    """The encoder and the noise head of a bundle on an engine, and its UNet in PyTorch."""

    def __init__(self, bundle: Bundle, backend: str, unet: TappedUNet, device: torch.device) -> None:
        self.unet = unet
        self.batch_size = bundle.batch_size
        self.sessions = {
            name: open_graph(bundle, name, backend=backend, device=device) for name in (ENCODER, NOISE_HEAD)
        }

    def evaluate(
        self, restored: Tensor, target: Tensor, noise: Tensor, timesteps: Tensor, weights: tuple[float, float]
    ) -> tuple[Terms, None]:
        return _recompute_terms(self._features, self.unet, restored, target, noise, timesteps, weights), None

    def _features(self, noisy: Tensor, timesteps: Tensor, with_noise: bool) -> Features:
        # One batch at a time through both graphs: the skips between them are the largest tensors there are.
        size = self.batch_size
        parts = [
            self._run(part, steps, with_noise)
            for part, steps in zip(noisy.float().split(size), timesteps.float().split(size), strict=True)
        ]
        noise = torch.cat([part.noise for part in parts if part.noise is not None]) if with_noise else None
        return Features(torch.cat([part.bottleneck for part in parts]), noise)

    def _run(self, noisy: Tensor, timesteps: Tensor, with_noise: bool) -> Features:
        tensors = {NOISY: noisy, TIMESTEPS: timesteps}
        tensors.update(run_batched(self.sessions[ENCODER], tensors))
        if not with_noise:
            return Features(tensors[BOTTLENECK], None)
        head = self.sessions[NOISE_HEAD]
        noise = run_batched(head, {spec.name: tensors[spec.name] for spec in head.inputs})[NOISE]
        return Features(tensors[BOTTLENECK], noise)
