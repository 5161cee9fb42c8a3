"""Checks of what a trainer passes in, in one place: each message pairs what came with what was expected."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, Final, Literal, get_args

import torch
from torch import Tensor

from diffloss_engine.errors import BackendUnavailableError, InputError, InputTypeError
from diffloss_engine.tensors import concrete_device
from diffloss_trt.nonfinite import nonfinite_images

Backward = Literal["fused", "recompute"]
Reduction = Literal["mean", "none"]
Nonfinite = Literal["error", "skip"]

# Those of the authors' code; docs/training.md says how to choose others.
DEFAULT_NATURALNESS_WEIGHT = 1e-3
DEFAULT_SEMANTIC_WEIGHT = 1e-6
# How far beyond `value_range` images may go, in widths of the range. Targets come from files and may overshoot by
# resampling; a network that has just been initialised may be anywhere near, but not at 255 when told 1.
TARGET_OVERSHOOT = 0.1
RESTORED_OVERSHOOT = 25.0
# The share of `value_range` below which a pair of batches is taken for one in another range, as [0, 1] is in [0, 255].
NARROW = 1 / 50
# Below it the products that a gradient is made of would be flushed to zero in float32.
LEAST_WEIGHT = 1e-30
TARGET_REQUIRES_GRAD = "target requires grad; the loss has no gradient for it: pass target.detach()"
NOISE_REQUIRES_GRAD = "noise requires grad; the loss has no gradient for it: pass noise.detach()"
# What can be widened to float32 without a loss, and float64.
_IMAGE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_weight(name: str, value: Any) -> float:
    """Check a weight, which may be one of NumPy's scalars; return zero, or a number not below `LEAST_WEIGHT`.

    A weight that is halved again and again is not rounded to zero, which would leave its term out.
    """
    weight = check_number(name, value)
    if not 0 <= weight <= torch.finfo(torch.float32).max:
        raise InputError(f"{name} is {value}; expected a finite number >= 0 that fits in float32")
    return max(weight, LEAST_WEIGHT) if weight else 0.0


def check_number(name: str, value: Any) -> float:
    """Check a real number, which a bool is not; what no float holds is infinite."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InputTypeError(f"{name} is {value!r}, a {type(value).__name__}; expected a number")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def check_pair(name: str, value: Any, example: str = "") -> None:
    """Check that there are two bounds; what they are is not looked at."""
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        raise InputTypeError(f"{name} is {value!r}; expected (low, high){example}")


def check_range(name: str, value: Any) -> tuple[float, float]:
    """Check a range of pixels; return it as (low, high)."""
    check_pair(name, value, ", such as (0.0, 1.0)")
    low, high = (check_number(f"a bound of {name}", bound) for bound in value)
    if not 0 < high - low < math.inf:
        raise InputError(f"{name} is ({low}, {high}); expected finite bounds with low < high")
    return low, high


def check_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """Check that a setting is one of a few words."""
    if not isinstance(value, str) or value not in choices:
        *others, last = map(repr, choices)
        raise InputError(f"{name} is {value!r}; expected {', '.join(others)} or {last}")
    return value


def check_integer(name: str, value: Any, least: int = -(2**63), otherwise: str = "") -> int:
    """Check an integer that int64 holds, NumPy's among them; `otherwise` says what else may be passed."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise InputTypeError(f"{name} is a {type(value).__name__}; expected an integer{otherwise}")
    number = int(value)
    if not least <= number < 2**63:
        raise InputError(f"{name} is {number}; expected {least} to 2**63 - 1{otherwise}")
    return number


def _check_optional_integer(name: str, value: Any, least: int) -> int | None:
    return None if value is None else check_integer(name, value, least, ", or None")


def check_steps(steps: Any) -> None:
    """Check the number of steps over which something changes."""
    if not 1 <= check_number("steps", steps) < math.inf:  # NaN neither
        raise InputError(f"steps is {steps}; expected a finite number of at least 1")


# The settings of a DiffLoss: each raises for what cannot be used, and returns what is kept.
SETTINGS: Final[Mapping[str, Callable[[str, Any], Any]]] = {
    "naturalness_weight": check_weight,
    "semantic_weight": check_weight,
    "reduction": functools.partial(check_choice, choices=get_args(Reduction)),
    "value_range": check_range,
    "seed": functools.partial(_check_optional_integer, least=0),
    "nonfinite": functools.partial(check_choice, choices=get_args(Nonfinite)),
    "check_every": functools.partial(_check_optional_integer, least=1),
}


def check_settings(settings: Mapping[str, Any]) -> None:
    """Check settings of a DiffLoss, by name."""
    for name, value in settings.items():
        SETTINGS[name](name, value)


def choose_device(device: str | torch.device | None) -> torch.device:
    """Return the device meant by `device`, None being the GPU if there is one; with an index if it is a GPU.

    Raises `InputError` for anything but a CPU or CUDA device, `BackendUnavailableError` if it is not there.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"device is {device!r}; expected 'cpu', 'cuda' or 'cuda:N'") from error
    if place.type not in ("cpu", "cuda"):
        raise InputError(f"device is {place}; expected 'cpu', 'cuda' or 'cuda:N'")
    if place.type == "cuda":
        if not torch.cuda.is_available():
            raise BackendUnavailableError(f"device is {place}, but PyTorch sees no CUDA GPU here")
        if place.index is not None and place.index >= torch.cuda.device_count():
            raise BackendUnavailableError(f"device is {place}, but there are {torch.cuda.device_count()} GPUs here")
    return concrete_device(place)


def _expect_dense(name: str, value: Any, expected: str = "a torch.Tensor") -> None:
    if not isinstance(value, Tensor):
        raise InputTypeError(f"{name} is a {type(value).__name__}; expected {expected}")
    if value.layout != torch.strided or value.is_nested:
        raise InputTypeError(f"{name} is a sparse or nested tensor; expected a dense one")


def _check_tensor(name: str, image: Tensor, shape: Sequence[int], device: torch.device, hint: str = "") -> None:
    _expect_dense(name, image)
    if image.dtype not in _IMAGE_DTYPES:
        raise InputTypeError(f"{name} has dtype {image.dtype}; expected a floating-point dtype of 16, 32 or 64 bits")
    if list(image.shape) != list(shape):
        raise InputError(f"{name} has shape {list(image.shape)}; expected {list(shape)}{hint}")
    if image.device != device:
        raise InputTypeError(f"{name} is on {image.device}; expected {device}, where the loss is")


def _beyond(name: str, image: Tensor, extremes: Sequence[float], low: float, high: float, overshoot: float) -> str:
    """Return what is to be said of pixels that are not finite, or too far outside the range, or else ""."""
    if not all(math.isfinite(value) for value in extremes):
        return f"{name} holds NaN or infinite values {nonfinite_images(image)}"
    margin = overshoot * (high - low)
    if extremes[0] < low - margin or extremes[1] > high + margin:
        return (
            f"{name} has values from {extremes[0]:.4g} to {extremes[1]:.4g}; "
            f"expected about {low:g} to {high:g} (value_range={low, high})"
        )
    return ""


def check_images(
    restored: Tensor,
    target: Tensor,
    *,
    channels: int,
    resolution: tuple[int, int] | None,
    multiple: int,
    device: torch.device,
    value_range: tuple[float, float],
    values: bool,
) -> tuple[str, str]:
    """Check a pair of image batches; `resolution` None admits any multiple of `multiple`.

    `values` says whether to look at the pixels too (NaN, infinity, range), which on a GPU waits for it, once. Returned,
    not raised, is what is to be said, or else "": of a `restored` as of a network that has diverged, and of a pair that
    takes up so little of the range that it may be in another one.
    """
    _expect_dense("restored", restored)
    if restored.ndim != 4:
        raise InputError(f"restored has shape {list(restored.shape)}; expected four axes [B, {channels}, H, W]")
    batch, found, height, width = restored.shape
    if batch == 0:
        raise InputError(f"restored has shape {list(restored.shape)}; expected at least one image")
    hint = ""
    if resolution is not None:
        if (height, width) != resolution:
            hint = ", the bundle's size: crop the images to it, or export a bundle of their size with --resolution"
        height, width = resolution
    elif height == 0 or width == 0 or height % multiple or width % multiple:
        raise InputError(
            f"restored is {height}x{width}; expected height and width to be multiples of {multiple}, as this UNet needs"
        )
    if found != channels and restored.shape[-1] == channels:
        hint = ": its last axis looks like the channels; permute(0, 3, 1, 2) puts them where they are expected"
    elif found != channels:
        hint = f": this UNet takes {channels} channels; export a UNet that takes {found}, or convert the images"
    shape = (batch, channels, height, width)
    _check_tensor("restored", restored, shape, device, hint)
    _check_tensor("target", target, shape, device)
    if target.requires_grad:
        raise InputError(TARGET_REQUIRES_GRAD)
    if not values:
        return "", ""
    # One transfer for both; NaN anywhere makes both extremes of an image NaN.
    extremes = torch.stack((*restored.detach().aminmax(), *target.detach().aminmax())).tolist()
    of_restored, of_target = extremes[:2], extremes[2:]
    if broken := _beyond("target", target, of_target, *value_range, TARGET_OVERSHOOT):
        raise InputError(broken)
    diverged = _beyond("restored", restored, of_restored, *value_range, RESTORED_OVERSHOOT)
    if diverged and all(math.isfinite(value) for value in of_restored):
        diverged += ": value_range is wrong, or the network has diverged"
    narrow = ""
    if max(most - least for least, most in (of_restored, of_target)) < NARROW * (value_range[1] - value_range[0]):
        narrow = (
            f"restored has values from {of_restored[0]:.4g} to {of_restored[1]:.4g}, and target from "
            f"{of_target[0]:.4g} to {of_target[1]:.4g}: is value_range={value_range} the range of these images?"
        )
    return diverged, narrow


def check_noise(noise: Tensor, restored: Tensor) -> None:
    """Check that `noise` is a floating-point tensor like `restored`, without gradient."""
    _check_tensor("noise", noise, restored.shape, restored.device)
    if noise.requires_grad:
        raise InputError(NOISE_REQUIRES_GRAD)


def check_timesteps(timesteps: Tensor, batch: int, count: int, device: torch.device, *, values: bool) -> None:
    """Check that `timesteps` are integers [B] in [0, count)."""
    _expect_dense("timesteps", timesteps, f"an integer torch.Tensor [{batch}]")
    # PyTorch computes little in other unsigned dtypes.
    if timesteps.dtype not in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        raise InputTypeError(f"timesteps has dtype {timesteps.dtype}; expected an integer dtype, such as torch.int64")
    if list(timesteps.shape) != [batch]:
        raise InputError(f"timesteps has shape {list(timesteps.shape)}; expected [{batch}], one per image")
    if timesteps.device != device:
        raise InputTypeError(f"timesteps is on {timesteps.device}; expected {device}, where the loss is")
    if values:
        low, high = torch.stack(timesteps.aminmax()).tolist()  # at once, where that waits for a GPU
        if low < 0 or high >= count:
            raise InputError(f"timesteps has values from {low} to {high}; expected 0 to {count - 1}")
