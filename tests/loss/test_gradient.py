"""The gradient program: loss and gradient of the restored image, against float64, where it is hard."""

from __future__ import annotations

import copy
import functools
import itertools
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from diffloss_engine.errors import ModelError
from diffloss_trt import DiffLoss
from diffloss_trt.contract import GRADIENT, NATURALNESS, PRECISIONS, SEMANTIC, SEMANTIC_GRADIENT
from diffloss_trt.gradient import trace_gradient
from diffloss_trt.probe import Probe
from diffloss_trt.tolerances import DIFFERENCE, Tolerance
from diffloss_trt.traced import TracedProgram
from diffloss_trt.unet import TappedUNet
from exports import make_schedule
from unets import KINDS, make_unet

# PSNR of the restored image in dB; timesteps as fractions of the last one.
WHOLE_SCHEDULE = (0.0, 0.01, 0.1, 0.5, 1.0)
PLACES = list(itertools.product((20.0, 35.0, 50.0), WHOLE_SCHEDULE))
# Every distance, and both ends of the schedule.
FEW = [(50.0, 0.0), (20.0, 0.1), (35.0, 1.0)]
# Where near-equals are subtracted.
NEAR = [place for place in PLACES if place[0] == 50.0]


class Result(NamedTuple):
    """Terms [N] and gradient [N, ...] of a batch of samples."""

    naturalness: Tensor
    semantic: Tensor
    gradient: Tensor


def probe_of(unet: Any, places: list[tuple[float, float]]) -> Probe:
    size = unet.config.sample_size
    timesteps = torch.tensor([round(999 * place) for _, place in places])
    return Probe.make(unet.config.in_channels, (size, size), timesteps, [decibels for decibels, _ in places])


@functools.cache
def unet_of(kind: str, dtype: torch.dtype) -> Any:
    return make_unet(kind, dtype=dtype)


@functools.cache
def traced(
    kind: str, dtype: torch.dtype, batch_size: int, prediction_type: str = "epsilon", *, with_noise: bool = True
) -> TracedProgram:
    unet = unet_of(kind, dtype)
    size = unet.config.sample_size
    tapped = TappedUNet(unet, make_schedule(prediction_type))
    return trace_gradient(tapped, batch_size, (size, size), with_noise=with_noise)


def run(program: TracedProgram, unet: Any, probe: Probe, weights: tuple[float, float] = (1.0, 1.0)) -> Result:
    """Return what the program gives with the weights of `unet`."""
    images = {"restored": probe.restored, "target": probe.target, "noise": probe.noise, "timesteps": probe.timesteps}
    for name, weight in zip(("naturalness_weight", "semantic_weight"), weights, strict=True):
        images[name] = torch.full((len(probe.timesteps),), weight)
    tensors = [images[name].to(example.dtype) for name, example in program.inputs.items()]
    with torch.no_grad():
        results = dict(zip(program.outputs, program.bind(unet.state_dict())(*tensors), strict=True))
    assert {name: (value.shape, value.dtype) for name, value in results.items()} == {
        name: (value.shape, value.dtype) for name, value in program.results.items()
    }
    return Result(results.get(NATURALNESS, torch.zeros(())), results[SEMANTIC], results[GRADIENT])


def by_tape(
    unet: Any, probe: Probe, weights: tuple[float, float] = (1.0, 1.0), prediction_type: str = "epsilon"
) -> Result:
    """Return what the plain formula gives in float64 with PyTorch's own tape."""
    loss = DiffLoss.from_unet(
        copy.deepcopy(unet).to(dtype=torch.float64),
        make_schedule(prediction_type),
        naturalness_weight=weights[0],
        semantic_weight=weights[1],
        reduction="none",
        value_range=(-1.0, 1.0),
    )
    restored = probe.restored.clone().requires_grad_()
    terms = loss.terms(restored, probe.target, noise=probe.noise, timesteps=probe.timesteps)
    (gradient,) = torch.autograd.grad(terms.total.sum(), restored)
    return Result(terms.naturalness, terms.semantic, gradient)


def check(found: Result, expected: Result, tolerance: Tolerance, *, naturalness: bool = True) -> None:
    """Every sample by itself."""
    terms = [(found.semantic, expected.semantic)]
    terms += [(found.naturalness, expected.naturalness)] if naturalness else []
    for term, wanted in terms:
        assert ((term.double() - wanted).abs() / wanted).max() < tolerance.term
    a, b = found.gradient.double().flatten(1), expected.gradient.flatten(1)
    assert ((a - b).norm(dim=1) / b.norm(dim=1)).max() < tolerance.gradient
    assert ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).min() > tolerance.cosine


# What float64 itself loses in the plain formula at 50 dB.
EXACT = Tolerance(term=1e-9, gradient=1e-8, cosine=1 - 1e-12)


@pytest.mark.parametrize(
    "kind", [*sorted(KINDS.keys() - {"four_levels"}), pytest.param("four_levels", marks=pytest.mark.slow)]
)
def test_every_layout_is_exact_in_float64(kind: str) -> None:
    unet, program = unet_of(kind, torch.float64), traced(kind, torch.float64, 3)
    probe = probe_of(unet, FEW)
    expected = by_tape(unet, probe)
    check(run(program, unet, probe), expected, EXACT)
    # Negative control: one weight of many thousands.
    altered = copy.deepcopy(unet)
    altered.conv_in.weight[1, 0, 1, 1] += 0.01
    with pytest.raises(AssertionError):
        check(run(program, altered, probe), expected, EXACT)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_every_prediction_type_is_exact_in_float64(prediction_type: str) -> None:
    unet, program = unet_of("variance", torch.float64), traced("variance", torch.float64, 3, prediction_type)
    probe = probe_of(unet, FEW)
    check(run(program, unet, probe), by_tape(unet, probe, prediction_type=prediction_type), EXACT)


@pytest.mark.parametrize(
    ("kind", "places", "precision"),
    [
        *(pytest.param("four_levels", PLACES, precision, marks=pytest.mark.slow) for precision in PRECISIONS),
        *(pytest.param("adm", PLACES, precision, marks=pytest.mark.slow) for precision in PRECISIONS),
        # The precision of plans alone: below, one level is compared in every precision.
        pytest.param("adm", FEW, "fp16", id="adm-few-fp16"),
        *(("large", FEW, precision) for precision in PRECISIONS),
    ],
)
def test_precision_does_not_depend_on_how_near_the_images_are(
    kind: str, places: list[tuple[float, float]], precision: str
) -> None:
    dtype = PRECISIONS[precision]
    unet = unet_of(kind, dtype)
    probe = probe_of(unet, places)
    found = run(traced(kind, dtype, len(places)), unet, probe)
    assert found.gradient.dtype == torch.float32
    check(found, by_tape(unet, probe), DIFFERENCE[precision])


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_plain_half_precision_fails_the_same_check(precision: str) -> None:
    """Negative control: what the difference form is for."""
    unet = unet_of("four_levels", PRECISIONS[precision])
    probe = probe_of(unet, NEAR)
    loss = DiffLoss.from_unet(
        unet, make_schedule(), naturalness_weight=1.0, semantic_weight=1.0, reduction="none", value_range=(-1.0, 1.0)
    )
    restored = probe.restored.float().requires_grad_()
    terms = loss.terms(restored, probe.target.float(), noise=probe.noise.float(), timesteps=probe.timesteps)
    (gradient,) = torch.autograd.grad(terms.total.sum(), restored)
    plain = Result(terms.naturalness, terms.semantic, gradient)
    expected = by_tape(unet, probe)
    with pytest.raises(AssertionError):
        check(plain, expected, DIFFERENCE[precision])
    a, b = plain.gradient.double().flatten(1), expected.gradient.flatten(1)
    assert ((a - b).norm(dim=1) / b.norm(dim=1)).min() > 5 * DIFFERENCE[precision].gradient


@pytest.mark.parametrize("weights", [(1.0, 1e-6), (1e-6, 1.0), (1e-3, 1e-6), (1e8, 1e-8)])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_any_ratio_of_weights(weights: tuple[float, float], precision: str) -> None:
    dtype = PRECISIONS[precision]
    unet, program = unet_of("one_level", dtype), traced("one_level", dtype, 3)
    probe = probe_of(unet, FEW)
    check(run(program, unet, probe, weights), by_tape(unet, probe, weights), DIFFERENCE[precision])


def test_semantic_term_alone_runs_half_the_network() -> None:
    unet = unet_of("two_levels", torch.float64)
    whole, part = (traced("two_levels", torch.float64, 3, with_noise=with_noise) for with_noise in (True, False))
    probe, weights = probe_of(unet, FEW), (0.0, 1.0)
    check(run(part, unet, probe, weights), by_tape(unet, probe, weights), EXACT, naturalness=False)
    assert (whole.name, part.name) == (GRADIENT, SEMANTIC_GRADIENT)
    assert not any(key.startswith(("up_blocks", "conv_out", "conv_norm_out")) for key in part.weights)
    assert len(part.module.graph.nodes) < 0.6 * len(whole.module.graph.nodes)
    assert set(whole.weights) == set(unet.state_dict())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_equal_images_give_exactly_zero(precision: str) -> None:
    dtype = PRECISIONS[precision]
    unet, program = unet_of("one_level", dtype), traced("one_level", dtype, 3)
    probe = probe_of(unet, FEW)
    equal = Probe(probe.target, probe.target, probe.noise, probe.timesteps)
    for part in run(program, unet, equal):
        assert not part.any()  # NaN counts as true


@pytest.mark.parametrize("precision", PRECISIONS)
def test_samples_do_not_see_each_other(precision: str) -> None:
    """One is equal to its target, one next to it, and one far off; each has a scale of its own."""
    dtype = PRECISIONS[precision]
    unet, program = unet_of("one_level", dtype), traced("one_level", dtype, 3)
    probe = probe_of(unet, [(200.0, 0.1), (50.0, 0.1), (0.0, 0.1)])
    equal = torch.cat([probe.target[:1], probe.restored[1:]])
    found = run(program, unet, Probe(probe.target, equal, probe.noise, probe.timesteps))
    assert not found.gradient[0].any()
    expected = by_tape(unet, probe)
    check(Result(*(part[1:] for part in found)), Result(*(part[1:] for part in expected)), DIFFERENCE[precision])


def test_memory_layout_does_not_matter() -> None:
    """A GPU's convolutions return other layouts than those of the machine, or of the mode, that traced the program."""
    unet = unet_of("adm", torch.float64)
    program, probe = traced("adm", torch.float64, 3), probe_of(unet, FEW)
    expected = run(program, unet, probe)
    found = run(program, copy.deepcopy(unet).to(memory_format=torch.channels_last), probe)
    check(found, expected, EXACT)


def test_operation_without_a_rule_is_named() -> None:
    tapped = TappedUNet(make_unet(act_fn="gelu"), make_schedule())
    with pytest.raises(ModelError, match=r"aten\.gelu\.default has no difference form"):
        trace_gradient(tapped, 1, (16, 16), with_noise=True)


@pytest.mark.parametrize("kind", ["adm", "skip_blocks"])
def test_program_is_forward_only_and_lean(kind: str) -> None:
    graph = traced(kind, torch.float64, 3).module.graph
    names = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert not [name for name in names if "backward" in name]
    assert names.count("aten.silu.default") == 2  # of the time embedding: inside it, and once for all blocks
    assert all(node.users for node in graph.nodes if node.op == "call_function")
