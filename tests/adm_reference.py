"""guided-diffusion's network as formulas on a state dict: what its checkpoints mean, without diffusers.

Written from the paper (Dhariwal & Nichol, 2021, arXiv 2105.05233, appendix) and from what the golden case fixes; it
shares nothing with `diffloss_export.adm`, which it is there to check.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class AdmNetwork:
    """A network of the given flags, which are all there, by their own names; `channel_mult` is a list of numbers.

    state: its tensors; with None they are drawn at random, none of them left at zero or one, as they are first asked
        for, and can be read afterwards.
    """

    def __init__(self, flags: dict[str, Any], state: dict[str, Tensor] | None = None, seed: int = 0) -> None:
        self.flags = flags
        self.state: dict[str, Tensor] = {} if state is None else state
        self._used: set[str] = set()
        self._generator = torch.Generator().manual_seed(seed) if state is None else None

    def __call__(self, noisy: Tensor, timesteps: Tensor, label: int | None = None) -> tuple[Tensor, Tensor]:
        """Return the output [B, 3 or 6, H, W] and the middle block's [B, c, h, w], in the dtype of `noisy`."""
        self._dtype = noisy.dtype
        flags = self.flags
        width = flags["num_channels"]
        embedding = self._linear(
            F.silu(self._linear(self._sinusoid(timesteps), "time_embed.0", 4 * width)), "time_embed.2", 4 * width
        )
        if flags["class_cond"]:
            embedding = embedding + self._weight("label_emb.weight", (7, 4 * width))[label]
        channels = [int(multiplier * width) for multiplier in flags["channel_mult"]]
        attends = [
            2**level in {flags["image_size"] // size for size in flags["attention_resolutions"]}
            for level in range(len(channels))
        ]
        upper_heads = flags["num_heads"] if flags["num_heads_upsample"] == -1 else flags["num_heads_upsample"]

        hidden = self._conv(noisy, "input_blocks.0.0", channels[0])
        skips, place = [hidden], 1
        for level, outer in enumerate(channels):
            for _ in range(flags["num_res_blocks"]):
                hidden = self._block(hidden, embedding, f"input_blocks.{place}.0", outer)
                if attends[level]:
                    hidden = self._attention(hidden, f"input_blocks.{place}.1", flags["num_heads"])
                skips.append(hidden)
                place += 1
            if level < len(channels) - 1:
                if flags["resblock_updown"]:
                    hidden = self._block(
                        hidden, embedding, f"input_blocks.{place}.0", outer, lambda x: F.avg_pool2d(x, 2)
                    )
                else:
                    hidden = self._conv(hidden, f"input_blocks.{place}.0.op", outer, stride=2)
                skips.append(hidden)
                place += 1
        hidden = self._block(hidden, embedding, "middle_block.0", channels[-1])
        hidden = self._attention(hidden, "middle_block.1", flags["num_heads"])
        middle = hidden = self._block(hidden, embedding, "middle_block.2", channels[-1])

        def enlarge(x: Tensor) -> Tensor:
            return F.interpolate(x, scale_factor=2.0, mode="nearest")

        place = 0
        for level in reversed(range(len(channels))):
            for index in range(flags["num_res_blocks"] + 1):
                hidden = self._block(
                    torch.cat([hidden, skips.pop()], 1), embedding, f"output_blocks.{place}.0", channels[level]
                )
                part = 1
                if attends[level]:
                    hidden = self._attention(hidden, f"output_blocks.{place}.1", upper_heads)
                    part = 2
                if level and index == flags["num_res_blocks"]:
                    name = f"output_blocks.{place}.{part}"
                    if flags["resblock_updown"]:
                        hidden = self._block(hidden, embedding, name, channels[level], enlarge)
                    else:
                        hidden = self._conv(enlarge(hidden), f"{name}.conv", channels[level])
                place += 1
        hidden = self._conv(F.silu(self._norm(hidden, "out.0")), "out.2", 6 if flags["learn_sigma"] else 3)
        assert self._used == self.state.keys(), self.state.keys() - self._used
        return hidden, middle

    def drawn(self) -> None:
        """Draw no more: from now on a tensor that is not there is an error."""
        self._generator = None

    def _sinusoid(self, timesteps: Tensor) -> Tensor:
        half = self.flags["num_channels"] // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
        angles = timesteps.float()[:, None] * frequencies
        return torch.cat([angles.cos(), angles.sin()], 1).to(self._dtype)

    def _block(
        self, x: Tensor, embedding: Tensor, name: str, outer: int, resize: Callable[[Tensor], Tensor] = lambda x: x
    ) -> Tensor:
        scales = self.flags["use_scale_shift_norm"]
        hidden = resize(F.silu(self._norm(x, f"{name}.in_layers.0")))
        hidden = self._conv(hidden, f"{name}.in_layers.2", outer)
        of_time = self._linear(F.silu(embedding), f"{name}.emb_layers.1", 2 * outer if scales else outer)[
            ..., None, None
        ]
        if scales:
            scale, shift = of_time.split(outer, 1)
            hidden = self._norm(hidden, f"{name}.out_layers.0") * (1 + scale) + shift
        else:
            hidden = self._norm(hidden + of_time, f"{name}.out_layers.0")
        hidden = self._conv(F.silu(hidden), f"{name}.out_layers.3", outer)
        x = resize(x)
        return hidden + (x if x.shape[1] == outer else self._conv(x, f"{name}.skip_connection", outer, size=1))

    def _attention(self, x: Tensor, name: str, heads: int) -> Tensor:
        batch, width = x.shape[:2]
        if self.flags["num_head_channels"] != -1:
            heads = width // self.flags["num_head_channels"]
        size = width // heads
        tokens = self._norm(x, f"{name}.norm").flatten(2)
        mixed = F.conv1d(tokens, *self._affine(f"{name}.qkv", (3 * width, width, 1)))
        if self.flags["use_new_attention_order"]:
            query, key, value = (part.reshape(batch * heads, size, -1) for part in mixed.chunk(3, 1))
        else:
            query, key, value = mixed.reshape(batch * heads, 3 * size, -1).split(size, 1)
        weights = torch.softmax(query.mT @ key / math.sqrt(size), -1)
        attended = (value @ weights.mT).reshape(batch, width, -1)
        return x + F.conv1d(attended, *self._affine(f"{name}.proj_out", (width, width, 1))).reshape(x.shape)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.group_norm(x, 32, *self._affine(name, (x.shape[1],)), eps=1e-5)

    def _conv(self, x: Tensor, name: str, outer: int, size: int = 3, stride: int = 1) -> Tensor:
        return F.conv2d(x, *self._affine(name, (outer, x.shape[1], size, size)), stride=stride, padding=size // 2)

    def _linear(self, x: Tensor, name: str, outer: int) -> Tensor:
        return F.linear(x, *self._affine(name, (outer, x.shape[1])))

    def _affine(self, name: str, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        return self._weight(f"{name}.weight", shape), self._weight(f"{name}.bias", shape[:1])

    def _weight(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if self._generator is not None and name not in self.state:
            drawn = torch.randn(shape, generator=self._generator)
            self.state[name] = drawn / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 0.3 * drawn + 0.5
        self._used.add(name)
        assert self.state[name].shape == shape, name
        return self.state[name].to(self._dtype)
