"""The UNet cut at its taps: the bottleneck after the middle block, and the predicted noise at the end."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffloss_engine.bundle import Bundle
from diffloss_engine.errors import BackendUnavailableError, BundleError, ModelError
from diffloss_engine.exclusive import exclusive
from diffloss_engine.tensor_files import load_tensors
from diffloss_trt.contract import UNET_CONFIG, UNET_WEIGHTS
from diffloss_trt.schedule import NoiseSchedule
from diffloss_trt.unet_config import build_unet

# The others of diffusers are for other models, or are not known to work in a UNet2DModel.
BLOCKS = (
    "DownBlock2D",
    "UpBlock2D",
    "AttnDownBlock2D",
    "AttnUpBlock2D",
    "ResnetDownsampleBlock2D",
    "ResnetUpsampleBlock2D",
    "SkipDownBlock2D",
    "SkipUpBlock2D",
    "AttnSkipDownBlock2D",
    "AttnSkipUpBlock2D",
)


class Encoded(NamedTuple):
    """What leaves the encoder: everything that the noise head reads."""

    bottleneck: Tensor
    time_embedding: Tensor
    skips: tuple[Tensor, ...]


class Features(NamedTuple):
    """What DiffLoss compares: bottleneck [B, c, h, w]; predicted noise [B, C, H, W], None if not asked for."""

    bottleneck: Tensor
    noise: Tensor | None


class TappedUNet(nn.Module):
    """A frozen `diffusers.UNet2DModel`, run in two halves that meet after the middle block.

    The UNet is put into eval mode and its parameters are frozen, in place. Images in are [B, C, H, W]
    in float32 or float64, timesteps [B]; the UNet computes in its own dtype. Raises `ModelError` for an architecture
    that has no unconditional noise prediction.
    """

    def __init__(self, unet: Any, schedule: NoiseSchedule) -> None:
        super().__init__()
        check_unet(unet)
        told = schedule.unet_timesteps
        last = len(schedule) - 1 if told is None else int(told.max())
        if unet.config.time_embedding_type == "learned" and unet.time_proj.num_embeddings <= last:
            raise ModelError(
                f"{type(unet).__name__} has learned {unet.time_proj.num_embeddings} timesteps, "
                f"but its schedule goes up to {last}"
            )
        self.unet = unet.eval().requires_grad_(False)
        self.schedule = schedule

    @property
    def channels(self) -> int:
        """Channels of the images that the UNet takes."""
        return int(self.unet.config.in_channels)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the UNet's convolutions compute in."""
        return self.unet.conv_in.weight.dtype  # type: ignore[no-any-return]

    @property
    def device(self) -> torch.device:
        """Where the UNet is, and images are expected."""
        return self.unet.conv_in.weight.device  # type: ignore[no-any-return]

    @property
    def resolution_multiple(self) -> int:
        """Height and width of an image must be multiples of this."""
        return int(2 ** sum(getattr(block, "downsamplers", None) is not None for block in self.unet.down_blocks))

    def encode(self, noisy: Tensor, timesteps: Tensor) -> Encoded:
        """Run the UNet as far as its middle block."""
        unet = self.unet
        if unet.training:  # it is the user's too, and part of a module whose `train()` was called
            unet.eval()
        hidden = noisy.to(self.dtype)
        if unet.config.center_input_sample:
            hidden = 2 * hidden - 1
        timesteps = self.schedule.told(timesteps, torch.promote_types(self.dtype, torch.float32))
        # The sinusoid is float32 whatever the UNet's dtype: in half precision timesteps above 2048 would merge.
        sinusoid = unet.time_proj(timesteps if unet.config.time_embedding_type == "positional" else timesteps.long())
        embedding = unet.time_embedding(sinusoid.to(self.dtype))
        image = hidden
        hidden = unet.conv_in(hidden)
        skips: tuple[Tensor, ...] = (hidden,)
        for block in unet.down_blocks:
            if hasattr(block, "skip_conv"):
                hidden, added, image = block(hidden_states=hidden, temb=embedding, skip_sample=image)
            else:
                hidden, added = block(hidden_states=hidden, temb=embedding)
            skips += added
        if unet.mid_block is not None:
            hidden = unet.mid_block(hidden, embedding)
        return Encoded(hidden, embedding, skips)

    def decode(self, encoded: Encoded) -> Tensor:
        """Run the UNet from its middle block on; return its prediction [B, C, H, W] in float32 at least."""
        unet = self.unet
        hidden, skips = encoded.bottleneck, encoded.skips
        image = None
        for block in unet.up_blocks:
            taken, skips = skips[-len(block.resnets) :], skips[: -len(block.resnets)]
            if hasattr(block, "skip_conv"):
                hidden, image = block(hidden, taken, encoded.time_embedding, image)
            else:
                hidden = block(hidden, taken, encoded.time_embedding)
        hidden = unet.conv_out(unet.conv_act(unet.conv_norm_out(hidden)))
        if image is not None:
            hidden = hidden + image
        # A UNet that also predicts a variance puts it behind the noise.
        prediction: Tensor = hidden[:, : self.channels]
        return prediction.to(torch.promote_types(self.dtype, torch.float32))

    def features(self, noisy: Tensor, timesteps: Tensor, *, with_noise: bool) -> Features:
        """Return the features of `noisy` [B, C, H, W]; without the noise only the encoder is run.

        Autocast does not reach inside: the features have the precision of the UNet's weights.
        """
        with torch.autocast(noisy.device.type, enabled=False):
            encoded = self.encode(noisy, timesteps)
            if not with_noise:
                return Features(encoded.bottleneck, None)
            return Features(encoded.bottleneck, self.schedule.noise_from(self.decode(encoded), noisy, timesteps))


def check_unet(unet: Any) -> None:
    """Raise `ModelError` unless `unet` is an unconditional `UNet2DModel` with finite weights."""
    name = type(unet).__name__
    config = getattr(unet, "config", None)
    missing = [
        part for part in ("conv_in", "time_proj", "down_blocks", "up_blocks", "conv_out") if not hasattr(unet, part)
    ]
    if config is None or missing or "in_channels" not in config:
        raise ModelError(f"{name} is not a diffusers.UNet2DModel" + (f": it has no {missing[0]}" if missing else ""))
    if "cross_attention_dim" in config:
        raise ModelError(f"{name} is conditional (cross_attention_dim): only unconditional UNets can be used")
    if getattr(unet, "class_embedding", None) is not None:
        raise ModelError(
            f"{name} is class-conditional (class_embedding): only unconditional UNets can be used; "
            "'diffloss-export onnx --class-label' turns it into one, for a single class"
        )
    for block in (*unet.down_blocks, *unet.up_blocks):
        if type(block).__name__ not in BLOCKS:
            raise ModelError(f"{name} has a {type(block).__name__}; expected blocks of {', '.join(BLOCKS)}")
    if config.get("time_embedding_type") == "fourier":
        raise ModelError(f"{name} has time_embedding_type 'fourier': only UNets that take timesteps can be used")
    channels, produced = config["in_channels"], config["out_channels"]
    if produced not in (channels, 2 * channels):
        raise ModelError(
            f"{name} takes {channels} channels and returns {produced} (out_channels); "
            f"expected {channels} (the prediction) or {2 * channels} (the prediction and a variance)"
        )
    for key, weight in unet.state_dict().items():
        if weight.is_meta:
            raise ModelError(f"{name}: weight {key} is on the meta device, where it has no values; load them first")
        if not bool(torch.isfinite(weight).all()):
            raise ModelError(f"{name}: weight {key} holds NaN or infinite values")


def reload_unet(bundle: Bundle, dtype: torch.dtype, device: torch.device) -> Any:
    """Make the `diffusers.UNet2DModel` of a bundle.

    Raises BundleError if its weights do not fit its configuration, BackendUnavailableError without a working diffusers.
    """
    config = bundle.read_json(UNET_CONFIG)
    weights = load_tensors(bundle.file(UNET_WEIGHTS))
    try:
        with exclusive:
            unet = build_unet(config)
        unet.load_state_dict(
            {key: weight.to(device, dtype) for key, weight in weights.items()}, strict=True, assign=True
        )
    except (BackendUnavailableError, torch.OutOfMemoryError):
        raise
    # A constructor fed with wrong values raises anything.
    except Exception as error:
        lines = str(error).strip().splitlines()
        raise BundleError(
            f"{bundle.path}: the UNet's weights do not fit its configuration: {' '.join(lines[:2])}"
        ) from error
    return unet
