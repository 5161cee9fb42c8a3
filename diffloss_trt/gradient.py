"""DiffLoss and its gradient with respect to the restored image, as one forward-only program in difference form."""

from __future__ import annotations

import functools
import hashlib
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from diffloss_engine.batching import run_batched
from diffloss_engine.hashed_files import file_sha256
from diffloss_engine.session import Session
from diffloss_trt.capture import CapturedUNet
from diffloss_trt.contract import (
    GRADIENT,
    NATURALNESS,
    NATURALNESS_WEIGHT,
    NOISE,
    RESTORED,
    SEMANTIC,
    SEMANTIC_GRADIENT,
    SEMANTIC_WEIGHT,
    TARGET,
    TIMESTEPS,
)
from diffloss_trt.objective import normalised, per_sample, power_of_two, terms_and_cotangents, wide
from diffloss_trt.tape import Pair, Tape
from diffloss_trt.traced import TracedProgram
from diffloss_trt.unet import TappedUNet

_SIGNAL_TABLE, _NOISE_TABLE = "signal_table", "noise_table"


def run_gradient_graph(
    session: Session,
    restored: Tensor,
    target: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    weights: tuple[float, float],
) -> dict[str, Tensor]:
    """Run a gradient graph on N samples, whatever its batch size, with weights for naturalness and semantic."""
    tensors = {RESTORED: restored, TARGET: target, NOISE: noise, TIMESTEPS: timesteps}
    for name, weight in zip((NATURALNESS_WEIGHT, SEMANTIC_WEIGHT), weights, strict=True):
        tensors[name] = torch.full_like(timesteps, weight, dtype=torch.float32)
    return run_batched(session, {spec.name: tensors[spec.name].detach().float() for spec in session.inputs})


@functools.cache
def program_version() -> str:
    """Return what identifies the code that makes the program, which a compiled one is kept under, beside its weights.

    That is this package's own source, and the version of diffusers, which says what the UNet computes.
    """
    sources = sorted(Path(__file__).parent.glob("*.py"))
    parts = [version("diffusers"), *map(file_sha256, sources)]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def trace_gradient(
    tapped: TappedUNet, batch_size: int, resolution: tuple[int, int], *, with_noise: bool
) -> TracedProgram:
    """Trace the gradient graph for images of one size, or, without the noise, the one of the semantic term alone.

    Inputs: restored, target, noise [B, C, H, W], images in [-1, 1]; timesteps [B]; a weight [B] >= 0 for each term.
    Outputs: each term [B], unweighted; gradient [B, C, H, W], that of each sample's weighted sum of the terms.
    All are float32 (float64 if the UNet is); inside, convolutions and matrix products have the UNet's dtype.

    Raises ModelError for a UNet with an operation that has no difference form.
    """
    # In a thread of its own nothing holds that is set for this one: a trainer may be inside of autocast or of another
    # mode, and within an operation, as a compiled step calls the loss, PyTorch differentiates and traces nothing.
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(_trace, tapped, batch_size, resolution, with_noise).result()


def _trace(tapped: TappedUNet, batch_size: int, resolution: tuple[int, int], with_noise: bool) -> TracedProgram:
    captured = CapturedUNet(tapped, batch_size, resolution, with_noise=with_noise)
    outside = torch.promote_types(tapped.dtype, torch.float32)
    device = tapped.device
    state = tapped.unet.state_dict()
    tables = tapped.schedule.tables(device, outside)
    constants = {**captured.constants, _SIGNAL_TABLE: tables.signal, _NOISE_TABLE: tables.noise}
    image, number = (batch_size, tapped.channels, *resolution), (batch_size,)
    shapes = {RESTORED: image, TARGET: image, NOISE: image, TIMESTEPS: number}
    shapes |= {NATURALNESS_WEIGHT: number} if with_noise else {}
    shapes |= {SEMANTIC_WEIGHT: number}
    inputs = {name: torch.zeros(shape, dtype=outside, device=device) for name, shape in shapes.items()}

    def program(
        inputs: dict[str, Tensor], weights: dict[str, Tensor], constants: dict[str, Tensor]
    ) -> tuple[Tensor, ...]:
        index = inputs[TIMESTEPS].long()
        signal, of_noise = (constants[name][index].view(-1, 1, 1, 1) for name in (_SIGNAL_TABLE, _NOISE_TABLE))
        difference = signal * (inputs[RESTORED] - inputs[TARGET])
        scale = power_of_two(difference.flatten(1).abs().amax(1)) if tapped.dtype is torch.float16 else None
        tape = Tape(scale, tapped.dtype)
        noisy = Pair(signal * inputs[TARGET] + of_noise * inputs[NOISE], tape.unscaled(difference))
        taps = captured.run_pair(tape, noisy, inputs[TIMESTEPS], weights, constants)
        terms, cotangents = terms_and_cotangents(
            *(tape.scaled(tap.difference) for tap in taps),
            naturalness_weight=inputs.get(NATURALNESS_WEIGHT),
            semantic_weight=inputs[SEMANTIC_WEIGHT],
        )
        size, cotangents = normalised(cotangents)
        ends = list(zip(taps, cotangents, strict=True))
        gradient = signal * per_sample(size, signal) * wide(tape.gradient(ends, noisy))
        return (terms.naturalness, terms.semantic, gradient) if with_noise else (terms.semantic, gradient)

    return TracedProgram.trace(
        GRADIENT if with_noise else SEMANTIC_GRADIENT,
        program,
        inputs,
        {key: state[key] for key in captured.weights},
        constants,
        (NATURALNESS, SEMANTIC, GRADIENT) if with_noise else (SEMANTIC, GRADIENT),
    )
