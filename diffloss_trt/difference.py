"""Difference form: a network on pairs (value on the target, scaled difference to the restored image).

The loss compares two nearly equal images, and in half precision their features cannot be subtracted: rounding eats the
difference. So every activation is carried as (v, d): `v` on the target's branch, `v + s d` on the restored one. In
float16 `s` is a power of two for each sample that keeps `d` at order one; other formats have exponents enough for any
difference, and there it is 1. No rule here subtracts near-equals:

- linear operations act on v and on d alike, without bias on d;
- a product: d = v_a d_b + d_a (v_b + s d_b);
- the others have a closed form of (f(v + s d) - f(v)) / s, computed in float32 at least.

Going back, each rule gives the ordinary input gradient of f at `v + s d`: the gradient of the restored branch alone.
Convolutions and matrix products have the network's own precision, but for the first convolution, of the noisy image;
that, sums, group norm, silu and softmax work in float32 at least, and return it, but for large images (`Tape.keep`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffloss_engine.errors import ModelError
from diffloss_engine.tensors import IMAGE_CHANNELS
from diffloss_trt.norms import group_norm, silu
from diffloss_trt.objective import wide
from diffloss_trt.tape import Pair, Tape

aten = torch.ops.aten


def linear_map(tape: Tape, pair: Pair, forward: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Pair:
    """Apply a linear operation without bias to both halves; `back` is its transpose."""
    return tape.record(forward(pair.value), forward(pair.difference), [pair], lambda g: [back(g)])


# Convolutions and matrix products


def conv2d(
    tape: Tape,
    x: Pair,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Pair:
    """`F.conv2d`, undilated."""
    if any(step != 1 for step in dilation):
        raise ModelError(f"a convolution has dilation {list(dilation)}; only dilation 1 has a difference form")
    height, width = x.value.shape[2:]
    stride, padding = _two(stride), _two(padding)

    def back(g: Tensor) -> Sequence[Tensor]:
        return [conv2d_input_gradient(tape.narrow(g), weight, (height, width), stride, padding, groups)]

    # At small timesteps the noise in a noisy image, which is what the UNet looks at, is as small as half precision's
    # rounding; and the convolution of so few channels is little work.
    narrow = wide if weight.shape[1] <= IMAGE_CHANNELS and groups == 1 else tape.narrow
    kernel, offset = narrow(weight), None if bias is None else narrow(bias)
    return tape.record(
        F.conv2d(narrow(x.value), kernel, offset, stride, padding, groups=groups),
        F.conv2d(narrow(x.difference), kernel, None, stride, padding, groups=groups),
        [x],
        back,
    )


def _two(values: Sequence[int]) -> tuple[int, int]:
    return values[0], values[-1]


def conv2d_input_gradient(
    gradient: Tensor,
    weight: Tensor,
    size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    groups: int,
    bias: Tensor | None = None,
) -> Tensor:
    """Return the gradient of a convolution with respect to its input of `size`, as a plain convolution, plus `bias`.

    With stride 1 that is a convolution with the kernel flipped and its channel axes swapped. With stride s, the
    input's rows and columns fall into s*s classes, each of which meets its own part of the kernel: one convolution at
    the output's size makes all of them, as s*s times as many channels, and they are interleaved.
    """
    out_channels, in_channels, *kernel = weight.shape
    weight = weight.reshape(groups, out_channels // groups, in_channels, *kernel).transpose(1, 2)
    if stride == (1, 1):
        weight = weight.flip(3, 4).reshape(groups * in_channels, out_channels // groups, *kernel)
        rows, columns = (k - 1 - p for k, p in zip(kernel, padding, strict=True))
        if min(rows, columns) < 0:  # padding beyond the kernel's reach: what was computed there has no input
            gradient = F.pad(gradient, [min(0, columns)] * 2 + [min(0, rows)] * 2)
        return F.conv2d(gradient, weight, bias, 1, (max(0, rows), max(0, columns)), 1, groups)
    s0, s1 = stride
    taps = [math.ceil(k / s) for k, s in zip(kernel, stride, strict=True)]
    for axis, (k, tap, s) in enumerate(zip(kernel, taps, stride, strict=True), start=3):
        # Not F.pad, which TensorRT would do at every step.
        weight = torch.cat([weight, *[0 * weight.narrow(axis, 0, 1)] * (tap * s - k)], axis)
    weight = weight.reshape(groups * in_channels, out_channels // groups, taps[0], s0, taps[1], s1).flip(2, 4)
    weight = weight.permute(0, 3, 5, 1, 2, 4).reshape(-1, out_channels // groups, *taps)
    if bias is not None:
        bias = torch.stack([bias] * (s0 * s1), 1).flatten()
    phases = F.conv2d(gradient, weight, bias, 1, [tap - 1 for tap in taps], 1, groups)
    batch, _, rows, columns = phases.shape
    # Axis by axis, which ONNX Runtime does on a CPU in a third of the time.
    image = phases.reshape(batch, groups * in_channels, s0, s1, rows, columns).permute(0, 1, 2, 4, 5, 3)
    image = image.reshape(batch, groups * in_channels, s0, rows, columns * s1).transpose(2, 3)
    image = image.reshape(batch, groups * in_channels, rows * s0, columns * s1)
    # Beyond the last position that the kernel visits the input has no influence: zeros are appended.
    lengths = [p + side for p, side in zip(padding, size, strict=True)]
    missing = [max(0, length - have) for length, have in zip(lengths, image.shape[2:], strict=True)]
    if any(missing):
        image = F.pad(image, (0, missing[1], 0, missing[0]))
    return image[:, :, padding[0] : lengths[0], padding[1] : lengths[1]]


def upsampled_conv2d(
    tape: Tape, x: Pair, factors: tuple[int, int], weight: Tensor, bias: Tensor | None, padding: tuple[int, int]
) -> Pair:
    """`F.conv2d` of `x` enlarged by nearest neighbour, with a result of the enlarged size.

    In an enlarged image several taps of the kernel meet the same pixel. Summed beforehand they make the kernel of a
    strided convolution from the result back to `x`, of which this is the input gradient. For twice the size and a 3x3
    kernel 4 of 9 products are left, forward and back.
    """
    rows, columns = factors
    size = x.value.shape[2] * rows, x.value.shape[3] * columns
    kernel = wide(weight).transpose(0, 1).flip(2, 3)
    for axis, factor in enumerate(factors, start=2):
        kernel = _summed_taps(kernel, axis, factor)
    kernel = tape.narrow(kernel)

    def enlarged(half: Tensor, bias: Tensor | None) -> Tensor:
        return conv2d_input_gradient(tape.narrow(half), kernel, size, factors, padding, 1, bias)

    return tape.record(
        enlarged(x.value, bias),
        enlarged(x.difference, None),
        [x],
        lambda g: [F.conv2d(tape.narrow(g), kernel, None, factors, padding)],
    )


def _summed_taps(kernel: Tensor, axis: int, factor: int) -> Tensor:
    """Return a kernel each tap of which is the sum of `factor` taps in a row, with zeros before the first and last."""
    # Not by F.pad, which TensorRT would do at every step.
    taps = kernel.split(1, axis)
    ends = range(1, len(taps) + factor)
    return torch.cat([functools.reduce(torch.add, taps[max(0, end - factor) : end]) for end in ends], axis)


def linear(tape: Tape, x: Pair, weight: Tensor, bias: Tensor | None = None) -> Pair:
    """`F.linear`."""

    def times(y: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        # As one product: of a batch that is not contiguous PyTorch makes many, each with a copy of the matrix.
        rows = tape.narrow(y).reshape(-1, y.shape[-1])
        return F.linear(rows, matrix, bias).reshape(*y.shape[:-1], -1)

    return tape.record(times(x.value, weight, bias), times(x.difference, weight), [x], lambda g: [times(g, weight.T)])


def attention(
    tape: Tape,
    query: Pair,
    key: Pair,
    value: Pair,
    attn_mask: None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Pair:
    """`F.scaled_dot_product_attention` without mask, [B, heads, tokens, channels].

    The softmax's difference is (p_v + p_u) tanh(y / 2) with y = log(p_u / p_v), p_u being the restored branch's
    probabilities. With x the difference of the logits, less its largest in the row (softmax does not notice),
    m = expm1(x) / 2 and M = sum p_v m: tanh(y / 2) = (m - M) / (1 + m + M).
    """
    if attn_mask is not None or is_causal or enable_gqa or dropout_p:
        raise ModelError("attention with a mask, dropout or grouped queries has no difference form")
    factor = 1 / math.sqrt(query.value.shape[-1]) if scale is None else scale
    q_v, q_d, q_u = _operands(tape, query, factor)
    k_v, k_d, k_u = _operands(tape, key)
    w_v, w_d, w_u = _operands(tape, value)
    logits = wide(q_v @ k_v.mT)
    # A sum of two products as one: it is rounded once, and there is one matrix of tokens by tokens less to move.
    difference = tape.scaled(torch.cat([q_v, q_d], -1) @ torch.cat([k_d, k_u], -1).mT)
    p_v = logits.softmax(-1)
    p_u = (logits + difference).softmax(-1)
    t = torch.tanh((difference - difference.amax(-1, keepdim=True)) * 0.5)
    m = t / (1 - t)  # by way of tanh, because ONNX lacks expm1; t is in (-1, 0], so that nothing cancels
    mean = (p_v * m).sum(-1, keepdim=True)
    denominator = m + (1 + mean)
    # Where it is this small, both terms are near -1/2: a logit of the row has moved by about one. Then the subtraction
    # of probabilities loses no more than the logits' own rounding, and the one in the quotient would.
    p_d = torch.where(denominator > 0.5, (p_v + p_u) * (m - mean) / denominator.clamp(min=0.5), p_u - p_v)
    p_u, p_d = tape.narrow(p_u), tape.narrow(tape.unscaled(p_d))

    def back(g: Tensor) -> Sequence[Tensor]:
        g = tape.narrow(g)
        of_p = wide(g @ w_u.mT)
        p = wide(p_u)
        of_logits = tape.narrow(p * (of_p - (p * of_p).sum(-1, keepdim=True)))
        # Where a matrix of tokens by tokens were to be transposed, the other factor and the result are: TensorRT would
        # store the large one anew.
        return of_logits @ k_u * factor, (q_u.mT @ of_logits).mT, (g.mT @ p_u).mT

    of_v, of_d = (tape.narrow(p_v) @ torch.cat([w_v, w_d], -1)).chunk(2, -1)
    return tape.record(of_v, of_d + p_d @ w_u, [query, key, value], back)


def _operands(tape: Tape, pair: Pair, factor: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    tensors = pair.value, pair.difference, tape.restored(pair)
    v, d, u = (tape.narrow(tensor if factor == 1 else tensor * factor) for tensor in tensors)
    return v, d, u


# Sums, products and changes of shape


def add(tape: Tape, a: Pair | Tensor | float, b: Pair | Tensor | float, *, alpha: float = 1) -> Pair:
    """`a + alpha * b`; of tensors that are no pairs only such as have no more elements."""
    if isinstance(a, Pair) and isinstance(b, Pair):
        _refuse_growth(a, b.value)
        _refuse_growth(b, a.value)
        return tape.record(
            tape.add(a.value, b.value, alpha),
            tape.add(a.difference, b.difference, alpha),
            [a, b],
            lambda g: [g, g if alpha == 1 else g * alpha],
        )
    if isinstance(b, Pair):
        a, b, alpha = multiply(tape, b, alpha), a, 1
    assert isinstance(a, Pair)
    assert not isinstance(b, Pair)
    _refuse_growth(a, b)
    # The sum with a time embedding, in float32 for large images too: rounded, it doubles the error of the terms.
    return tape.record(torch.add(a.value, b, alpha=alpha), a.difference, [a], lambda g: [g])


def _refuse_growth(pair: Pair, other: Pair | Tensor | float) -> None:
    if isinstance(other, Tensor) and torch.broadcast_shapes(pair.value.shape, other.shape) != pair.value.shape:
        raise ModelError(f"broadcasting {list(pair.value.shape)} with {list(other.shape)} has no difference form")


def subtract(tape: Tape, a: Pair | Tensor | float, b: Pair | Tensor | float, *, alpha: float = 1) -> Pair:
    """`a - alpha * b`."""
    return add(tape, a, b, alpha=-alpha)


def multiply(tape: Tape, a: Pair | Tensor | float, b: Pair | Tensor | float) -> Pair:
    """`a * b`; of tensors that are no pairs only such as have no more elements."""
    if isinstance(a, Pair) and isinstance(b, Pair):
        _refuse_growth(a, b.value)
        _refuse_growth(b, a.value)
        u_a, u_b = tape.restored(a), tape.restored(b)
        return tape.record(
            a.value * b.value,
            a.value * b.difference + a.difference * u_b,
            [a, b],
            lambda g: [g * u_b, g * u_a],
        )
    pair, factor = (a, b) if isinstance(a, Pair) else (b, a)
    assert isinstance(pair, Pair)
    assert not isinstance(factor, Pair)
    _refuse_growth(pair, factor)
    if not isinstance(factor, Tensor) and factor == 1:
        return pair
    return linear_map(tape, pair, lambda half: half * factor, lambda g: g * factor)


def divide(tape: Tape, a: Pair | Tensor | float, b: Pair | Tensor | float) -> Pair:
    """`a / b`, `b` being no pair."""
    if isinstance(b, Pair):
        raise ModelError("division by a value that depends on the image has no difference form")
    if not isinstance(b, Tensor) and b == 0:
        raise ModelError("the UNet divides by zero: one of its settings, such as mid_block_scale_factor, is 0")
    return multiply(tape, a, 1 / b)


def cat(tape: Tape, pairs: Sequence[Pair], dim: int = 0) -> Pair:
    """`torch.cat`."""
    return tape.record(
        torch.cat([tape.keep(pair.value) for pair in pairs], dim),
        torch.cat([tape.keep(pair.difference) for pair in pairs], dim),
        pairs,
        lambda g: g.split([pair.value.shape[dim] for pair in pairs], dim),
    )


def reshape(tape: Tape, x: Pair, shape: Sequence[int]) -> Pair:
    """`Tensor.reshape`."""
    before = x.value.shape
    return linear_map(tape, x, lambda half: half.reshape(shape), lambda g: g.reshape(before))


def transpose(tape: Tape, x: Pair, first: int, second: int) -> Pair:
    """`Tensor.transpose`."""
    return linear_map(tape, x, lambda half: half.transpose(first, second), lambda g: g.transpose(first, second))


def permute(tape: Tape, x: Pair, dims: Sequence[int]) -> Pair:
    """`Tensor.permute`."""
    inverse = sorted(range(len(dims)), key=lambda axis: dims[axis] % len(dims))
    return linear_map(tape, x, lambda half: half.permute(*dims), lambda g: g.permute(*inverse))


def slice_(tape: Tape, x: Pair, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Pair:
    """`x[..., start:end:step, ...]` along `dim`."""
    size, axis = x.value.shape[dim], dim % x.value.ndim
    first, last, _ = slice(start, end, step).indices(size)
    behind = [0, 0] * (x.value.ndim - 1 - axis)

    def back(g: Tensor) -> Tensor:
        if step > 1:  # zeros in between
            g = F.pad(g.unsqueeze(axis + 1), [*behind, 0, step - 1]).flatten(axis, axis + 1)
        return F.pad(g, [*behind, first, size - first - g.shape[axis]])

    return linear_map(tape, x, lambda half: aten.slice(half, axis, first, last, step), back)


def pad(tape: Tape, x: Pair, pads: Sequence[int], mode: str = "constant", value: float | None = None) -> Pair:
    """`F.pad` with zeros; negative widths cut."""
    if mode != "constant" or value:
        raise ModelError(f"padding of mode {mode!r} with value {value} has no difference form; only zero padding has")
    return linear_map(tape, x, lambda half: F.pad(half, list(pads)), lambda g: F.pad(g, [-width for width in pads]))


def upsample_nearest(
    tape: Tape, x: Pair, output_size: Sequence[int] | None, scale_factors: Sequence[float] | None
) -> Pair:
    """`F.interpolate` by nearest neighbour, enlarging by whole numbers."""
    factors = whole_factors(x.value.shape[2:], output_size, scale_factors)
    return linear_map(
        tape,
        x,
        lambda half: F.interpolate(half, scale_factor=[float(factor) for factor in factors]),
        lambda g: F.avg_pool2d(g, factors) * math.prod(factors),
    )


def whole_factors(
    size: Sequence[int], output_size: Sequence[int] | None, scale_factors: Sequence[float] | None
) -> tuple[int, int]:
    """Return by how much an upsampling enlarges height and width. Raises ModelError unless by whole numbers."""
    if output_size is None:
        output_size = [round(side * factor) for side, factor in zip(size, scale_factors or (), strict=True)]
    factors = [out // side for out, side in zip(output_size, size, strict=True)]
    if any(side * factor != out for side, factor, out in zip(size, factors, output_size, strict=True)):
        raise ModelError(f"upsampling {list(size)} to {list(output_size)} has no difference form: not a whole multiple")
    return _two(factors)


def average_pool(
    tape: Tape, x: Pair, kernel: Sequence[int], stride: Sequence[int] = (), padding: Sequence[int] = (0, 0)
) -> Pair:
    """`F.avg_pool2d` of windows that tile the image."""
    window = _two(kernel)
    if (
        (stride and _two(stride) != window)
        or any(padding)
        or any(side % edge for side, edge in zip(x.value.shape[2:], window, strict=True))
    ):
        raise ModelError(
            f"average pooling with kernel {list(kernel)}, stride {list(stride)} and padding {list(padding)} over "
            f"{list(x.value.shape[2:])} has no difference form: its windows do not tile the image"
        )
    return linear_map(
        tape,
        x,
        lambda half: F.avg_pool2d(half, window),
        lambda g: F.interpolate(g, scale_factor=[float(edge) for edge in window]) * (1 / math.prod(window)),
    )


def unchanged(tape: Tape, x: Pair, *_: Any, **__: Any) -> Pair:
    """Conversions of dtype or place: precision is the tape's business."""
    return x


def dropout(tape: Tape, x: Pair, p: float, train: bool) -> Pair:
    """`F.dropout` in evaluation."""
    if train:
        raise ModelError("dropout in training mode has no difference form")
    return x


# A captured operation -> what it does to pairs. `capture.py` puts `group_norm` and `upsampled_conv2d` for the
# operations that it joins.
RULES: dict[Any, Callable[..., Pair]] = {
    aten.conv2d.default: conv2d,
    aten.linear.default: linear,
    aten.scaled_dot_product_attention.default: attention,
    upsampled_conv2d: upsampled_conv2d,
    group_norm: group_norm,
    aten.silu.default: silu,
    aten.add.Tensor: add,
    aten.sub.Tensor: subtract,
    aten.mul.Tensor: multiply,
    aten.div.Tensor: divide,
    aten.cat.default: cat,
    aten.view.default: reshape,
    aten.reshape.default: reshape,
    aten.transpose.int: transpose,
    aten.permute.default: permute,
    aten.slice.Tensor: slice_,
    aten.pad.default: pad,
    aten.upsample_nearest2d.vec: upsample_nearest,
    aten.avg_pool2d.default: average_pool,
    aten.alias.default: unchanged,
    aten.dropout.default: dropout,
    aten.to.dtype: unchanged,
    aten.to.device: unchanged,
    aten.to.dtype_layout: unchanged,
}
