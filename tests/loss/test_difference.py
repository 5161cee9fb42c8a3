"""Each rule on pairs against the plain operation in float64: its value, its difference, and its way back.

A difference that is small cannot be had by subtracting, not even in float64, so the reference is the mean of the
derivative on the way from v to v + s d, by Gauss's rule: that is exact here to the last digits, and cancels nothing.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.functional import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffloss_engine.errors import ModelError
from diffloss_trt import difference
from diffloss_trt.difference import RULES, aten
from diffloss_trt.norms import group_norm, silu
from diffloss_trt.objective import per_sample, power_of_two
from diffloss_trt.tape import Pair, Tape

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
SCALES = torch.tensor([2.0**-1, 2.0**-3, 2.0**-10, 2.0**-20], dtype=F64)
# Of sums of some dozen products, each rounded once or twice. The smallest scale may lose no more than the largest.
TOLERANCES = {F64: 1e-14, F32: 4 * 2.0**-23, F16: 4 * 2.0**-10, BF16: 4 * 2.0**-7}


def plain_group_norm(
    x: Tensor, groups: int, gain: Tensor, offset: Tensor, eps: float, *time: Tensor, activate: bool
) -> Tensor:
    y = F.group_norm(x, groups, gain, offset, eps)
    y = y * time[0] + time[1] if time else y
    return F.silu(y) if activate else y


def plain_upsampled_conv2d(
    x: Tensor, factors: tuple[int, int], weight: Tensor, bias: Tensor | None, padding: tuple[int, int]
) -> Tensor:
    enlarged = F.interpolate(x, scale_factor=[float(factor) for factor in factors])
    return F.conv2d(enlarged, weight, bias, 1, padding)


# Of the operations that are not PyTorch's own.
PLAIN = {group_norm: plain_group_norm, difference.upsampled_conv2d: plain_upsampled_conv2d}

IMAGE, TOKENS, TIME = (4, 6, 5, 7), (4, 5, 6), (4, 6, 1, 1)
HEADS = ((4, 2, 5, 8), (4, 2, 7, 8), (4, 2, 7, 3))
CONV, ATTENTION, NORM = aten.conv2d.default, aten.scaled_dot_product_attention.default, group_norm
UP_CONV = difference.upsampled_conv2d


@dataclass(frozen=True)
class Case:
    """A use of a rule: `call` takes the operation, pairs of some shapes, and fixed tensors of others."""

    rule: Any
    call: Callable[..., Any]
    pairs: Sequence[Sequence[int]] = (IMAGE,)
    fixed: Sequence[Sequence[int]] = ()

    def plain(self, *operands: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
            result: Tensor = self.call(PLAIN.get(self.rule, self.rule), *operands)
        return result


def norm_case(groups: int, x: Sequence[int], *time: Sequence[int], activate: bool) -> Case:
    def call(op: Callable[..., Any], x: Any, gain: Tensor, offset: Tensor, *time: Tensor) -> Any:
        return op(x, groups, gain, offset, 1e-5, *time, activate=activate)

    return Case(NORM, call, [x], [(6,), (6,), *time])


CASES: dict[str, Case] = {
    "conv": Case(CONV, lambda op, x, w, b: op(x, w, b, [1, 1], [1, 1]), fixed=[(4, 6, 3, 3), (4,)]),
    "conv_of_image": Case(CONV, lambda op, x, w, b: op(x, w, b), [(4, 3, 5, 7)], [(4, 3, 3, 3), (4,)]),
    "conv_strided": Case(CONV, lambda op, x, w: op(x, w, None, [2], [1], [1], 2), fixed=[(4, 3, 3, 3)]),
    "conv_upsampled": Case(UP_CONV, lambda op, x, w, b: op(x, (2, 2), w, b, (1, 1)), fixed=[(4, 6, 3, 3), (4,)]),
    "conv_upsampled_oblong": Case(UP_CONV, lambda op, x, w: op(x, (3, 2), w, None, (1, 2)), fixed=[(4, 6, 3, 5)]),
    "conv_upsampled_wide": Case(UP_CONV, lambda op, x, w: op(x, (2, 1), w, None, (2, 0)), fixed=[(4, 6, 5, 1)]),
    "linear": Case(aten.linear.default, lambda op, x, w, b: op(x, w, b), [TOKENS], [(3, 6), (3,)]),
    "linear_unbiased": Case(aten.linear.default, lambda op, x, w: op(x, w), [TOKENS], [(3, 6)]),
    "attention": Case(ATTENTION, lambda op, q, k, v: op(q, k, v), HEADS),
    "attention_scaled": Case(ATTENTION, lambda op, q, k, v: op(q, k, v, None, 0.0, False, scale=0.7), HEADS),
    "group_norm": norm_case(2, IMAGE, activate=False),
    "group_norm_silu": norm_case(3, IMAGE, activate=True),
    "group_norm_time": norm_case(2, IMAGE, TIME, TIME, activate=False),
    "group_norm_time_silu": norm_case(2, IMAGE, TIME, TIME, activate=True),
    "group_norm_large": norm_case(3, (4, 6, 64, 64), activate=False),
    "group_norm_large_silu": norm_case(2, (4, 6, 64, 65), TIME, TIME, activate=True),
    "group_norm_large_odd": norm_case(3, (4, 6, 65, 65), activate=True),
    "group_norm_of_tokens": norm_case(6, (4, 6, 9), activate=False),
    "silu": Case(aten.silu.default, lambda op, x: op(x)),
    "add": Case(aten.add.Tensor, lambda op, a, b: op(a, b), [IMAGE, IMAGE]),
    "add_large": Case(aten.add.Tensor, lambda op, a, b: op(a, b), [(4, 2, 64, 64), (4, 2, 64, 64)]),
    "add_alpha": Case(aten.add.Tensor, lambda op, a, b: op(a, b, alpha=3), [IMAGE, IMAGE]),
    "add_tensor": Case(aten.add.Tensor, lambda op, x, time: op(x, time, alpha=2), fixed=[TIME]),
    "add_to_tensor": Case(aten.add.Tensor, lambda op, x, time: op(time, x, alpha=2), fixed=[IMAGE]),
    "add_number": Case(aten.add.Tensor, lambda op, x: op(x, 1.5)),
    "subtract": Case(aten.sub.Tensor, lambda op, a, b: op(a, b), [IMAGE, IMAGE]),
    "subtract_number": Case(aten.sub.Tensor, lambda op, x: op(x, 1)),
    "subtract_from_tensor": Case(aten.sub.Tensor, lambda op, x, fixed: op(fixed, x, alpha=2), fixed=[IMAGE]),
    "multiply": Case(aten.mul.Tensor, lambda op, a, b: op(a, b), [IMAGE, IMAGE]),
    "multiply_tensor": Case(aten.mul.Tensor, lambda op, x, time: op(x, time), fixed=[TIME]),
    "multiply_number": Case(aten.mul.Tensor, lambda op, x: op(x, 3)),
    "multiply_by_one": Case(aten.mul.Tensor, lambda op, x: op(x, 1)),
    "multiply_a_tensor_by": Case(aten.mul.Tensor, lambda op, x, fixed: op(fixed, x), fixed=[IMAGE]),
    "divide": Case(aten.div.Tensor, lambda op, x: op(x, 3.0)),
    "divide_by_tensor": Case(aten.div.Tensor, lambda op, x, time: op(x, time), fixed=[TIME]),
    "cat": Case(aten.cat.default, lambda op, *x: op(list(x), 1), [IMAGE, (4, 1, 5, 7), IMAGE]),
    "cat_last": Case(aten.cat.default, lambda op, *x: op(list(x), -1), [IMAGE, (4, 6, 5, 2)]),
    "view": Case(aten.view.default, lambda op, x: op(x, [4, 2, -1])),
    "reshape": Case(aten.reshape.default, lambda op, x: op(x, [4, 3, 2, 35])),
    "transpose": Case(aten.transpose.int, lambda op, x: op(x, 1, -1)),
    "permute": Case(aten.permute.default, lambda op, x: op(x, [0, -2, 3, 1])),
    "slice": Case(aten.slice.Tensor, lambda op, x: op(x, 1, 0, 3)),
    "slice_end": Case(aten.slice.Tensor, lambda op, x: op(x, -1, -5, 2**63 - 1)),
    "slice_steps": Case(aten.slice.Tensor, lambda op, x: op(x, 3, 1, 6, 2)),
    "slice_steps_to_end": Case(aten.slice.Tensor, lambda op, x: op(x, 2, None, None, 3)),
    "pad": Case(aten.pad.default, lambda op, x: op(x, [0, 1, 2, 3])),
    "pad_and_cut": Case(aten.pad.default, lambda op, x: op(x, [-1, 1, 2, -2], "constant", 0.0)),
    "upsample": Case(aten.upsample_nearest2d.vec, lambda op, x: op(x, None, [2.0, 2.0])),
    "upsample_to_size": Case(aten.upsample_nearest2d.vec, lambda op, x: op(x, [15, 7], None)),
    "average_pool": Case(aten.avg_pool2d.default, lambda op, x: op(x, [2, 2], [2, 2]), [(4, 3, 6, 8)]),
    "average_pool_oblong": Case(aten.avg_pool2d.default, lambda op, x: op(x, [3, 2]), [(4, 3, 6, 8)]),
    "alias": Case(aten.alias.default, lambda op, x: op(x)),
    "dropout": Case(aten.dropout.default, lambda op, x: op(x, 0.5, False)),
    "to_dtype": Case(aten.to.dtype, lambda op, x: op(x, F64)),
    "to_device": Case(aten.to.device, lambda op, x: op(x, torch.device("cpu"), F64)),
    "to_dtype_layout": Case(aten.to.dtype_layout, lambda op, x: op(x, dtype=F64, layout=torch.strided)),
}


def test_every_rule_has_a_case() -> None:
    assert {case.rule for case in CASES.values()} == set(RULES)


def draw(shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(tuple(shape), dtype=F64).to(dtype) for shape in shapes]


def mean_derivative(f: Callable[..., Tensor], start: Sequence[Tensor], way: Sequence[Tensor], scale: Tensor) -> Tensor:
    """Return (f(start + scale way) - f(start)) / scale without a subtraction."""
    total = torch.zeros((), dtype=F64)
    for node, weight in zip(*np.polynomial.legendre.leggauss(16), strict=True):
        point = tuple(v + per_sample(scale, v) * d * ((node + 1) / 2) for v, d in zip(start, way, strict=True))
        total = total + jvp(f, point, tuple(way))[1] * (weight / 2)
    return total


def assert_near(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """Fail unless ||actual - expected|| / ||expected|| of each sample is within the tolerance."""
    assert actual.shape == expected.shape, f"{what}: {list(actual.shape)}, expected {list(expected.shape)}"
    errors = (actual.double() - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    assert bool((errors <= tolerance).all()), f"{what}: {errors.tolist()}, tolerance {tolerance}"


def check(case: Case, rule: Callable[..., Pair], dtype: torch.dtype, *, scaled: bool = True) -> None:
    """Compare `rule` in `dtype` with the plain operation in float64, on the same rounded inputs.

    Unless `scaled` the tape has no scale, and the pairs are given the differences themselves.
    """
    values, ways, fixed = (draw(shapes, dtype) for shapes in (case.pairs, case.pairs, case.fixed))
    scale = SCALES.to(torch.promote_types(dtype, F32))
    tape = Tape(scale if scaled else None, dtype)
    pairs = [Pair(v, d if scaled else (d * per_sample(scale, d)).to(dtype)) for v, d in zip(values, ways, strict=True)]
    output = case.call(partial(rule, tape), *pairs, *fixed)
    (cotangent,) = draw([output.value.shape], dtype)
    gradients = [tape.gradient([(output, cotangent)], pair) for pair in pairs]

    values, ways, fixed = ([tensor.double() for tensor in tensors] for tensors in (values, ways, fixed))

    def plain(*operands: Tensor) -> Tensor:
        return case.plain(*operands, *fixed)

    restored = [(v + per_sample(SCALES, v) * d).requires_grad_() for v, d in zip(values, ways, strict=True)]
    value, result = plain(*values), plain(*restored)
    expected = mean_derivative(plain, values, ways, SCALES)
    assert_near(((result - value) * (1 / per_sample(SCALES, value)))[:2], expected[:2], 1e-13, "the reference itself")
    assert_near(output.value, value, TOLERANCES[dtype], "value")
    found = output.difference if scaled else output.difference.double() / per_sample(SCALES, output.difference)
    assert_near(found, expected, TOLERANCES[dtype], "difference")
    for gradient, wanted in zip(gradients, torch.autograd.grad(result, restored, cotangent.double()), strict=True):
        assert_near(gradient, wanted, TOLERANCES[dtype], "gradient")


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", CASES)
def test_rules_are_the_plain_operations(name: str, dtype: torch.dtype) -> None:
    check(CASES[name], RULES[CASES[name].rule], dtype)


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("name", CASES)
def test_these_formats_need_no_scale(name: str, dtype: torch.dtype) -> None:
    check(CASES[name], RULES[CASES[name].rule], dtype, scaled=False)


def test_fp16_needs_a_scale() -> None:
    with pytest.raises(AssertionError, match="difference"):
        check(CASES["silu"], RULES[CASES["silu"].rule], F16, scaled=False)


def mutant(rule: Callable[..., Pair], right: str, wrong: str) -> Callable[..., Pair]:
    """Return `rule` with one piece of its source replaced."""
    source = inspect.getsource(rule)
    assert source.count(right) == 1, f"{rule.__name__} no longer has {right!r}: choose another mistake"
    namespace = dict(vars(inspect.getmodule(rule)))
    exec(compile("from __future__ import annotations\n" + source.replace(right, wrong), "mutant", "exec"), namespace)
    made: Callable[..., Pair] = namespace[rule.__name__]
    return made


@pytest.mark.parametrize("dtype", [F64, F16])
@pytest.mark.parametrize(
    ("name", "right", "wrong", "seen_in"),
    [
        ("conv", "x.difference), kernel, None", "x.difference), kernel, offset", "difference"),
        ("conv_strided", "(height, width), stride", "(height + 2, width), stride", "gradient"),
        ("conv_upsampled", "enlarged(x.difference, None)", "enlarged(x.difference, bias)", "difference"),
        ("conv_upsampled", "flip(2, 3)", "flip(3)", "value"),
        ("conv_upsampled_oblong", "flip(2, 3)", "flip(3)", "value"),
        ("linear", "x.difference, weight)", "x.difference, weight, bias)", "difference"),
        ("attention", "[k_d, k_u]", "[k_d, k_v]", "difference"),
        ("attention", "of_d + p_d", "p_u @ w_d + p_d", "difference"),
        ("attention", "p_d @ w_u", "p_d @ w_v", "difference"),
        ("attention", "m + (1 + mean)", "m + 1", "difference"),
        ("attention", "tape.unscaled(p_d)", "p_d", "difference"),
        ("attention", "of_logits @ k_u", "of_logits @ k_v", "gradient"),
        ("attention_scaled", "if scale is None else scale", "", "value"),
        ("group_norm", "per.mean(c_u * c_u)", "per.mean(c * c)", "difference"),
        ("group_norm", "(c + c_u) * q", "(c + c) * q", "difference"),
        ("group_norm", " - centred * along", "", "gradient"),
        ("group_norm_time_silu", "offset * time_scale + time_shift", "offset + time_shift", "value"),
        ("group_norm_silu", "of_result if by is None else of_result * by", "of_result", "gradient"),
        ("multiply", "a.difference * u_b", "a.difference * b.value", "difference"),
        ("add_alpha", "[g, g if alpha == 1 else g * alpha]", "[g, g]", "gradient"),
        ("slice_steps", "[*behind, first,", "[*behind, 0,", "gradient"),
        ("upsample", " * math.prod(factors)", "", "gradient"),
    ],
)
def test_negative_controls(name: str, right: str, wrong: str, seen_in: str, dtype: torch.dtype) -> None:
    rule = mutant(RULES[CASES[name].rule], right, wrong)
    with pytest.raises(AssertionError, match=f"^{seen_in}: "):
        check(CASES[name], rule, dtype)


@pytest.mark.parametrize(
    ("right", "wrong", "seen_in"),
    [
        ("    v, d = halves(views[1])\n", "    v, d = halves(views[1])[0], 0 * d.reshape(shape)\n", "difference"),
        ("wide(kept) * gain_u + offset if", "wide(kept) * gain_u if", "difference"),
        ("tape.narrow(c_u) if", "tape.narrow(c) if", "difference"),
        ("centred * gain_u + offset", "centred * gain_u", "gradient"),
        ("variance + tape.scaled(delta)", "variance", "difference"),
    ],
)
def test_negative_controls_of_a_large_group_norm(right: str, wrong: str, seen_in: str) -> None:
    """Of what is computed again in half precision alone."""
    case = CASES["group_norm_large_silu"]
    rule = mutant(group_norm, right, wrong)
    check(case, rule, F32)
    with pytest.raises(AssertionError, match=f"^{seen_in}: "):
        check(case, rule, F16)


def test_negative_control_sees_a_subtraction() -> None:
    def subtracted(tape: Tape, x: Pair) -> Pair:
        right = silu(tape, x)
        apart = F.silu(tape.restored(x)) - F.silu(x.value)
        return tape.record(right.value, tape.unscaled(apart), [right], lambda g: [g])

    with pytest.raises(AssertionError, match=r"^difference: "):
        check(CASES["silu"], subtracted, F32)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("constant", [None, 0.0, 5.3])
@pytest.mark.parametrize("name", CASES)
def test_no_difference_is_zero(name: str, constant: float | None, dtype: torch.dtype) -> None:
    """The second half of the samples does differ, where groups may be constant and attention uniform."""
    case = CASES[name]
    values, ways, fixed = (draw(shapes, dtype) for shapes in (case.pairs, case.pairs, case.fixed))
    scale = power_of_two(torch.tensor([0.0, 0.0, 1e-3, 1e-3], dtype=torch.promote_types(dtype, F32)))
    tape = Tape(scale, dtype)
    for way in ways:
        way[:2] = 0
    if constant is not None:
        values = [torch.full_like(value, constant) for value in values]
    pairs = [Pair(v, d) for v, d in zip(values, ways, strict=True)]
    output = case.call(partial(RULES[case.rule], tape), *pairs, *fixed)
    assert torch.equal(output.difference[:2], torch.zeros_like(output.difference[:2]))
    assert bool(output.difference[2:].any())
    for pair in pairs:
        gradient = tape.gradient([(output, torch.ones_like(output.value))], pair)
        for tensor in (output.value, output.difference, gradient):
            assert bool(tensor.isfinite().all())


def test_gradients_from_several_taps_and_paths_add_up() -> None:
    (v, d), tape = draw([IMAGE, IMAGE], F64), Tape(SCALES, F64)
    first, last = draw([IMAGE, IMAGE], F64)
    x = Pair(v, d)
    tap = silu(tape, x)
    end = difference.add(tape, difference.multiply(tape, x, tap), x)
    restored = tape.restored(x).requires_grad_()
    activated = F.silu(restored)
    (expected,) = torch.autograd.grad([activated, restored * activated + restored], restored, [first, last])
    assert_near(tape.gradient([(tap, first), (end, last)], x), expected, 1e-14, "gradient")


@pytest.mark.parametrize("name", CASES)
def test_products_have_the_precision_of_the_tape(name: str) -> None:
    case = CASES[name]
    products = {CONV, UP_CONV, aten.linear.default, ATTENTION}
    values, ways = (draw(shapes, F32) for shapes in (case.pairs, case.pairs))
    pairs = [Pair(v, d) for v, d in zip(values, ways, strict=True)]
    output = case.call(partial(RULES[case.rule], Tape(SCALES.float(), F16)), *pairs, *draw(case.fixed, F16))
    narrow = (case.rule in products and name != "conv_of_image") or "large" in name
    assert output.value.dtype == output.difference.dtype == (F16 if narrow else F32)


def test_sums_of_large_images_are_kept_in_the_precision_of_the_tape() -> None:
    tape = Tape(SCALES.float(), F16)
    for size, kept in (((64, 64), F16), ((63, 64), F32)):
        x = Pair(*draw([(4, 2, *size)] * 2, F32))
        # Two ways back, whose gradients are summed.
        end = difference.add(tape, difference.multiply(tape, x, 3.0), difference.multiply(tape, x, 2.0))
        assert end.value.dtype == end.difference.dtype == kept
        gradient = tape.gradient([(end, torch.ones_like(end.value))], x)
        assert gradient.dtype == kept
        assert torch.equal(gradient, torch.full_like(gradient, 5))


def test_the_way_back_of_a_large_group_norm_reads_neither_half() -> None:
    """So that they need not be kept until then."""
    v, d, g, gain, offset = draw([(4, 6, 64, 64)] * 3 + [(6,)] * 2, F16)
    tape, x = Tape(SCALES.float(), F16), Pair(v, d)
    output = group_norm(tape, x, 2, gain, offset, 1e-5, activate=True)
    expected = tape.gradient([(output, g)], x)
    for half in (v, d, output.value, output.difference):
        half.fill_(math.nan)
    assert torch.equal(tape.gradient([(output, g)], x), expected)


@pytest.mark.parametrize(("spread", "mean"), [(1.0, 100.0), (0.02, 0.3), (0.0, 5.3)])
def test_statistics_of_a_large_image_far_from_zero(spread: float, mean: float) -> None:
    v, d, gain, offset = draw([(4, 6, 64, 64), (4, 6, 64, 64), (6,), (6,)], F16)
    pair = Pair(spread * v + mean, d + mean)

    def norm(dtype: torch.dtype) -> Pair:
        tape = Tape(SCALES.to(torch.promote_types(dtype, F32)), dtype)
        x = Pair(pair.value.to(dtype), pair.difference.to(dtype))
        return group_norm(tape, x, 2, gain.to(dtype), offset.to(dtype), 1e-5, activate=True)

    found, expected = norm(F16), norm(F64)
    assert_near(found.value, expected.value, TOLERANCES[F16], "value")
    assert_near(found.difference, expected.difference, TOLERANCES[F16], "difference")


@pytest.mark.parametrize("size", [(5, 7), (64, 64)])
def test_an_image_is_not_rounded(size: tuple[int, int]) -> None:
    """Of what lies below half precision's digits, nothing is lost in the first convolution."""
    weight = torch.randn(4, 3, 3, 3).half()
    image, small = torch.rand(2, 4, 3, *size)
    rough = difference.conv2d(Tape(SCALES.float(), F16), Pair(image, small), weight, None, padding=(1, 1))
    fine = difference.conv2d(Tape(SCALES.float(), F16), Pair(image + 1e-5 * small, small), weight, padding=(1, 1))
    expected = 1e-5 * F.conv2d(small.double(), weight.double(), padding=1)
    assert_near(fine.value - rough.value, expected, 0.1, "value")


# What lies far apart: here the plain subtraction in float64 is a reference.


@pytest.mark.parametrize("dtype", [F64, F32])
def test_silu_far_out(dtype: torch.dtype) -> None:
    values = torch.tensor([-60, -20, -1, -1e-3, 0, 1e-3, 1, 20, 60], dtype=dtype).view(1, -1, 1)
    scale = torch.tensor([4.0, 2.0**-3, 2.0**-10], dtype=dtype)
    apart = torch.tensor([-100, -60, -9, -1, 1, 9, 60, 100], dtype=dtype)
    x = Pair(values.expand(3, -1, 8), (apart / scale.view(-1, 1, 1)).expand(-1, values.shape[1], -1))
    tape = Tape(scale, dtype)
    output = silu(tape, x)
    v = x.value.double()
    u = (v + apart.double()).requires_grad_()
    expected = F.silu(u) - F.silu(v)
    (slope,) = torch.autograd.grad(expected.sum(), u)
    actual, gradient = tape.scaled(output.difference), tape.gradient([(output, torch.ones_like(output.value))], x)
    size = 2 * torch.finfo(dtype).eps + 1e-14  # the latter for the reference's own subtraction
    torch.testing.assert_close(actual.double(), expected.detach(), rtol=size, atol=size)
    torch.testing.assert_close(gradient.double(), slope, rtol=size, atol=size)


FLIPS = {(dtype, apart) for dtype in TOLERANCES for apart in (1.0, 5.0, 20.0, 200.0)}


@pytest.mark.parametrize(("dtype", "apart"), sorted(FLIPS, key=str))
def test_attention_rows_that_flip(dtype: torch.dtype, apart: float) -> None:
    """With one key for each channel the query is the logits, and with one value for each the result the softmax."""
    query = 10 * torch.randn(4, 1, 50, 8, dtype=F64)
    way = (torch.rand(query.shape, dtype=F64) * 2 - 1) * apart
    query, way, one = query.to(dtype), way.to(dtype), torch.eye(8, dtype=dtype).expand(4, 1, -1, -1)
    tape = Tape(torch.tensor([1.0, 2.0**-3, 2.0**-6, 2.0**-7], dtype=torch.promote_types(dtype, F32)), dtype)
    x, same = Pair(query, tape.unscaled(way).to(dtype)), Pair(one, torch.zeros_like(one))
    output = difference.attention(tape, x, same, same, scale=1.0)
    restored = (query.double() + way.double()).requires_grad_()
    result = restored.softmax(-1)
    (cotangent,) = draw([query.shape], dtype)
    (expected,) = torch.autograd.grad(result, restored, cotangent.double())
    change = (result - query.double().softmax(-1)).detach()
    assert_near(tape.scaled(output.difference), change, 4 * TOLERANCES[dtype], "difference")
    # A row that is nearly one-hot has a gradient in its small probabilities alone: they feel the rounding of a logit.
    assert_near(tape.gradient([(output, cotangent)], x), expected, (4 + apart / 8) * TOLERANCES[dtype], "gradient")


def check_input_gradient(
    stride: tuple[int, int], kernel: tuple[int, int], padding: tuple[int, int], groups: int, size: tuple[int, int]
) -> None:
    weight, image = draw([(8, 4 // groups, *kernel), (2, 4, *size)], F64)
    output = F.conv2d(image.requires_grad_(), weight, None, stride, padding, groups=groups)
    (cotangent,) = draw([output.shape], F64)
    (expected,) = torch.autograd.grad(output, image, cotangent)
    actual = difference.conv2d_input_gradient(cotangent, weight, size, stride, padding, groups)
    assert_near(actual, expected, TOLERANCES[F64], f"padding {padding}, groups {groups}, size {size}")


@pytest.mark.parametrize("kernel", [(1, 1), (2, 2), (3, 3), (5, 5), (3, 1), (2, 5)])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (3, 3), (1, 2), (3, 2)])
def test_input_gradient_of_convolutions(stride: tuple[int, int], kernel: tuple[int, int]) -> None:
    for padding in [(0, 0), (1, 1), (2, 2), (0, 2)]:
        if stride == (1, 1) and any(p >= k for p, k in zip(padding, kernel, strict=True)):
            continue  # see below
        for groups, size in [(1, (7, 6)), (2, (5, 5)), (4, (6, 9))]:
            check_input_gradient(stride, kernel, padding, groups, size)


@pytest.mark.parametrize(("kernel", "padding"), [((1, 1), (1, 1)), ((2, 2), (2, 2)), ((3, 1), (0, 2))])
def test_input_gradient_where_padding_outreaches_the_kernel(kernel: tuple[int, int], padding: tuple[int, int]) -> None:
    check_input_gradient((1, 1), kernel, padding, 1, (7, 6))


@pytest.mark.parametrize(
    ("operation", "shape", "use", "message"),
    [
        (
            aten.conv2d.default,
            IMAGE,
            lambda op, x: op(x, torch.ones(1, 6, 2, 2), None, [1], [0], [2]),
            r"dilation \[2\]",
        ),
        (ATTENTION, IMAGE, lambda op, x: op(x, x, x, torch.zeros(5, 5)), "attention with a mask"),
        (ATTENTION, IMAGE, lambda op, x: op(x, x, x, is_causal=True), "attention with a mask"),
        (ATTENTION, IMAGE, lambda op, x: op(x, x, x, dropout_p=0.1), "dropout"),
        (ATTENTION, IMAGE, lambda op, x: op(x, x, x, enable_gqa=True), "grouped queries"),
        (aten.avg_pool2d.default, IMAGE, lambda op, x: op(x, [2, 2]), r"kernel \[2, 2\].* over \[5, 7\].*do not tile"),
        (aten.avg_pool2d.default, (1, 1, 4, 4), lambda op, x: op(x, [2], [1]), r"stride \[1\].*do not tile"),
        (aten.avg_pool2d.default, (1, 1, 4, 4), lambda op, x: op(x, [2], [2], [1]), r"padding \[1\].*do not tile"),
        (aten.upsample_nearest2d.vec, IMAGE, lambda op, x: op(x, [15, 15], None), r"\[5, 7\] to \[15, 15\].*multiple"),
        (aten.upsample_nearest2d.vec, IMAGE, lambda op, x: op(x, None, [1.5, 1.0]), "not a whole multiple"),
        (aten.pad.default, IMAGE, lambda op, x: op(x, [1, 1], "reflect"), "padding of mode 'reflect'"),
        (aten.pad.default, IMAGE, lambda op, x: op(x, [1, 1], "constant", 1.0), "value 1.0"),
    ],
)
def test_what_has_no_difference_form(
    operation: Any, shape: Sequence[int], use: Callable[..., Any], message: str
) -> None:
    x = Pair(torch.zeros(*shape), torch.zeros(*shape))
    with pytest.raises(ModelError, match=message):
        use(partial(RULES[operation], Tape(torch.ones(len(x.value)), F32)), x)
