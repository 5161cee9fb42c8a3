"""What the writer of a bundle and the runner of a bundle agree on: names, files, precisions.

A bundle's graphs and their tensors, batch first, `h`, `w` the bottleneck's size:

| graph | inputs | outputs |
|---|---|---|
| encoder | noisy [B, C, H, W], timesteps [B] | bottleneck [B, c, h, w], time_embedding [B, k], skip_0, skip_1, ... |
| noise_head | the encoder's outputs; noisy and timesteps too, unless the UNet predicts noise | noise [B, C, H, W] |
| gradient | restored, target, noise, timesteps, naturalness_weight, semantic_weight | naturalness, semantic, gradient |
| semantic_gradient | the same without naturalness_weight | semantic, gradient |

`restored`, `target` and `gradient` are images too, [B, C, H, W]; weights and terms are [B]. All of these are float32,
as `noisy`, `timesteps` and `noise` are; the tensors between encoder and noise head have the bundle's precision.
Restored and target are in [-1, 1]; `gradient` is that of each sample's weighted sum of the terms with respect to
restored.

The two gradient graphs are in difference form (`difference.py`). The other two are in plain form: subtracting their
outputs for two similar images loses digits, which half precision does not have to spare (DiffLoss's gradient error at
40 dB: fp16 0.3, bf16 2).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import torch

from diffloss_engine.bundle import Bundle
from diffloss_engine.errors import BundleError
from diffloss_engine.strict_json import expect, expect_positive
from diffloss_engine.tensors import TensorSpec
from diffloss_trt.schedule import NoiseSchedule

ENCODER: Final = "encoder"
NOISE_HEAD: Final = "noise_head"
GRADIENT: Final = "gradient"
SEMANTIC_GRADIENT: Final = "semantic_gradient"

NOISY: Final = "noisy"
TIMESTEPS: Final = "timesteps"
RESTORED: Final = "restored"
TARGET: Final = "target"
NATURALNESS: Final = "naturalness"
NATURALNESS_WEIGHT: Final = "naturalness_weight"
SEMANTIC: Final = "semantic"
SEMANTIC_WEIGHT: Final = "semantic_weight"
BOTTLENECK: Final = "bottleneck"
TIME_EMBEDDING: Final = "time_embedding"
NOISE: Final = "noise"

UNET_CONFIG: Final = "unet/config.json"
UNET_WEIGHTS: Final = "unet/diffusion_pytorch_model.safetensors"
SCHEDULE: Final = "schedule.json"
REFERENCE: Final = "reference.safetensors"

PRECISIONS: Final = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# What each graph takes, at most, and the first of what it returns; the noise head takes the encoder's outputs before.
_IMAGES: Final = (RESTORED, TARGET, NOISE, TIMESTEPS)
_AGREED: Final = {
    ENCODER: ([NOISY, TIMESTEPS], [BOTTLENECK]),
    NOISE_HEAD: ([NOISY, TIMESTEPS], [NOISE]),
    GRADIENT: ([*_IMAGES, NATURALNESS_WEIGHT, SEMANTIC_WEIGHT], [NATURALNESS, SEMANTIC, GRADIENT]),
    SEMANTIC_GRADIENT: ([*_IMAGES, SEMANTIC_WEIGHT], [SEMANTIC, GRADIENT]),
}


def skip_name(index: int) -> str:
    """Return the tensor name of skip connection `index`, counted from the input convolution."""
    return f"skip_{index}"


def agreed_shape(name: str, images: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the shape of a tensor that goes with images [B, C, H, W]; None if it depends on the UNet."""
    if name in (NOISY, RESTORED, TARGET, NOISE, GRADIENT):
        return images
    numbers = (TIMESTEPS, NATURALNESS_WEIGHT, SEMANTIC_WEIGHT, NATURALNESS, SEMANTIC)
    return images[:1] if name in numbers else None


def read_channels(bundle: Bundle) -> int:
    """Return the channels of the bundle's images. Raises BundleError if its UNet has none."""
    config = expect(bundle.read_json(UNET_CONFIG), dict, UNET_CONFIG)
    return expect_positive(config.get("in_channels"), f"{UNET_CONFIG}: in_channels")


def read_schedule(bundle: Bundle) -> NoiseSchedule:
    """Return the bundle's schedule. Raises BundleError if it is malformed, or does not match the manifest."""
    schedule = NoiseSchedule.from_json(bundle.read_json(SCHEDULE))
    for name, found in (("timesteps", len(schedule)), ("prediction_type", schedule.prediction_type)):
        if bundle.unet.get(name, found) != found:
            raise BundleError(
                f"{bundle.path}: {name} is {found!r} in {SCHEDULE}, but {bundle.unet[name]!r} in the manifest"
            )
    return schedule


def check_graphs(bundle: Bundle) -> None:
    """Raise BundleError if the tensors of a bundle's graphs are not those agreed on, by name, order and shape."""
    images = (bundle.batch_size, read_channels(bundle), *bundle.resolution)
    for name, (takes, returns) in _AGREED.items():
        if name not in bundle.graphs:
            continue
        graph = bundle.graphs[name]
        inputs, outputs = _names(graph.inputs), _names(graph.outputs)
        if name == NOISE_HEAD:
            encoded = _names(bundle.graphs[ENCODER].outputs) if ENCODER in bundle.graphs else []
            # Without images, which only other predictions than that of the noise need.
            takes = encoded if inputs == encoded else [*encoded, *takes]
        if inputs != takes or returns != outputs[: len(returns)]:
            raise BundleError(
                f"{bundle.path}: the {name} graph should take {', '.join(takes)} and return {', '.join(returns)}, "
                f"but in this bundle it takes {', '.join(inputs)} and returns {', '.join(outputs)}"
            )
        for spec in (*graph.inputs, *graph.outputs):
            shape = agreed_shape(spec.name, images) or (bundle.batch_size, *spec.shape[1:])
            if spec.shape != shape:
                raise BundleError(
                    f"{bundle.path}: {spec.name} of the {name} graph has shape {list(spec.shape)}; "
                    f"expected {list(shape)} for images {list(images)}"
                )


def _names(specs: Iterable[TensorSpec]) -> list[str]:
    return [spec.name for spec in specs]
