"""Gradients that do not come from PyTorch's tape of the forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffloss_engine.errors import BackendError
from diffloss_trt.objective import Terms, normalised, per_sample, slope, wide
from diffloss_trt.unet import Features, TappedUNet


class Cotangents:
    """The gradient of each sample's loss with respect to the restored branch's features.

    Both are `normalised`: `size` [B] is the power of two that was taken out of each sample.
    """

    def __init__(self, restored: Features, target: Features, naturalness_weight: float, semantic_weight: float) -> None:
        gradients = [slope(wide(restored.bottleneck) - target.bottleneck, semantic_weight)]
        if restored.noise is not None and target.noise is not None:
            gradients.append(slope(wide(restored.noise) - target.noise, naturalness_weight))
        self.size, scaled = normalised(gradients)
        self.bottleneck = scaled[0]
        self.noise = scaled[1] if len(scaled) == 2 else None


def input_gradient(unet: TappedUNet, noisy: Tensor, timesteps: Tensor, cotangents: Cotangents) -> Tensor:
    """Return each sample's gradient of the loss with respect to `noisy`, in its dtype: PyTorch runs the UNet."""
    leaf = noisy.detach().requires_grad_()
    # Where a trainer calls backward() under autocast, that would reach into the matrix products of the UNet's backward.
    with torch.enable_grad(), torch.autocast(noisy.device.type, enabled=False):
        features = unet.features(leaf, timesteps, with_noise=cotangents.noise is not None)
        outputs, gradients = [features.bottleneck], [cotangents.bottleneck]
        if features.noise is not None and cotangents.noise is not None:
            outputs.append(features.noise)
            gradients.append(cotangents.noise)
        typed = [gradient.to(output.dtype) for output, gradient in zip(outputs, gradients, strict=True)]
        (gradient,) = torch.autograd.grad(outputs, leaf, typed)
    return gradient * per_sample(cotangents.size, gradient)


class Recompute(torch.autograd.Function):
    """Gives `total` [B], computed without a tape, its gradient with respect to `noisy`: PyTorch re-runs the UNet.

    The cotangents come from the features of the forward pass, which were computed alike for both branches; PyTorch
    supplies the UNet's Jacobian only. So a difference between two runtimes' rounding never enters the gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, noisy: Tensor, total: Tensor, timesteps: Tensor, cotangents: Cotangents, unet: TappedUNet
    ) -> Tensor:
        # A copy, because what was made in inference mode cannot be saved.
        ctx.save_for_backward(noisy, timesteps.clone())
        ctx.cotangents, ctx.unet = cotangents, unet
        return total.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        noisy, timesteps = ctx.saved_tensors
        arguments = ctx.unet, noisy, timesteps, ctx.cotangents
        if torch.compiler.is_dynamo_compiling():  # where a compiled step calls backward()
            from diffloss_trt.uncompiled import uncompiled

            gradient = uncompiled(input_gradient, *arguments)
        else:
            gradient = input_gradient(*arguments)
        scaled: Tensor = _Final.apply(gradient, noisy, upstream)  # type: ignore[no-untyped-call]
        return scaled, None, None, None, None


class Fused(torch.autograd.Function):
    """Gives `total` [B], computed without a tape, the gradient with respect to `restored` that was computed with it."""

    @staticmethod
    def forward(ctx: Any, restored: Tensor, total: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(restored, gradient)
        return total.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        restored, gradient = ctx.saved_tensors
        scaled: Tensor = _Final.apply(gradient, restored, upstream)  # type: ignore[no-untyped-call]
        return scaled.to(restored.dtype), None, None


def attach(terms: Terms, restored: Tensor, gradient: Tensor) -> Terms:
    """Return the terms with `total` attached to `restored` by its gradient, if a tape is being made."""
    if not (torch.is_grad_enabled() and restored.requires_grad):
        return terms
    total = Fused.apply(restored, terms.total, gradient)  # type: ignore[no-untyped-call]
    return Terms(total, terms.naturalness, terms.semantic)


class _Final(torch.autograd.Function):
    """Multiplies `gradient` by `upstream`, and refuses to be differentiated.

    The gradient depends on `image`, by way of no tape. PyTorch's `once_differentiable` looks at `upstream` alone,
    and would let a gradient penalty go by as a constant.
    """

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, image: Tensor, upstream: Tensor) -> Tensor:
        return gradient * per_sample(upstream, gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise BackendError("the gradient of this loss cannot be differentiated again: autograd did not record it")
