"""How the terms of the loss are computed: eager PyTorch, or engines forward and PyTorch backward."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from diffloss_engine.batching import run_batched
from diffloss_engine.bundle import Bundle
from diffloss_engine.session import Session, open_session
from diffloss_trt.autograd import Cotangents, Recompute
from diffloss_trt.contract import BOTTLENECK, ENCODER, NOISE, NOISE_HEAD, NOISY, PRECISIONS, SCHEDULE, TIMESTEPS
from diffloss_trt.objective import Terms, combine, mean_square
from diffloss_trt.schedule import NoiseSchedule
from diffloss_trt.unet import Features, TappedUNet, reload_unet


class Evaluator(Protocol):
    """Computes DiffLoss on images in [-1, 1]; holds everything frozen, so that copies may share it."""

    backend: str
    device: torch.device
    schedule: NoiseSchedule
    channels: int
    resolution_multiple: int

    @property
    def resolution(self) -> tuple[int, int] | None:
        """The one image size that can be taken, or None for any multiple of `resolution_multiple`."""
        ...

    def terms(
        self, restored: Tensor, target: Tensor, noise: Tensor, timesteps: Tensor, weights: tuple[float, float]
    ) -> Terms:
        """Return the terms; `restored`, `target`, `noise` [B, C, H, W] float32 or float64, `timesteps` [B] integers.

        `weights` are those of naturalness and semantic, not both zero; a term of weight zero is not computed: it is
        zero.
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
    """The reference: PyTorch forward and backward, in the precision of the UNet."""

    backend = "torch"
    resolution = None

    def __init__(self, unet: TappedUNet, device: torch.device) -> None:
        self.unet = unet
        self.device = device
        self.schedule = unet.schedule
        self.channels = unet.channels
        self.resolution_multiple = unet.resolution_multiple

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def to(self, device: torch.device) -> Self:
        # Moving a module is done in place, and copies of the loss share this one.
        return type(self)(copy.deepcopy(self.unet).to(device), device)

    def _features(self, noisy: Tensor, timesteps: Tensor, with_noise: bool) -> Features:
        return self.unet.features(noisy, timesteps, with_noise=with_noise)

    def terms(
        self, restored: Tensor, target: Tensor, noise: Tensor, timesteps: Tensor, weights: tuple[float, float]
    ) -> Terms:
        if self.unet.dtype in (torch.float16, torch.bfloat16):
            # The tape would carry cotangents of order 1e-9, which half precision flushes to zero.
            return _recompute_terms(self._features, self.unet, restored, target, noise, timesteps, weights)
        with_noise = weights[0] > 0
        with torch.no_grad():
            of_target = self._features(self.schedule.add_noise(target, noise, timesteps), timesteps, with_noise)
        of_restored = self._features(self.schedule.add_noise(restored, noise, timesteps), timesteps, with_noise)
        return _measure(of_restored, of_target, weights)


class RecomputeEvaluator:
    """A bundle's encoder and noise head on an engine; gradients by re-running the bundle's UNet in PyTorch."""

    def __init__(self, bundle: Bundle, backend: str, device: torch.device) -> None:
        self.bundle = bundle
        self.backend = backend
        self.device = device
        self._open()

    def _open(self) -> None:
        bundle = self.bundle
        self.schedule = NoiseSchedule.from_json(bundle.read_json(SCHEDULE))
        self.resolution = bundle.resolution
        self.sessions: dict[str, Session] = {
            name: open_session(
                bundle.graph_file(name),
                bundle.graphs[name].inputs,
                bundle.graphs[name].outputs,
                backend=self.backend,
                device=self.device,
            )
            for name in (ENCODER, NOISE_HEAD)
        }
        # A CPU has no fast half-precision convolution; there the stored weights are widened.
        dtype = PRECISIONS[bundle.precision] if self.device.type == "cuda" else torch.float32
        self.unet = TappedUNet(reload_unet(bundle, dtype, self.device), self.schedule)
        self.channels = self.unet.channels
        self.resolution_multiple = self.unet.resolution_multiple

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {"bundle": self.bundle, "backend": self.backend, "device": self.device}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def to(self, device: torch.device) -> Self:
        return type(self)(self.bundle, self.backend, device)

    def _features(self, noisy: Tensor, timesteps: Tensor, with_noise: bool) -> Features:
        # One batch at a time through both graphs: the skips between them are the largest tensors there are.
        size = self.bundle.batch_size
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

    def terms(
        self, restored: Tensor, target: Tensor, noise: Tensor, timesteps: Tensor, weights: tuple[float, float]
    ) -> Terms:
        return _recompute_terms(self._features, self.unet, restored, target, noise, timesteps, weights)
