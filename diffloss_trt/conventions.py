"""The loss in the form that other trainers expect: keyword options, called with an image and its ground truth."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from diffloss_engine.errors import InputError, InputTypeError
from diffloss_trt.autograd import attach
from diffloss_trt.inputs import check_choice, check_weight
from diffloss_trt.loss import DiffLoss
from diffloss_trt.objective import Terms

Reduction = Literal["none", "mean", "sum"]
# Of `DiffLoss.load`, beside those that the criteria here have themselves.
_OPTIONS = [
    name for name in inspect.signature(DiffLoss.load).parameters if name not in ("bundle", "reduction", "value_range")
]


class DiffLossCriterion(nn.Module):
    """DiffLoss with the options and attributes of the losses of piq and pyiqa: `criterion(restored, target)` -> Tensor.

    Args:
        bundle: the bundle's folder.
        loss_weight: a factor of both terms. At zero nothing is computed, and nothing drawn.
        reduction: over the batch: "mean", "sum", or "none" for a loss of each sample, [B].
        data_range: images are in [0, data_range].
        value_range: or images are in [low, high].
        options: further options of `DiffLoss.load`, such as `naturalness_weight` and `backend`.

    Raises InputError for an unknown reduction, a `data_range` of 0 or both ranges, InputTypeError for an unknown option
    or a `data_range` that is not a number, and as `DiffLoss.load` does.
    """

    lower_better = True
    metric_mode = "FR"  # full reference

    def __init__(
        self,
        bundle: str | PathLike[str],
        *,
        loss_weight: float = 1.0,
        reduction: Reduction = "mean",
        data_range: float | None = None,
        value_range: Sequence[float] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if unknown := options.keys() - _OPTIONS:
            own = [name for name in inspect.signature(DiffLossCriterion).parameters if name != "options"]
            raise InputTypeError(f"unknown option {min(unknown)!r}; expected one of {', '.join(own + _OPTIONS)}")
        self.loss_weight = loss_weight
        self.reduction = reduction
        if value_range is None:
            brightest = check_weight("data_range", 1.0 if data_range is None else data_range)
            if not brightest:
                raise InputError("data_range is 0; expected the value of white, such as 1.0 or 255")
            value_range = (0.0, brightest)
        elif data_range is not None:
            raise InputError("both data_range and value_range are given; expected one of them")
        self.loss_fn = DiffLoss.load(bundle, reduction="none", value_range=value_range, **options)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "loss_weight":
            value = check_weight(name, value)
        elif name == "reduction":
            value = check_choice(name, value, get_args(Reduction))
        super().__setattr__(name, value)

    def forward(self, x: Tensor, y: Tensor, **draws: Any) -> Tensor:
        """Return the loss of `x` against the ground truth `y`, both [B, C, H, W]; for `draws` see `DiffLoss.terms`.

        Raises as `DiffLoss.terms` does, and InputError if it is `y` alone that requires grad.
        """
        # With other losses of these packages the order does not matter.
        if torch.is_grad_enabled() and y.requires_grad and not x.requires_grad:
            raise InputError(
                "y, the ground truth, requires grad and x, the restored image, does not; the loss has a gradient for "
                "its first argument alone: pass (restored, target)"
            )
        if self.loss_weight:
            loss = self.loss_weight * self.loss_fn(x, y.detach(), **draws)
        else:
            nothing = torch.zeros(len(x), device=x.device)
            loss = attach(Terms(nothing, nothing, nothing), x, torch.zeros_like(x)).total
        if self.reduction == "none":
            return loss
        return loss.mean() if self.reduction == "mean" else loss.sum()

    if TYPE_CHECKING:
        __call__ = forward


class PerceptualDiffLoss(nn.Module):
    """The same for BasicSR and trainers like it, whose perceptual losses return a pair; the style loss is None.

    It is registered like any other loss, `LOSS_REGISTRY.register()(PerceptualDiffLoss)`, and chosen in the options:

        perceptual_opt:
          type: PerceptualDiffLoss
          bundle: path/to/bundle
          naturalness_weight: !!float 1e-3

    The options are those of `DiffLossCriterion`.
    """

    def __init__(self, bundle: str | PathLike[str], **options: Any) -> None:
        super().__init__()
        self.criterion = DiffLossCriterion(bundle, **options)

    def forward(self, x: Tensor, gt: Tensor) -> tuple[Tensor, None]:
        """Return (loss of `x` against the ground truth `gt`, None); both images are [B, C, H, W]."""
        return self.criterion(x, gt), None

    if TYPE_CHECKING:
        __call__ = forward
