"""The ways to compute a step of the loss that are compared: what a user would pick, and ours.

A step takes images and returns the gradient of the weighted terms' sum with respect to the restored ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from bundles import load_tapped, make_bundle
from configurations import CONFIGURATIONS
from machine import allow_tf32
from targets import COMPILE, EAGER, OURS, UNFROZEN
from torch import Tensor, nn

from diffloss_engine.errors import BackendUnavailableError
from diffloss_engine.inductor import has_bfloat16
from diffloss_trt import DiffLoss
from diffloss_trt.evaluators import EagerEvaluator
from diffloss_trt.inputs import Backward
from diffloss_trt.objective import combine, mean_square
from diffloss_trt.probe import Probe
from diffloss_trt.unet import Features, TappedUNet

# Weights of naturalness and semantic.
TERMS: Final = {"both": (1.0, 1.0), "semantic": (0.0, 1.0)}
AUTOCAST: Final = "bf16 autocast"
# Of weights and activations.
DTYPES: Final = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    AUTOCAST: torch.float32,
}
# Of the factors of products.
PRODUCTS: Final = DTYPES | {AUTOCAST: torch.bfloat16}
_BACKENDS: Final = ("tensorrt", "tensorrt-rtx", "onnxruntime", "inductor", "torch")
# Side of images, in pixels.
_SMALL: Final = 64
# What a user's GradScaler begins with: without it the cotangents of a mean would be flushed to zero in fp16.
_SCALE: Final = 2.0**16


@dataclass(frozen=True)
class Images:
    """What a step computes on: images and noise, float32 [B, 3, H, W] in [-1, 1]; timesteps [B]."""

    restored: Tensor
    target: Tensor
    noise: Tensor
    timesteps: Tensor


Step = Callable[[Images], Tensor]


@dataclass(frozen=True)
class Setting:
    """What all ways have in common."""

    folder: Path
    configuration: str
    batch_size: int
    device: torch.device

    @property
    def side(self) -> int:
        """Of the images, in pixels: the architecture's own."""
        return int(CONFIGURATIONS[self.configuration]["sample_size"])

    def tapped(self, dtype: torch.dtype) -> TappedUNet:
        return load_tapped(self.folder, self.configuration, dtype, self.device)


def make_images(setting: Setting, count: int, decibels: float) -> Images:
    """Draw images of the architecture's own size, at as many timesteps, restored to so many dB."""
    timesteps = torch.linspace(10, 900, count).round().long()
    probe = Probe.make(3, (setting.side, setting.side), timesteps, [decibels] * count)
    restored, target, noise = (
        image.to(setting.device, torch.float32) for image in (probe.restored, probe.target, probe.noise)
    )
    return Images(restored, target, noise, timesteps.to(setting.device))


@dataclass(frozen=True)
class Way:
    """One way in one precision, for both terms or for the semantic one alone: see `TERMS` and `DTYPES`."""

    way: str
    precision: str
    terms: str
    make: Callable[[Setting, Way], Step]

    @property
    def name(self) -> str:
        return f"{self.way}, {self.precision}, {self.terms}"

    @property
    def product(self) -> str:
        """The name of the matrix product that limits it."""
        return f"product, {self.precision}"

    def step(self, setting: Setting) -> Step:
        """Return the step; raises BackendUnavailableError if it cannot be run here."""
        allow_tf32(self.precision == "tf32")
        step = self.make(setting, self)

        def run(images: Images) -> Tensor:
            allow_tf32(self.precision == "tf32")
            return step(images)

        return run


def ways(setting: Setting, precisions: Sequence[str]) -> list[Way]:
    """Return everything that is to be compared, ours and PyTorch's in `precisions`, the baseline first."""
    on_gpu = setting.device.type == "cuda"
    full = ("fp32", "tf32") if on_gpu else ("fp32",)
    half = [precision for precision in precisions if precision != "fp32"]
    found = [Way(EAGER, precision, "both", _eager) for precision in (*full, *half, *([AUTOCAST] if half else []))]
    found += [Way(UNFROZEN, precision, "both", _unfrozen) for precision in full]
    # It takes minutes, so in fp32 only where there is nothing faster.
    found += [Way(COMPILE, precision, "both", _compiled) for precision in (half or full)]
    found += [Way("Torch-TensorRT forward", precision, "both", _torch_tensorrt) for precision in half]
    for precision in precisions:
        for backend in ("tensorrt", "tensorrt-rtx", "onnxruntime"):
            make = functools.partial(_ours, backend=backend, backward="recompute")
            found.append(Way(f"diffloss-trt recompute, {backend}", precision, "both", make))
    found += [Way(EAGER, precision, "semantic", _eager) for precision in (*full, *half)]
    for terms in TERMS:
        for precision in precisions:
            for backend in _BACKENDS:
                # On a CPU PyTorch runs a bundle in fp32, whatever its precision.
                if on_gpu or backend != "torch" or precision == "fp32":
                    found.append(Way(f"{OURS}{backend}", precision, terms, functools.partial(_ours, backend=backend)))
                # For large images launching takes no time that would count.
                if on_gpu and setting.side <= _SMALL:
                    make = functools.partial(_ours, backend=backend, cuda_graph=True)
                    found.append(Way(f"{OURS}{backend} in a CUDA graph", precision, terms, make))
    return sorted(found, key=lambda way: way.terms)


def is_aimed_at(way: Way, precisions: Sequence[str]) -> bool:
    """Whether a way is one of those that the targets compare, in the first of `precisions` or in fp32."""
    baseline = way.way in (EAGER, UNFROZEN, COMPILE)
    return way.precision in (precisions[0], "fp32") and (baseline or way.way in {OURS + name for name in _BACKENDS})


# PyTorch


def objective(
    tapped: TappedUNet, weights: tuple[float, float], *, autocast: bool = False, frozen: bool = True
) -> Callable[[Tensor, Images], Tensor]:
    """Return the formula as a user would write it: restored [B, 3, H, W] -> the weighted terms, summed over the batch.

    With `autocast` in bf16; with `frozen` the target's branch is left out of PyTorch's tape.
    """

    def features(noisy: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor | None]:
        encoded = tapped.encode(noisy, timesteps)
        return encoded.bottleneck, tapped.decode(encoded) if weights[0] else None

    def total(restored: Tensor, images: Images) -> Tensor:
        noise, timesteps = images.noise, images.timesteps
        with torch.autocast(restored.device.type, torch.bfloat16, enabled=autocast):
            branch: AbstractContextManager[Any] = torch.no_grad() if frozen else nullcontext()
            with branch:
                h_x, e_x = features(tapped.schedule.add_noise(images.target, noise, timesteps), timesteps)
            h_z, e_z = features(tapped.schedule.add_noise(restored, noise, timesteps), timesteps)
        semantic = mean_square(h_z - h_x)
        naturalness = torch.zeros_like(semantic) if e_z is None or e_x is None else mean_square(e_z - e_x)
        return combine(naturalness, semantic, *weights).sum()

    return total


def _differentiated(total: Callable[[Tensor, Images], Tensor], scale: float) -> Step:
    def step(images: Images) -> Tensor:
        restored = images.restored.detach().requires_grad_()
        torch.compiler.cudagraph_mark_step_begin()
        (gradient,) = torch.autograd.grad(total(restored, images) * scale, restored)
        return gradient / scale

    return step


def _scale(way: Way) -> float:
    return _SCALE if DTYPES[way.precision] != torch.float32 else 1.0


def _tapped(setting: Setting, way: Way) -> TappedUNet:
    if way.precision == "fp16" and setting.device.type == "cpu":
        raise BackendUnavailableError("PyTorch has no fast convolution in fp16 for CPUs")
    tapped = setting.tapped(DTYPES[way.precision])
    nn.utils.convert_conv2d_weight_memory_format(tapped.unet, torch.channels_last)
    return tapped


def _eager(setting: Setting, way: Way) -> Step:
    total = objective(_tapped(setting, way), TERMS[way.terms], autocast=way.precision == AUTOCAST)
    return _differentiated(total, _scale(way))


def _unfrozen(setting: Setting, way: Way) -> Step:
    """As in the authors' code, but with the gradient: both branches are on the tape, and weights get gradients too."""
    tapped = setting.tapped(torch.float32)
    total = objective(tapped, TERMS[way.terms], frozen=False)
    tapped.unet.requires_grad_(True)

    def step(images: Images) -> Tensor:
        restored = images.restored.detach().requires_grad_()
        total(restored, images).backward()
        assert restored.grad is not None
        return restored.grad

    return step


def _compiled(setting: Setting, way: Way) -> Step:
    # With CUDA graphs. On a CPU there are none, and trying out kernels for matrix products finds nothing better.
    mode = "max-autotune" if setting.device.type == "cuda" else None
    tapped = _tapped(setting, way)
    # Made within a CUDA graph, what the schedule keeps would lie in memory that the graph uses again.
    tapped.schedule.tables(setting.device, torch.float32)
    total = torch.compile(objective(tapped, TERMS[way.terms]), fullgraph=True, dynamic=False, mode=mode)
    return _differentiated(total, _scale(way))


class _TorchTensorRTForward(EagerEvaluator):
    """Both branches forward in Torch-TensorRT, and the restored one once more in PyTorch for the gradient."""

    def __init__(self, unet: TappedUNet) -> None:
        super().__init__(unet)
        self._forward = torch.compile(super()._features, backend="torch_tensorrt", dynamic=False)

    def _features(self, noisy: Tensor, timesteps: Tensor, with_noise: bool) -> Features:
        return self._forward(noisy, timesteps, with_noise)


def _torch_tensorrt(setting: Setting, way: Way) -> Step:
    try:
        import torch_tensorrt  # noqa: F401
    except ImportError as error:
        raise BackendUnavailableError("Torch-TensorRT is not installed") from error
    evaluator = _TorchTensorRTForward(_tapped(setting, way))
    naturalness_weight, semantic_weight = TERMS[way.terms]
    loss = DiffLoss(
        evaluator,
        naturalness_weight=naturalness_weight,
        semantic_weight=semantic_weight,
        reduction="none",
        value_range=(-1.0, 1.0),
    )
    return of_loss(loss)


# Ours


def of_loss(loss: DiffLoss) -> Step:
    """Return the step of a `DiffLoss` with reduction "none" on images in [-1, 1]."""

    def step(images: Images) -> Tensor:
        restored = images.restored.detach().requires_grad_()
        total = loss(restored, images.target, timesteps=images.timesteps, noise=images.noise)
        (gradient,) = torch.autograd.grad(total.sum(), restored)
        return gradient

    return step


def _ours(setting: Setting, way: Way, *, backend: str, backward: Backward = "fused", cuda_graph: bool = False) -> Step:
    on_cpu = setting.device.type == "cpu"
    if on_cpu and backend == "inductor" and way.precision == "fp32" and has_bfloat16(setting.device):
        raise BackendUnavailableError("takes minutes to compile, and this CPU is faster in bf16")
    bundle = make_bundle(setting.folder, setting.configuration, way.precision, setting.batch_size)
    naturalness_weight, semantic_weight = TERMS[way.terms]
    return of_loss(
        DiffLoss.load(
            bundle.path,
            backend,
            setting.device,
            naturalness_weight=naturalness_weight,
            semantic_weight=semantic_weight,
            backward=backward,
            reduction="none",
            value_range=(-1.0, 1.0),
            cuda_graph=cuda_graph,
        )
    )
