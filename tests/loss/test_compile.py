"""torch.compile: of the network beside the loss, and of the whole step as one graph."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffloss_engine.errors import BackendError, InputError
from diffloss_trt import DiffLoss, NoiseSchedule
from diffloss_trt.contract import SEMANTIC_GRADIENT
from diffloss_trt.inputs import Backward
from exports import shared_evaluator
from unets import make_unet

Exported = tuple[Path, Any, NoiseSchedule]
Step = Callable[[Tensor, Tensor], Tensor]
SETTINGS: dict[str, Any] = {"naturalness_weight": 1.0, "semantic_weight": 0.5, "value_range": (-1, 1)}


@pytest.fixture(autouse=True)
def _no_graphs_of_other_tests() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def load(exported: Exported, backend: str = "onnxruntime", backward: Backward = "fused", **settings: Any) -> DiffLoss:
    return DiffLoss(shared_evaluator(exported[0], backend, backward), **SETTINGS | settings)


@pytest.fixture
def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 3, 3, padding=1))


def images(count: int = 3) -> tuple[Tensor, Tensor]:
    """Return degraded and target images in [-1, 1], [count, 3, 16, 16]."""
    generator = torch.Generator().manual_seed(count)
    target = torch.rand(count, 3, 16, 16, generator=generator) * 2 - 1
    return target + 0.3 * torch.randn(target.shape, generator=generator), target


def make_step(network: Callable[[Tensor], Tensor], loss: DiffLoss) -> Step:
    def step(degraded: Tensor, target: Tensor) -> Tensor:
        restored = network(degraded)
        return F.mse_loss(restored, target) + loss(restored, target)

    return step


def run(step: Step, network: nn.Module, count: int = 3, draws: int = 3) -> list[Tensor]:
    """Return loss and gradients of a step whose draws are those of the global seed `draws`."""
    torch.manual_seed(draws)
    network.zero_grad()
    total = step(*images(count))
    total.backward()
    return [
        total.detach(),
        *(parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None),
    ]


def same(found: list[Tensor], expected: list[Tensor], tolerance: float = 0.0) -> bool:
    assert len(found) == len(expected) == 5
    return all(float((a - b).norm()) <= tolerance * float(b.norm()) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("compiler", "seed", "tolerance"),
    [
        ("aot_eager", None, 0.0),
        ("aot_eager", 7, 0.0),
        pytest.param("inductor", None, 1e-5, marks=pytest.mark.slow),
    ],
)
def test_whole_step_is_one_graph_and_what_eager_computes(
    compiler: str, seed: int | None, tolerance: float, exported: Exported, network: nn.Module
) -> None:
    """The draws too: from PyTorch's global generator or from the loss's own."""
    steps = [make_step(network, load(exported, seed=seed)) for _ in range(2)]
    steps[1] = torch.compile(steps[1], fullgraph=True, backend=compiler)
    for draws in (1, 2):
        eager, compiled = (run(step, network, draws=draws) for step in steps)
        assert same(compiled, eager, tolerance)
    if seed is None:
        assert not same(run(steps[1], network, draws=1), eager, 1e-2)  # other draws are another loss


def test_network_can_be_compiled_alone(exported: Exported, network: nn.Module) -> None:
    loss = load(exported)
    eager = run(make_step(network, loss), network)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    assert same(run(make_step(compiled, loss), network), eager)


def test_two_equal_calls_draw_apart(exported: Exported, network: nn.Module) -> None:
    """A compiler that sees two equal operations on equal inputs would run one of them."""
    loss = load(exported, reduction="none")

    def step(degraded: Tensor, target: Tensor) -> Tensor:
        restored = network(degraded)
        return torch.stack([loss(restored, target), loss(restored, target)])

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    eager = step(*images())
    torch.manual_seed(1)
    found = compiled(*images())
    assert torch.equal(found, eager)
    assert not torch.isclose(found[0], found[1], rtol=1e-3).any()


def test_given_draws_terms_and_no_grad(exported: Exported, network: nn.Module) -> None:
    loss = load(exported, reduction="none")
    degraded, target = images()
    given: dict[str, Any] = {"timesteps": torch.tensor([5, 400, 999]), "noise": torch.randn(3, 3, 16, 16)}

    def step(image: Tensor) -> tuple[Tensor, ...]:
        return loss.terms(network(image), target, **given)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found, expected = compiled(degraded), step(degraded)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert [term.requires_grad for term in found] == [True, False, False]
    with torch.no_grad():
        silent = compiled(degraded)
    assert all(torch.equal(*pair) for pair in zip(silent, expected, strict=True))
    assert not silent[0].requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_gradient_has_the_dtype_of_the_image(exported: Exported, dtype: torch.dtype) -> None:
    loss = load(exported, naturalness_weight=1e3)
    degraded, target = (image.to(dtype) for image in images())

    def gradient(call: Callable[..., Tensor]) -> Tensor:
        torch.manual_seed(0)
        leaf = degraded.clone().requires_grad_()
        (found,) = torch.autograd.grad(call(leaf, target), leaf)
        return found

    compiled = gradient(torch.compile(loss, fullgraph=True, backend="aot_eager"))
    assert compiled.dtype == dtype
    assert torch.equal(compiled, gradient(loss))


def test_batch_sizes_may_vary(exported: Exported, network: nn.Module) -> None:
    step = make_step(network, load(exported))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for count in (2, 3, 6, 1):
        assert same(run(compiled, network, count), run(step, network, count), 1e-6)


def test_weights_may_change_at_every_step_without_recompiling(exported: Exported, network: nn.Module) -> None:
    loss = load(exported)
    step = make_step(network, loss)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    run(compiled, network)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for weights in ((0.5, 0.5), (0.0, 0.25), (0.0, 0.0), (2.0, 0.0)):
            loss.naturalness_weight, loss.semantic_weight = weights
            assert same(run(compiled, network), run(step, network), 1e-6)


def test_graph_and_reference_that_a_compiled_step_is_the_first_to_need(exported: Exported, network: nn.Module) -> None:
    """Both have to be traced, and inside of an operation PyTorch cannot do that."""
    weights = {"naturalness_weight": 0.0, "semantic_weight": 0.0}
    loss = DiffLoss.load(exported[0], "torch", "cpu", **SETTINGS | weights, check_every=1)
    step = make_step(network, loss)
    loss.semantic_weight = 0.5
    evaluator: Any = loss.evaluator
    assert not evaluator.sessions
    compiled = run(torch.compile(step, fullgraph=True, backend="aot_eager"), network)
    assert evaluator.sessions.keys() == evaluator.references.keys() == {SEMANTIC_GRADIENT}
    assert same(compiled, run(step, network))


@pytest.mark.parametrize("seed", [None, 7])
def test_checkpointed_inside(exported: Exported, network: nn.Module, seed: int | None) -> None:
    """The loss is run again in the backward pass: with the same noise."""
    plain, other = (make_step(network, load(exported, seed=seed)) for _ in range(2))

    def step(degraded: Tensor, target: Tensor) -> Tensor:
        total: Tensor = checkpoint(lambda *pair: other(*pair).square(), degraded, target, use_reentrant=False)
        return total

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for draws in (1, 2):
        expected = run(lambda *pair: plain(*pair).square(), network, draws=draws)
        assert same(run(compiled, network, draws=draws), expected, 1e-6)


def test_images_are_checked_when_the_graph_runs(exported: Exported, network: nn.Module) -> None:
    loss = load(exported)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    degraded, target = images()
    compiled(degraded, target)
    with pytest.raises(InputError, match="restored holds NaN or infinite values"):
        compiled(degraded * torch.nan, target)
    with pytest.raises(InputError, match=r"target has values from .* expected about -1 to 1"):
        compiled(degraded, 255 * target)
    with pytest.raises(InputError, match=r"target has shape \[2, 3, 16, 16\]; expected \[3, 3, 16, 16\]"):
        compiled(degraded, target[:2])
    with pytest.raises(InputError, match="timesteps has values from 0 to 1000"):
        compiled(degraded, target, timesteps=torch.tensor([0, 1, 1000]))
    with pytest.raises(InputError, match=r"target requires grad; .*pass target\.detach\(\)"):
        compiled(degraded, target.clone().requires_grad_())
    with pytest.raises(InputError, match=r"noise requires grad; .*pass noise\.detach\(\)"):
        compiled(degraded, target, noise=torch.randn(3, 3, 16, 16).requires_grad_())


def test_a_copy_is_a_loss_of_its_own(exported: Exported, network: nn.Module) -> None:
    loss = load(exported)
    for other in (copy.copy(loss), copy.deepcopy(loss)):
        other.naturalness_weight = 100.0
        compiled = torch.compile(make_step(network, other), fullgraph=True, backend="aot_eager")
        assert same(run(compiled, network), run(make_step(network, other), network))
        assert not same(run(compiled, network), run(make_step(network, loss), network), 1e-2)


def test_a_loss_that_was_compiled_can_be_freed(exported: Exported, network: nn.Module) -> None:
    loss = DiffLoss.load(exported[0], "onnxruntime", "cpu", **SETTINGS)
    evaluator = weakref.ref(loss.evaluator)
    compiled = torch.compile(make_step(network, loss), fullgraph=True, backend="aot_eager")
    run(compiled, network)
    del loss
    gc.collect()
    assert evaluator() is not None
    del compiled
    gc.collect()
    assert evaluator() is None


def test_the_operation_meets_what_torch_asks_of_one(exported: Exported) -> None:
    degraded, target = images()
    given = (torch.tensor([5, 400, 999]), torch.randn(3, 3, 16, 16))
    loss = load(exported)
    operation = torch.ops.diffloss_trt.value_and_gradient.default
    for one_and_all in (images(), images(1)):
        drawn = tuple(tensor[: len(one_and_all[0])] for tensor in given)
        torch.library.opcheck(operation, (*one_and_all, *drawn, torch.empty(0), "", loss._handle))
    del loss
    gc.collect()
    with pytest.raises(BackendError, match="the DiffLoss that this graph was compiled with is gone"):
        operation(degraded, target, *given, torch.empty(0), "", load(exported)._handle - 1)


@pytest.mark.parametrize("case", ["onnxruntime", "torch", "no weights", "skipped"])
def test_the_operation_keeps_the_layout_it_promises(case: str, exported: Exported) -> None:
    """For channels-last images too: compiled code reads the gradient in the layout that it was told of."""
    settings: dict[str, dict[str, Any]] = {
        "onnxruntime": {},
        "torch": {},
        "no weights": {"naturalness_weight": 0.0, "semantic_weight": 0.0},
        "skipped": {"nonfinite": "skip"},
    }
    loss = load(exported, "torch" if case == "torch" else "onnxruntime", **settings[case])
    restored, target = (image.to(memory_format=torch.channels_last) for image in images(4))
    if case == "skipped":
        restored[1, 0, 0, 0] = torch.nan
    *_, gradient = torch.ops.diffloss_trt.value_and_gradient.default(
        restored, target, None, None, torch.empty(0), "", loss._handle
    )
    assert gradient.is_contiguous()


def test_what_is_not_one_graph_says_so(exported: Exported, scheduler: Any) -> None:
    reference = DiffLoss.from_unet(make_unet(dtype=torch.float32), scheduler, **SETTINGS)
    for loss in (reference, load(exported, backward="recompute")):
        with pytest.raises(torch._dynamo.exc.Unsupported, match="a DiffLoss breaks the graph unless"):
            torch.compile(loss, fullgraph=True, backend="eager")(*images())
    with pytest.raises(torch._dynamo.exc.Unsupported, match="a DiffLoss breaks the graph unless"):
        torch.compile(load(exported), fullgraph=True, backend="eager")(*images(), generator=torch.Generator())


@pytest.mark.slow
def test_what_is_not_one_graph_is_right_in_several(exported: Exported, scheduler: Any, network: nn.Module) -> None:
    given: dict[str, Any] = {"timesteps": torch.tensor([5, 400, 999]), "noise": torch.randn(3, 3, 16, 16)}
    reference = DiffLoss.from_unet(make_unet(dtype=torch.float32), scheduler, **SETTINGS)
    for loss in (reference, load(exported, backward="recompute")):

        def step(degraded: Tensor, target: Tensor, loss: DiffLoss = loss) -> Tensor:
            return loss(network(degraded), target, **given)

        assert same(run(torch.compile(step, backend="aot_eager"), network), run(step, network), 1e-5)


@pytest.mark.parametrize("case", ["from_unet", "half", "engine", "torch", "generator", "torch generator"])
def test_what_is_not_one_graph_is_not_compiled(
    case: str, exported: Exported, scheduler: Any, network: nn.Module
) -> None:
    """Of a whole step, backward() included: the compiler that users have gets a UNet's gradient wrong."""
    generator = torch.Generator() if "generator" in case else None
    if case in ("from_unet", "half"):
        unet = make_unet("one_level", dtype=torch.float32 if case == "from_unet" else torch.bfloat16)
        loss = DiffLoss.from_unet(unet, scheduler, **SETTINGS)
    else:
        backend: str = "torch" if "torch" in case else "onnxruntime"
        loss = load(exported, backend, "recompute" if generator is None else "fused")
    compiled: list[Any] = []

    def compiler(module: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        compiled.extend(node.target for node in module.graph.nodes if node.op == "call_function")
        return module.forward

    def step(degraded: Tensor, target: Tensor) -> Tensor:
        restored = network(degraded)
        total = F.mse_loss(restored, target) + loss(restored, target, generator=generator)
        total.backward()
        return total.detach()

    def result(step: Step) -> list[Tensor]:
        torch.manual_seed(3)
        if generator is not None:
            generator.manual_seed(3)
        network.zero_grad()
        total = step(*images())
        return [total, *(parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None)]

    expected = result(step)
    assert same(result(torch.compile(step, backend=compiler)), expected)
    assert [target for target in compiled if "conv" in str(target)] == [torch.conv2d] * 2
    assert F.group_norm not in compiled
    assert len(compiled) < 20
