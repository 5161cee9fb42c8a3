"""A UNet's configuration as JSON: diffusers' own, and what that cannot say.

diffusers makes the heads of every attention from one `attention_head_dim`, and as many channels of the timestep's
sinusoid as the first level has. guided-diffusion's networks may have other numbers, which are set on the finished UNet;
`save_pretrained` forgets them, and the UNet that comes back computes something else. Here they are written down, beside
diffusers' settings, under the key `diffloss`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from diffloss_engine.errors import BackendUnavailableError, first_line

if TYPE_CHECKING:
    from diffusers import UNet2DModel

_OWN = "diffloss"
_HEADS, _SINUSOID = "attention_heads", "timestep_channels"
_MOST_LEVELS, _MOST = 16, {"layers_per_block": 64, "block_out_channels": 65_536}


def describe_unet(unet: UNet2DModel) -> dict[str, Any]:
    """Return a JSON object from which `build_unet` makes the same architecture."""
    # Where the model was loaded from is nobody's business, and would make equal bundles differ. For what is listed as a
    # default, diffusers ignores the value and takes its own default, which may be another one in a later version.
    left_out = ("_name_or_path", "_use_default_values")
    config: dict[str, Any] = {key: value for key, value in unet.config.items() if key not in left_out}
    config["_class_name"] = "UNet2DModel"
    usual = build_unet({key: value for key, value in config.items() if key != _OWN})
    own: dict[str, Any] = {}
    heads = {name: attention.heads for name, attention in _attentions(unet).items()}
    heads = {name: count for name, count in heads.items() if count != _attentions(usual)[name].heads}
    if heads:
        own[_HEADS] = heads
    channels = unet.time_embedding.linear_1.in_features
    if channels != usual.time_embedding.linear_1.in_features:
        own[_SINUSOID] = channels
    return {**config, **({_OWN: own} if own else {})}


def build_unet(config: dict[str, Any]) -> UNet2DModel:
    """Make the UNet of a configuration, on the meta device: no weights are drawn.

    Raises whatever diffusers does for settings that it cannot use, ValueError for those under `diffloss`, and
    BackendUnavailableError if diffusers cannot be imported.
    """
    try:
        from diffusers import UNet2DModel
    except (ImportError, RuntimeError) as error:
        raise BackendUnavailableError(f"diffusers cannot be imported: {first_line(error)}") from error

    own = config.get(_OWN, {})
    if not isinstance(own, dict) or set(own) - {_HEADS, _SINUSOID} or not isinstance(own.get(_HEADS, {}), dict):
        raise ValueError(f"{_OWN!r} must be an object with {_HEADS!r} (an object), {_SINUSOID!r} or both, not {own!r}")
    for name, most in _MOST.items():
        # A slip here would be built for hours.
        numbers = config.get(name, 1)
        numbers = numbers if isinstance(numbers, list | tuple) else [numbers]
        if len(numbers) > _MOST_LEVELS or any(type(number) is not int or number > most for number in numbers):
            raise ValueError(f"{name} is {config[name]!r}, expected at most {_MOST_LEVELS} numbers up to {most}")
    with torch.device("meta"):
        unet: UNet2DModel = UNet2DModel.from_config({key: value for key, value in config.items() if key != _OWN})
        if _SINUSOID in own:
            _set_timestep_channels(unet, own[_SINUSOID])
    for name, heads in own.get(_HEADS, {}).items():
        _set_heads(unet, name, heads)
    return unet


def _attentions(unet: UNet2DModel) -> dict[str, Any]:
    from diffusers.models.attention_processor import Attention

    return {name: module for name, module in unet.named_modules() if isinstance(module, Attention)}


def _set_heads(unet: UNet2DModel, name: str, heads: Any) -> None:
    attention = _attentions(unet).get(name)
    if attention is None:
        raise ValueError(f"{_HEADS}: the UNet has no attention {name!r}")
    if type(heads) is not int or heads < 1 or attention.inner_dim % heads:
        raise ValueError(f"{_HEADS}: {heads!r} of {name!r} does not divide its {attention.inner_dim} channels")
    attention.heads = attention.sliceable_head_dim = heads
    attention.scale = (attention.inner_dim // heads) ** -0.5


def _set_timestep_channels(unet: UNet2DModel, channels: Any) -> None:
    from diffusers.models.embeddings import TimestepEmbedding, Timesteps

    if type(channels) is not int or channels < 2 or unet.config.time_embedding_type != "positional":
        raise ValueError(f"{_SINUSOID}: {channels!r} is not a number of channels of a positional time embedding")
    unet.time_proj = Timesteps(channels, unet.config.flip_sin_to_cos, unet.config.freq_shift)
    unet.time_embedding = TimestepEmbedding(channels, unet.time_embedding.linear_2.out_features)
