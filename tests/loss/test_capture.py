"""The captured UNet on pairs against the eager one on either branch, and what capturing does to the graph."""

from __future__ import annotations

import functools
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.upsampling import Upsample2D
from torch import Tensor
from torch.fx import Node

from diffloss_engine.errors import ModelError
from diffloss_trt import NoiseSchedule
from diffloss_trt.capture import CapturedUNet
from diffloss_trt.difference import RULES, aten, upsampled_conv2d
from diffloss_trt.norms import group_norm
from diffloss_trt.objective import power_of_two
from diffloss_trt.tape import Pair, Tape
from diffloss_trt.unet import TappedUNet
from unets import KINDS, make_unet

ALPHAS = torch.linspace(0.999, 0.01, 1000, dtype=torch.float64)

Batch = tuple[Tensor, Tensor, Tensor, Tensor]


def capture(unet: Any, prediction_type: str = "epsilon", *, with_noise: bool = True) -> tuple[TappedUNet, CapturedUNet]:
    tapped = TappedUNet(unet, NoiseSchedule(ALPHAS, prediction_type))
    size = unet.config.sample_size
    return tapped, CapturedUNet(tapped, 3, (size, size), with_noise=with_noise)


@functools.cache
def captured_kind(kind: str) -> tuple[TappedUNet, CapturedUNet]:
    return capture(make_unet(kind))


def assert_near(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    assert actual.shape == expected.shape, f"{what}: {list(actual.shape)}, expected {list(expected.shape)}"
    errors = (actual - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    assert bool((errors <= tolerance).all()), f"{what}: {errors.tolist()}, tolerance {tolerance}"


def check(
    tapped: TappedUNet, captured: CapturedUNet, batch: Batch, altered: Mapping[str, Tensor] | None = None
) -> None:
    """Compare values, differences and gradient with those of the eager UNet, which keeps its weights."""
    restored, target, _, timesteps = batch
    apart = restored - target
    tape = Tape(power_of_two(apart.flatten(1).abs().amax(1)), torch.float64)
    noisy = Pair(target, tape.unscaled(apart))
    weights = altered or tapped.unet.state_dict()
    pairs = captured.run_pair(tape, noisy, timesteps.double(), weights, captured.constants)

    leaf = restored.clone().requires_grad_()
    features = [tapped.features(image, timesteps, with_noise=len(pairs) > 1) for image in (target, leaf)]
    values, others = ([tap for tap in taps if tap is not None] for taps in features)
    ends = [(pair, torch.randn_like(pair.value)) for pair in pairs]
    (expected,) = torch.autograd.grad(others, leaf, [cotangent for _, cotangent in ends])
    cancelled = max(1.0, float(target.norm() / apart.norm()))  # by the reference's subtraction
    for pair, value, other in zip(pairs, values, others, strict=True):
        assert_near(pair.value, value, 1e-13, "value")
        assert_near(tape.scaled(pair.difference), (other - value).detach(), 1e-13 * cancelled, "difference")
    assert_near(tape.gradient(ends, noisy), expected, 1e-13, "gradient")


@pytest.mark.parametrize("distance", [1, 1e-2, 1e-5])
@pytest.mark.parametrize("kind", KINDS)
def test_pairs_are_the_eager_features(kind: str, distance: float, make_batch: Callable[..., Batch]) -> None:
    tapped, captured = captured_kind(kind)
    size = tapped.unet.config.sample_size
    restored, target, noise, timesteps = make_batch(size=size, channels=tapped.channels)
    check(tapped, captured, (target + distance * (restored - target), target, noise, timesteps))


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_other_predictions_become_noise(prediction_type: str, batch: Batch) -> None:
    check(*capture(make_unet("variance"), prediction_type), batch)


def test_bottleneck_alone(batch: Batch) -> None:
    tapped, captured = capture(make_unet(), with_noise=False)
    check(tapped, captured, batch)
    used = {name.split(".")[0] for name in captured.weights}
    assert used == {"conv_in", "time_embedding", "down_blocks", "mid_block"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_equal_images_differ_by_exactly_nothing(dtype: torch.dtype, batch: Batch) -> None:
    tapped, captured = capture(make_unet("one_level", dtype=dtype))
    _, target, _, timesteps = (part.to(torch.promote_types(dtype, torch.float32)) for part in batch)
    noisy = Pair(target, torch.zeros_like(target))
    tape = Tape(power_of_two(torch.zeros_like(timesteps)), dtype)
    pairs = captured.run_pair(tape, noisy, timesteps, tapped.unet.state_dict(), captured.constants)
    for pair in pairs:
        assert not pair.difference.any()
        assert bool(pair.value.isfinite().all())
    gradient = tape.gradient([(pair, torch.ones_like(pair.value)) for pair in pairs], noisy)
    assert bool(gradient.isfinite().all())
    assert bool(gradient.any())


@pytest.mark.parametrize(
    "name", ["conv_in.bias", "time_embedding.linear_2.weight", "up_blocks.0.resnets.0.norm2.weight"]
)
def test_negative_control_sees_one_weight(name: str, batch: Batch) -> None:
    altered = make_unet("two_levels")
    altered.get_parameter(name).view(-1)[1] += 1e-6
    with pytest.raises(AssertionError, match=r"^value: "):
        check(*captured_kind("two_levels"), batch, altered.state_dict())


def embedding_in_difference(tape: Tape, a: Pair, b: Any) -> Pair:
    extra = 0 if isinstance(b, Pair) else b
    sum_ = RULES[aten.sub.Tensor](tape, a, b, alpha=-1)
    return tape.record(sum_.value, sum_.difference + extra, [sum_], lambda g: [g])


def detached_skip(tape: Tape, pairs: list[Pair], dim: int) -> Pair:
    joined = [torch.cat([getattr(pair, half) for pair in pairs], dim) for half in ("value", "difference")]
    size = pairs[0].value.shape[dim]
    return tape.record(joined[0], joined[1], pairs[:1], lambda g: [g.narrow(dim, 0, size)])


@pytest.mark.parametrize(
    ("operation", "mistaken", "seen_in"),
    [(aten.add.Tensor, embedding_in_difference, "difference"), (aten.cat.default, detached_skip, "gradient")],
)
def test_negative_control_sees_a_mistaken_rule(
    operation: Any, mistaken: Callable[..., Pair], seen_in: str, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RULES, operation, mistaken)
    with pytest.raises(AssertionError, match=f"^{seen_in}: "):
        check(*captured_kind("two_levels"), batch)


@pytest.mark.parametrize("activation", ["gelu", "mish"])
def test_operations_without_a_rule_are_named(activation: str, batch: Batch) -> None:
    tapped, captured = capture(make_unet("no_mid_block", act_fn=activation))
    with pytest.raises(ModelError, match=rf"aten\.{activation}\.default has no difference form"):
        check(tapped, captured, batch)


# The graph


def operations(captured: CapturedUNet) -> list[Node]:
    return [node for node in captured.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("kind", KINDS)
def test_equal_operations_are_one(kind: str) -> None:
    _, captured = captured_kind(kind)
    nodes = operations(captured)
    assert max(Counter(f"{node.target} {node.args} {node.kwargs}" for node in nodes).values()) == 1
    # One silu within the embedding's own network, and one between it and all the blocks.
    of_image = captured.dependent(captured.inputs[:1])
    users = [len(node.users) for node in nodes if node.target is aten.silu.default and node not in of_image]
    assert users == [1, sum(name.endswith("time_emb_proj.weight") for name in captured.weights)]


@pytest.mark.parametrize("kind", KINDS)
def test_norms_are_joined_with_what_follows(kind: str) -> None:
    tapped, captured = captured_kind(kind)
    of_image = captured.dependent(captured.inputs[:1])
    targets = Counter(node.target for node in operations(captured) if node in of_image)
    assert not targets[aten.group_norm.default]
    assert not targets[aten.silu.default]
    assert targets[aten.mul.Tensor] == (kind == "centred")
    joined = Counter(
        (node.args[5] is not None, node.args[6] is not None, node.kwargs["activate"])
        for node in captured.graph.find_nodes(op="call_function", target=group_norm)
    )
    expected: Counter[tuple[bool, bool, bool]] = Counter()
    for name, module in tapped.unet.named_modules():
        if isinstance(module, torch.nn.GroupNorm):
            timed = kind == "adm" and name.endswith("norm2")
            expected[timed, timed, "attentions" not in name] += 1
    assert joined == expected


@pytest.mark.parametrize("kind", KINDS)
def test_upsamplings_are_joined_with_their_convolutions(kind: str) -> None:
    tapped, captured = captured_kind(kind)
    counts = Counter(node.target for node in operations(captured))
    upsamplers = [module for module in tapped.unet.modules() if isinstance(module, Upsample2D)]
    if kind == "adm":  # in the residual blocks: the skip connection's has no convolution
        assert counts[upsampled_conv2d] == counts[aten.upsample_nearest2d.vec] == len(upsamplers) > 0
    else:
        assert counts[upsampled_conv2d] == len(upsamplers)
        assert not counts[aten.upsample_nearest2d.vec]


@pytest.mark.parametrize("kind", KINDS)
def test_constants_are_computed_in_advance(kind: str) -> None:
    _, captured = captured_kind(kind)
    places = captured.graph.find_nodes(op="placeholder")
    unknown = captured.dependent(place for place in places if place.name not in captured.constants)
    assert all(node in unknown for node in operations(captured))
    frequencies = [constant for constant in captured.constants.values() if constant.ndim == 2]
    kernels = [constant for constant in captured.constants.values() if constant.ndim == 4]
    assert len(captured.constants) == len(frequencies) + len(kernels)
    if kind != "learned_time":
        (found,) = frequencies
        half = found.shape[1]
        steps = torch.arange(half, dtype=torch.float64) / (half - (kind == "asymmetric_padding"))
        torch.testing.assert_close(found[0].double(), torch.exp(-math.log(10000) * steps), rtol=1e-6, atol=0)
    row = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=torch.float64) / 8
    assert len(kernels) == (6 if kind == "skip_blocks" else 0)
    for kernel in kernels:
        gain = kernel.sum().round()
        torch.testing.assert_close(kernel[0, 0].double(), gain * row.outer(row), rtol=1e-6, atol=0)


def test_fp32_that_was_asked_for_by_its_new_name() -> None:
    """`torch.backends.fp32_precision` is the process's, cannot be taken back, and is to stay as it was set."""
    program = """
import torch
backends = torch.backends
backends.fp32_precision = "ieee"
settings = [backends, backends.cudnn.conv, backends.cudnn.rnn]
before = [setting.fp32_precision for setting in settings]
assert before[0] == "ieee"
from diffloss_trt import NoiseSchedule
from diffloss_trt.capture import CapturedUNet
from diffloss_trt.unet import TappedUNet
from unets import make_unet
unet = make_unet("no_mid_block")
CapturedUNet(TappedUNet(unet, NoiseSchedule(torch.linspace(0.999, 0.01, 1000))), 1, (16, 16), with_noise=False)
assert [setting.fp32_precision for setting in settings] == before
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[1])
