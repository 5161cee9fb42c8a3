"""The loss as everybody computes it in half precision: two passes, and the difference of their results."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from diffloss_trt.objective import combine, mean_square
from diffloss_trt.unet import TappedUNet

# What a user's GradScaler begins with.
_SCALE = 2.0**16
Pass = Callable[[], AbstractContextManager[Any]]


class RoundedToHalf(TorchDispatchMode):
    """Rounds what every operation returns in float32 to fp16, in the backward pass too.

    So results are those of fp16 weights and activations with sums in float32, as a GPU computes them. CPUs have no fast
    convolutions in fp16: with the dtype itself a pass takes a hundred times as long.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        if func.is_view:
            return results
        return tree_map_only(Tensor, _rounded, results)


def _rounded(result: Tensor) -> Tensor:
    return result.copy_(result.half()) if result.dtype == torch.float32 else result


class PlainLoss:
    """Terms and gradient in plain form: `(restored, target, timesteps, noise) -> loss`, a mean over the batch.

    precision: "fp32"; "bf16 autocast"; or "fp16", of the UNet's weights and activations, with the loss scaled up on the
        way back. Of these weights the UNet keeps what fp16 leaves.
    restored, target: in [0, 1], [B, C, H, W].
    """

    def __init__(self, unet: TappedUNet, precision: str, weights: tuple[float, float]) -> None:
        self.unet = unet
        self.weights = weights
        self.scale = _SCALE if precision == "fp16" else 1.0
        self.forward: Pass = {"fp16": RoundedToHalf, "bf16 autocast": _autocast, "fp32": nullcontext}[precision]
        self.backward: Pass = RoundedToHalf if precision == "fp16" else nullcontext
        if precision == "fp16":
            unet.unet.load_state_dict({name: weight.half().float() for name, weight in unet.unet.state_dict().items()})

    def __call__(self, restored: Tensor, target: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        leaf = restored.detach().requires_grad_()
        noisy, noisy_target = (
            self.unet.schedule.add_noise(2 * image - 1, noise, timesteps) for image in (leaf, target)
        )
        with self.forward(), torch.no_grad():
            encoded_target = self.unet.encode(noisy_target, timesteps)
            predicted_target = self.unet.decode(encoded_target)
        with self.forward():
            encoded = self.unet.encode(noisy, timesteps)
            predicted = self.unet.decode(encoded)
        naturalness = mean_square(predicted - predicted_target)
        semantic = mean_square(encoded.bottleneck - encoded_target.bottleneck)
        total = combine(naturalness, semantic, *self.weights).mean()
        results = [encoded.bottleneck, predicted]
        # These are products with the differences, in float32 for everybody.
        cotangents = torch.autograd.grad(total * self.scale, results, retain_graph=True)
        with self.backward():
            (gradient,) = torch.autograd.grad(results, leaf, cotangents)
        # Its value and its gradient, without the tape of the UNet.
        pushed = (restored * (gradient / self.scale)).sum()
        return pushed + (total - pushed).detach()


def _autocast() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16)
