"""Group norm and silu in difference form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffloss_trt.objective import wide
from diffloss_trt.tape import LARGE, Pair, Tape


@dataclass(frozen=True)
class Groups:
    """The groups of channels that group norm takes statistics of, in images [B, C, H, W].

    Means over a group are means over its channels' means: memory in which the channels come last cannot be viewed by
    groups.
    """

    batch: int
    channels: int
    count: int

    def mean(self, images: Tensor) -> Tensor:
        """Return the mean of each group, [B, count, 1]."""
        return images.mean((2, 3)).reshape(self.batch, self.count, -1).mean(2, keepdim=True)

    def to_channels(self, of_groups: Tensor) -> Tensor:
        """Return [B, count, 1] as [B, C, 1, 1]: each group's number for all of its channels."""
        spread = of_groups.expand(-1, -1, self.channels // self.count)
        return spread.reshape(-1, self.channels, 1, 1)

    def any_of_each(self, pixels: Tensor, sides: Sequence[int]) -> Tensor:
        """Return one value of each group, [B, count, 1], of images [B, C, H * W, 1] that have these `sides`.

        From the middle of the image: near its edge a convolution's padding shows.
        """
        rows, columns = sides if len(sides) == 2 else (math.prod(sides), 1)
        middle = rows // 2 * columns + columns // 2
        chosen = pixels[:, :: self.channels // self.count, middle : middle + 1]
        return chosen.reshape(self.batch, self.count, 1)


def group_norm(
    tape: Tape,
    x: Pair,
    groups: int,
    gain: Tensor,
    offset: Tensor,
    eps: float,
    time_scale: Tensor | None = None,
    time_shift: Tensor | None = None,
    *,
    activate: bool,
) -> Pair:
    """`F.group_norm`, times `time_scale` plus `time_shift` ([B, C, 1, 1]), and silu if `activate`, in one.

    Of group norm, with c = v - mean v, q = d - mean d, a and b the two branches' variances plus eps, and
    delta = mean((2c + s q) q), so that b = a + s delta: difference = q / sqrt(b) + c k,
    k = (1/sqrt(b) - 1/sqrt(a)) / s = -delta / (sqrt(a) sqrt(b) (sqrt(a) + sqrt(b))).
    Of silu: d sigmoid(u) + v (sigmoid(u) - sigmoid(v)) / s, the last factor being
    1/2 tanh(s d / 2) (1 - tanh(u / 2) tanh(v / 2)) / s.

    Of a large image in half precision each of four passes (statistics, result, and both once more on the way
    back) reads its input anew and computes again what another has computed. A compiler that merges equal operations
    would keep them in memory instead, in float32, as TensorRT-RTX does; it does not see through the shapes, of which
    each pass has its own. There the statistics take one pass, as means of squares less squares of means: what that
    loses in float32 is less than what the input lost when it was rounded. What the way back reads is the restored
    branch alone, less its mean and rounded: it takes half of the memory of the two halves, which are not kept.
    """
    shape = x.value.shape
    batch, channels = shape[:2]
    per = Groups(batch, channels, groups)
    plain = (shape[2], shape[3]) if len(shape) == 4 else (math.prod(shape[2:]), 1)
    pixels = math.prod(plain)
    # An odd number of pixels has no shape that the last of the passes could take for its own.
    again = tape.dtype.itemsize < 4 and pixels >= LARGE and pixels % 2 == 0
    # For the statistics, for the result, and for both once more on the way back.
    views = [(pixels, 1), plain, (1, pixels), (2, pixels // 2)] if again else [plain] * 4

    def viewed(y: Tensor, sides: Sequence[int]) -> Tensor:
        return y if y.shape[2:] == sides else y.reshape(batch, channels, *sides)

    def halves(sides: Sequence[int]) -> list[Tensor]:
        return [wide(viewed(half, sides)) for half in (x.value, x.difference)]

    v, d = halves(views[0])
    if again:
        of_v, of_d = per.any_of_each(v, plain), per.any_of_each(d, plain)
        v, d = v - per.to_channels(of_v), d - per.to_channels(of_d)
        rest_v, rest_d = per.mean(v), per.mean(d)
        variance, variance_d = (
            (per.mean(y * y) - rest.square()).clamp(min=0) for y, rest in ((v, rest_v), (d, rest_d))
        )
        delta = 2 * (per.mean(v * d) - rest_v * rest_d) + tape.scaled(variance_d)
        variance_u = (variance + tape.scaled(delta)).clamp(min=0)
        of_v, of_d = of_v + rest_v, of_d + rest_d
        v, d = halves(views[1])
    else:
        of_v, of_d = per.mean(v), per.mean(d)
    mean_v, mean_d = per.to_channels(of_v), per.to_channels(of_d)
    c, q = v - mean_v, d - mean_d
    c_u = c + tape.scaled(q)
    if not again:
        variance, variance_u, delta = per.mean(c * c), per.mean(c_u * c_u), per.mean((c + c_u) * q)
    r_v, r_u = (variance + eps).rsqrt(), (variance_u + eps).rsqrt()
    k = -delta * (r_v * r_u).square() / (r_v + r_u)
    gain, offset = wide(gain).view(1, -1), wide(offset).view(1, -1)
    if time_scale is not None and time_shift is not None:
        time_scale, time_shift = time_scale.flatten(1), time_shift.flatten(1)
        gain, offset = gain * time_scale, offset * time_scale + time_shift
    if activate:  # silu reads halves
        gain, offset = gain * 0.5, offset * 0.5
    gain, offset = gain.reshape(-1, groups, channels // groups), offset.reshape(-1, channels, 1, 1)
    gain_v, gain_u, gain_k = ((factor * gain).reshape(-1, channels, 1, 1) for factor in (r_v, r_u, k))
    y_v = c * gain_v + offset
    y_d = q * gain_u + c * gain_k
    kept = tape.narrow(c_u) if again else c_u
    slope = None
    if activate:
        # At what is kept: else ONNX Runtime would not make that before the way back, and keep the halves until then.
        y_u = wide(kept) * gain_u + offset if again else None
        y_v, y_d, slope = _silu_of_halves(tape, y_v, y_d, y_u)

    def back(g: Tensor) -> Sequence[Tensor]:
        def of_norm(sides: Sequence[int]) -> tuple[Tensor, Tensor]:
            """Return `c_u`, and the gradient of the normed image times its gain."""
            centred, by = wide(viewed(kept, sides)), slope
            if again and activate:
                y = centred * gain_u + offset
                by = _silu_slope(y, 1 + torch.tanh(y))
            of_result = wide(viewed(g, sides))
            return centred, (of_result if by is None else of_result * by) * gain_u

        centred, gradient = of_norm(views[2])
        along = per.to_channels(per.mean(gradient * centred) * r_u.square())
        mean = per.to_channels(per.mean(gradient))
        if again:
            centred, gradient = of_norm(views[3])
        return [tape.keep(viewed(gradient - mean - centred * along, shape[2:]))]

    y_v, y_d = (tape.keep(viewed(half, shape[2:])) for half in (y_v, y_d))
    return tape.record(y_v, y_d, [x], back)


def silu(tape: Tape, x: Pair) -> Pair:
    """`F.silu`; for the form see `group_norm`."""
    v, d = wide(x.value) * 0.5, wide(x.difference) * 0.5
    v, d, slope = _silu_of_halves(tape, v, d)
    return tape.record(v, d, [x], lambda g: [wide(g) * (0.5 * slope)])


def _silu_of_halves(tape: Tape, v: Tensor, d: Tensor, u: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return value and difference of silu(2v), and its derivative with respect to v on the restored branch.

    u: v on the restored branch, where that is known otherwise than from `d`.
    """
    scaled = tape.scaled(d)
    if u is None:
        u = v + scaled
    t_v, t_u, t_d = torch.tanh(v), torch.tanh(u), torch.tanh(scaled)
    twice_sigmoid, folded = 1 + t_u, v * t_v
    # For v (1 + t_v) and v (1 - t_u t_v), with one operation less.
    difference = d * twice_sigmoid + (v - t_u * folded) * tape.unscaled(t_d)
    return v + folded, difference, _silu_slope(u, twice_sigmoid)


def _silu_slope(half: Tensor, twice_sigmoid: Tensor) -> Tensor:
    return twice_sigmoid + half * (twice_sigmoid * (2 - twice_sigmoid))
