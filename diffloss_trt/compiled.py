"""DiffLoss under torch.compile: one operation of the graph, whose kernel does what eager mode does."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from diffloss_engine.errors import BackendError, InputError
from diffloss_trt.autograd import attach
from diffloss_trt.inputs import NOISE_REQUIRES_GRAD, TARGET_REQUIRES_GRAD
from diffloss_trt.objective import Terms

if TYPE_CHECKING:
    from diffloss_trt.loss import DiffLoss

# A compiled graph holds tensors and numbers. By its number it finds a loss here, which it does not keep alive.
_losses: WeakValueDictionary[int, DiffLoss] = WeakValueDictionary()
_handles = itertools.count()


def register(loss: DiffLoss) -> int:
    """Return the number by which compiled graphs find `loss`; no other one gets it, also when `loss` is gone."""
    handle = next(_handles)
    _losses[handle] = loss
    return handle


def compiled_terms(
    loss: DiffLoss, handle: int, restored: Tensor, target: Tensor, timesteps: Tensor | None, noise: Tensor | None
) -> Terms:
    """Return what `DiffLoss.terms` does, for a loss with backward "fused": in a form that torch.compile can trace.

    The loss's weights, its draws and its session are looked up when the graph runs.
    """
    # Two equal calls would be taken for one, in spite of the tag (torch 2.13), if each had not a tensor of its own.
    call = torch.empty(0, device=restored.device)
    refused = ""
    if target.requires_grad:
        refused = TARGET_REQUIRES_GRAD
    elif noise is not None and noise.requires_grad:
        refused = NOISE_REQUIRES_GRAD
    *terms, gradient = _value_and_gradient(
        restored.detach(), target.detach(), timesteps, None if noise is None else noise.detach(), call, refused, handle
    )
    return attach(Terms(*terms), loss.centred(restored), gradient)


@torch.library.custom_op(
    "diffloss_trt::value_and_gradient",
    mutates_args=(),
    # It draws noise: not to be run once more for the backward pass, nor recorded in a CUDA graph, noise and all.
    tags=(torch.Tag.nondeterministic_seeded, torch.Tag.cudagraph_unsafe),
)
def _value_and_gradient(
    restored: Tensor,
    target: Tensor,
    timesteps: Tensor | None,
    noise: Tensor | None,
    call: Tensor,
    refused: str,
    handle: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return total, naturalness, semantic [B], and the gradient of total with respect to `restored` in [-1, 1]."""
    loss = _losses.get(handle)
    if loss is None:
        raise BackendError("the DiffLoss that this graph was compiled with is gone")
    if refused:
        raise InputError(refused)
    terms, gradient = loss.evaluate(loss.prepare(restored, target, timesteps, noise))
    assert gradient is not None  # as backward "fused" computes it
    # Compiled graphs expect the layout that is promised below; channels-last images may give another.
    total, naturalness, semantic, gradient = (result.float().contiguous() for result in (*terms, gradient))
    return total, naturalness, semantic, gradient


@_value_and_gradient.register_fake
def _(
    restored: Tensor,
    target: Tensor,
    timesteps: Tensor | None,
    noise: Tensor | None,
    call: Tensor,
    refused: str,
    handle: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total, naturalness, semantic = (restored.new_empty(restored.shape[0], dtype=torch.float32) for _ in range(3))
    return total, naturalness, semantic, restored.new_empty(restored.shape, dtype=torch.float32)
