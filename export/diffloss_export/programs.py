"""The functions of tensors that become a bundle's graphs, with inputs to trace and to replay them on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from diffloss_engine.errors import DiffLossError, ModelError
from diffloss_trt.capture import Captured
from diffloss_trt.contract import BOTTLENECK, ENCODER, NOISE, NOISE_HEAD, NOISY, TIME_EMBEDDING, TIMESTEPS, skip_name
from diffloss_trt.norms import Groups
from diffloss_trt.objective import wide
from diffloss_trt.traced import Tensors, TracedProgram
from diffloss_trt.unet import Encoded, TappedUNet

aten = torch.ops.aten


@dataclass(frozen=True)
class Program:
    """A module of tensors to a tuple of tensors; both are named as in the graph. `inputs` are an example."""

    name: str
    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]


class _Forward(nn.Module):
    """A function of a UNet's tensors as a module, which is what exporters take; the UNet is its submodule `tapped`."""

    def __init__(self, tapped: TappedUNet, function: Callable[..., tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.tapped = tapped
        self._function = function

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return self._function(*tensors)


def trace(program: Program) -> TracedProgram:
    """Trace a program of the UNet's. Raises `ModelError` if its operations depend on the values of tensors."""
    captured = Captured(program.name, program.module, tuple(program.inputs.values()))
    state = {key.removeprefix("tapped.unet."): weight for key, weight in program.module.named_parameters()}

    def execute(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _WRITTEN_OUT.get(target, target)(*args, **kwargs)

    def run(inputs: Tensors, weights: Tensors, constants: Tensors) -> tuple[Tensor, ...]:
        return captured.run(tuple(inputs.values()), weights, constants, execute)

    with torch.no_grad():
        return TracedProgram.trace(
            program.name,
            run,
            program.inputs,
            {key: state[key] for key in captured.weights},
            captured.constants,
            program.outputs,
        )


def _attention(
    query: Tensor, key: Tensor, value: Tensor, *masks: Any, scale: float | None = None, **more: Any
) -> Tensor:
    """`F.scaled_dot_product_attention`: products in the precision of the tensors, softmax in float32 at least.

    PyTorch's own decomposition widens the products too.
    """
    if any(masks) or any(more.values()):
        raise ModelError("attention with a mask, dropout or grouped queries cannot be exported")
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    return wide((query * factor) @ key.mT).softmax(-1).to(value.dtype) @ value


def _group_norm(x: Tensor, groups: int, gain: Tensor, offset: Tensor, eps: float, *_: Any) -> Tensor:
    """`F.group_norm` in float32 at least, with statistics in one pass as in `norms.group_norm`.

    ONNX's own norms are not for everything: ONNX Runtime's CUDA provider leaves opset 22's instance norm to the CPU.
    """
    batch, channels, *sides = x.shape
    per = Groups(batch, channels, groups)

    def to_channels(of_groups: Tensor) -> Tensor:
        return per.to_channels(of_groups).reshape(batch, channels, *[1] * len(sides))

    # Of another shape than the result, so that a compiler reads `x` twice and keeps nothing in float32 in between.
    rows = wide(x).reshape(batch, channels, -1, 1)
    shift = per.any_of_each(rows, sides)
    rows = rows - per.to_channels(shift)
    mean = per.mean(rows)
    variance = (per.mean(rows * rows) - mean.square()).clamp(min=0)
    gain, offset = (wide(part).reshape(-1, *[1] * len(sides)) for part in (gain, offset))
    scale = to_channels((variance + eps).rsqrt()) * gain
    return ((wide(x) - to_channels(shift + mean)) * scale + offset).to(x.dtype)


# What of an operation becomes a graph, where that is not what PyTorch makes of it.
_WRITTEN_OUT: dict[Any, Callable[..., Tensor]] = {
    aten.group_norm.default: _group_norm,
    aten.scaled_dot_product_attention.default: _attention,
}


def encoder_outputs(encoded: Encoded) -> dict[str, Tensor]:
    """Name what leaves the encoder."""
    skips = {skip_name(index): skip for index, skip in enumerate(encoded.skips)}
    return {BOTTLENECK: encoded.bottleneck, TIME_EMBEDDING: encoded.time_embedding, **skips}


def feature_programs(tapped: TappedUNet, noisy: Tensor, timesteps: Tensor) -> tuple[Program, Program]:
    """Return the encoder and the noise head, with what they are fed when the UNet sees `noisy` at `timesteps`.

    noisy: [B, C, H, W]; timesteps: float [B]. Both are float32 in a bundle's graphs.
    """
    with torch.no_grad():
        between = encoder_outputs(tapped.encode(noisy, timesteps))
    return _programs(tapped, {NOISY: noisy, TIMESTEPS: timesteps}, between)


def blank_feature_programs(tapped: TappedUNet, batch_size: int, resolution: tuple[int, int]) -> tuple[Program, Program]:
    """Return the encoder and the noise head for images of one size, fed with zeros; nothing is computed."""
    noisy, timesteps = torch.zeros(batch_size, tapped.channels, *resolution), torch.zeros(batch_size)
    # Fills the schedule's cache of tables with tensors; fake tensors' mode or an exporter would put their own there.
    tapped.schedule.tables(noisy.device, torch.promote_types(tapped.dtype, torch.float32))
    try:
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            looks = encoder_outputs(tapped.encode(noisy, timesteps))
    except DiffLossError:
        raise
    # diffusers looks at most of a configuration only when it computes.
    except Exception as error:
        raise ModelError(f"the UNet cannot be run: {error or type(error).__name__}") from error
    between = {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in looks.items()}
    return _programs(tapped, {NOISY: noisy, TIMESTEPS: timesteps}, between)


def _programs(tapped: TappedUNet, images: Tensors, between: Tensors) -> tuple[Program, Program]:
    count = len(between)
    predicts_noise = tapped.schedule.prediction_type == "epsilon"

    def encoder(noisy: Tensor, timesteps: Tensor) -> tuple[Tensor, ...]:
        return tuple(encoder_outputs(tapped.encode(noisy, timesteps)).values())

    def noise_head(*tensors: Tensor) -> tuple[Tensor, ...]:
        bottleneck, time_embedding, *skips = tensors[:count]
        prediction = tapped.decode(Encoded(bottleneck, time_embedding, tuple(skips)))
        return (prediction if predicts_noise else tapped.schedule.noise_from(prediction, *tensors[count:]),)

    return (
        Program(ENCODER, _Forward(tapped, encoder), images, tuple(between)),
        Program(
            NOISE_HEAD, _Forward(tapped, noise_head), between if predicts_noise else {**between, **images}, (NOISE,)
        ),
    )
