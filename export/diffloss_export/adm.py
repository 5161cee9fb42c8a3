"""guided-diffusion (ADM) checkpoints -> `diffusers.UNet2DModel`.

Dhariwal & Nichol, "Diffusion Models Beat GANs on Image Synthesis", 2021 (arXiv 2105.05233). Such a checkpoint is a bare
state dict; its architecture is in the flags of the script that trained it. A wrong flag may well leave every name as it
is, so each tensor's name and shape is compared with what the flags say before any is taken.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from diffloss_engine.errors import InputError, ModelError
from diffloss_export.adm_flags import CHANNEL_MULT, AdmFlags
from diffloss_export.model_files import to_float32
from diffloss_trt.unet_config import build_unet

if TYPE_CHECKING:
    from diffusers import UNet2DModel

_SWITCHES = ("resblock_updown", "use_scale_shift_norm", "learn_sigma", "class_cond")
_SHOWN = 3


class Slot(NamedTuple):
    """Where a checkpoint's tensor goes: its name there, its shape (-1: any), and its name in diffusers.

    qkv: the number of heads of an attention whose three projections lie in one tensor; `name` then is the attention's.
    """

    stored: str
    shape: tuple[int, ...]
    name: str
    qkv: int = 0


def convert_adm(state: dict[str, Tensor], flags: AdmFlags, path: Path) -> UNet2DModel:
    """Return the UNet of a checkpoint's state dict, in float32, which is emptied on the way.

    A class-conditional UNet comes back as one. Raises ModelError, naming `path`, the first tensors that do not fit the
    flags, and the flag that is probably wrong; or for a tensor that is not finite.
    """
    _check_fit(state, flags, path)
    weights: dict[str, Tensor] = {}
    for slot in slots(flags):
        tensor = to_float32(state.pop(slot.stored), f"{path}: tensor {slot.stored!r}")
        if slot.qkv:
            weights |= _projections(slot, tensor, flags.use_new_attention_order)
        else:  # convolutions of one axis and size 1 are linear layers
            weights[slot.name] = tensor.squeeze(-1) if len(slot.shape) == 3 else tensor
    classes = len(weights["class_embedding.weight"]) if flags.class_cond else None
    unet = build_unet(_config(flags, classes))
    unet.load_state_dict(weights, assign=True)
    return unet


def slots(flags: AdmFlags) -> Iterator[Slot]:
    """Yield a slot for every tensor of a checkpoint with these flags, in the order of the network."""
    embedding = 4 * flags.num_channels
    channels, levels = flags.channels, range(len(flags.channels))
    yield from _layer("time_embed.0", (embedding, flags.num_channels), "time_embedding.linear_1")
    yield from _layer("time_embed.2", (embedding, embedding), "time_embedding.linear_2")
    if flags.class_cond:
        yield Slot("label_emb.weight", (-1, embedding), "class_embedding.weight")

    def block(stored: str, name: str, inner: int, outer: int) -> Iterator[Slot]:
        yield from _layer(f"{stored}.in_layers.0", (inner,), f"{name}.norm1")
        yield from _layer(f"{stored}.in_layers.2", (outer, inner, 3, 3), f"{name}.conv1")
        scales = 2 if flags.use_scale_shift_norm else 1
        yield from _layer(f"{stored}.emb_layers.1", (scales * outer, embedding), f"{name}.time_emb_proj")
        yield from _layer(f"{stored}.out_layers.0", (outer,), f"{name}.norm2")
        yield from _layer(f"{stored}.out_layers.3", (outer, outer, 3, 3), f"{name}.conv2")
        if inner != outer:
            yield from _layer(f"{stored}.skip_connection", (outer, inner, 1, 1), f"{name}.conv_shortcut")

    def attention(stored: str, name: str, width: int, *, upsampling: bool = False) -> Iterator[Slot]:
        yield from _layer(f"{stored}.norm", (width,), f"{name}.group_norm")
        heads = flags.heads(width, upsampling=upsampling)
        for kind, shape in (("weight", (3 * width, width, 1)), ("bias", (3 * width,))):
            yield Slot(f"{stored}.qkv.{kind}", shape, name, heads)
        yield from _layer(f"{stored}.proj_out", (width, width, 1), f"{name}.to_out.0")

    yield from _layer("input_blocks.0.0", (channels[0], 3, 3, 3), "conv_in")
    width, skips, place = channels[0], [channels[0]], 1
    for level in levels:
        for index in range(flags.num_res_blocks):
            yield from block(f"input_blocks.{place}.0", f"down_blocks.{level}.resnets.{index}", width, channels[level])
            width = channels[level]
            if level in flags.attention_levels:
                yield from attention(f"input_blocks.{place}.1", f"down_blocks.{level}.attentions.{index}", width)
            skips.append(width)
            place += 1
        if level != levels[-1]:
            name = f"down_blocks.{level}.downsamplers.0"
            if flags.resblock_updown:
                yield from block(f"input_blocks.{place}.0", name, width, width)
            else:
                yield from _layer(f"input_blocks.{place}.0.op", (width, width, 3, 3), f"{name}.conv")
            skips.append(width)
            place += 1
    yield from block("middle_block.0", "mid_block.resnets.0", width, width)
    yield from attention("middle_block.1", "mid_block.attentions.0", width)
    yield from block("middle_block.2", "mid_block.resnets.1", width, width)
    place = 0
    for level in reversed(levels):
        name = f"up_blocks.{levels[-1] - level}"
        for index in range(flags.num_res_blocks + 1):
            yield from block(
                f"output_blocks.{place}.0", f"{name}.resnets.{index}", width + skips.pop(), channels[level]
            )
            width, part = channels[level], 1
            if level in flags.attention_levels:
                yield from attention(f"output_blocks.{place}.1", f"{name}.attentions.{index}", width, upsampling=True)
                part = 2
            if level and index == flags.num_res_blocks:
                stored = f"output_blocks.{place}.{part}"
                if flags.resblock_updown:
                    yield from block(stored, f"{name}.upsamplers.0", width, width)
                else:
                    yield from _layer(f"{stored}.conv", (width, width, 3, 3), f"{name}.upsamplers.0.conv")
            place += 1
    yield from _layer("out.0", (width,), "conv_norm_out")
    yield from _layer("out.2", (6 if flags.learn_sigma else 3, width, 3, 3), "conv_out")


def _layer(stored: str, shape: tuple[int, ...], name: str) -> Iterator[Slot]:
    yield Slot(f"{stored}.weight", shape, f"{name}.weight")
    yield Slot(f"{stored}.bias", shape[:1], f"{name}.bias")


def _config(flags: AdmFlags, classes: int | None) -> dict[str, Any]:
    """Return the UNet's configuration, as `build_unet` takes it."""
    channels, levels = flags.channels, range(len(flags.channels))
    plain_down, plain_up = (
        ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if flags.resblock_updown else ("DownBlock2D", "UpBlock2D")
    )
    attends = [level in flags.attention_levels for level in levels]
    heads = {slot.name: slot.qkv for slot in slots(flags) if slot.qkv and flags.num_head_channels == -1}
    own: dict[str, Any] = {"attention_heads": heads} if heads else {}
    if flags.num_channels != channels[0]:
        own["timestep_channels"] = flags.num_channels
    return {
        "_class_name": "UNet2DModel",
        "sample_size": flags.image_size,
        "in_channels": 3,
        "out_channels": 6 if flags.learn_sigma else 3,
        "freq_shift": 0,
        "flip_sin_to_cos": True,
        "time_embedding_dim": None if flags.num_channels == channels[0] else 4 * flags.num_channels,
        "down_block_types": ["AttnDownBlock2D" if attends[level] else plain_down for level in levels],
        "up_block_types": ["AttnUpBlock2D" if attends[level] else plain_up for level in reversed(levels)],
        "block_out_channels": list(channels),
        "layers_per_block": flags.num_res_blocks,
        "downsample_padding": 1,
        "downsample_type": "resnet" if flags.resblock_updown else "conv",
        "upsample_type": "resnet" if flags.resblock_updown else "conv",
        # Without it there is one head, and `attention_heads` says how many there are.
        "attention_head_dim": None if flags.num_head_channels == -1 else flags.num_head_channels,
        "norm_num_groups": 32,
        "attn_norm_num_groups": 32,
        "norm_eps": 1e-5,
        "resnet_time_scale_shift": "scale_shift" if flags.use_scale_shift_norm else "default",
        "num_class_embeds": classes,
        **({"diffloss": own} if own else {}),
    }


def _projections(slot: Slot, tensor: Tensor, new_order: bool) -> dict[str, Tensor]:
    """Take apart query, key and value, which diffusers stores in three tensors, the heads one behind the other."""
    *_, kind = slot.stored.split(".")
    matrix = tensor.squeeze(-1)
    if new_order:
        parts = matrix.unflatten(0, (3, -1))
    else:  # each head has its own query, key and value, one behind the other
        parts = matrix.unflatten(0, (slot.qkv, 3, -1)).transpose(0, 1).flatten(1, 2)
    return {f"{slot.name}.to_{name}.{kind}": part.contiguous() for name, part in zip("qkv", parts, strict=True)}


def _check_fit(state: Mapping[str, Tensor], flags: AdmFlags, path: Path) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    problems = _problems(shapes, flags)
    if not problems:
        return
    if "conv_in.weight" in shapes:
        raise ModelError(
            f"{path} holds the state dict of a diffusers UNet, expected a guided-diffusion checkpoint: write the UNet "
            "with save_pretrained, and give the folder"
        )
    first = shapes.get("input_blocks.0.0.weight", ())
    if len(first) == 4 and first[1] != 3:
        raise ModelError(
            f"{path}: the network takes {first[1]} channels, and the paper's kind of prior takes 3; guided-diffusion's "
            "upsamplers, which are told a small image as well, are not supported"
        )
    more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
    shown = "; ".join([*problems[:_SHOWN], *more, *_suspicion(shapes, flags)])
    raise ModelError(f"{path}: the checkpoint does not fit the flags: {shown}")


def _problems(shapes: Mapping[str, tuple[int, ...]], flags: AdmFlags) -> list[str]:
    """Say what does not fit, first what the flags ask for, in the order of the network."""
    wanted = {slot.stored: slot.shape for slot in slots(flags)}
    found = []
    for name, shape in wanted.items():
        if name not in shapes:
            found.append(f"no tensor {name!r}")
        elif len(shapes[name]) != len(shape) or any(
            size not in (-1, have) for size, have in zip(shape, shapes[name], strict=True)
        ):
            found.append(f"{name!r} has shape {shapes[name]}, expected {shape}")
    return found + [f"unexpected tensor {name!r}" for name in shapes if name not in wanted]


def _suspicion(shapes: Mapping[str, tuple[int, ...]], flags: AdmFlags) -> list[str]:
    """Name the flag with which, changed alone, most would fit, if there is one."""
    width = shapes.get("time_embed.0.weight", ())
    if len(width) == 2 and width[1] != flags.num_channels:
        # Every shape depends on this one: without it no other can be judged.
        return [f"the flag num_channels is wrong: it is {width[1]}"]
    best: list[str] = []
    least = len(_problems(shapes, flags)) // 2 + 1  # a flag with which most do not fit either is not the one
    for name, value in _alternatives(shapes, flags):
        try:
            left = len(_problems(shapes, dataclasses.replace(flags, **{name: value}).checked()))
        except InputError:
            continue
        if left < least:
            fits = "everything fits" if not left else f"{left} tensors do not fit"
            shown = ",".join(f"{part:g}" for part in value) if isinstance(value, tuple) else str(value).lower()
            best, least = [f"the flag {name} is probably wrong: with {shown} {fits}"], left
    return best


def _alternatives(shapes: Mapping[str, tuple[int, ...]], flags: AdmFlags) -> Iterator[tuple[str, Any]]:
    """Yield flags with values to try, the likeliest first."""
    for name in _SWITCHES:
        yield name, not getattr(flags, name)
    for count in range(1, 9):
        yield "num_res_blocks", count
    if read := _channel_mult(shapes, flags):
        yield "channel_mult", read
    levels = range(len(flags.channel_mult))
    for chosen in range(2 ** len(levels)):
        yield "attention_resolutions", tuple(flags.image_size >> level for level in levels if chosen >> level & 1)
    for size, multipliers in CHANNEL_MULT.items():
        yield "channel_mult", multipliers
        yield "image_size", size


def _channel_mult(shapes: Mapping[str, tuple[int, ...]], flags: AdmFlags) -> tuple[float, ...]:
    """Read the channels of the levels off the way down, given the number of blocks on each."""
    stride = flags.num_res_blocks + 1
    channels: list[int] = []
    while shape := shapes.get(f"input_blocks.{len(channels) * stride + 1}.0.in_layers.2.weight"):
        channels.append(shape[0])
    return tuple(width / flags.num_channels for width in channels)
