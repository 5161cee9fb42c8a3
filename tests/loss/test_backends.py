"""Parity of every backend, on the CPU and on a GPU: value and gradient of a bundle's loss against float64."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from diffloss_engine.bundle import Bundle
from diffloss_engine.errors import BackendUnavailableError, InputError
from diffloss_trt import DiffLoss, NoiseSchedule
from diffloss_trt.contract import SCHEDULE
from diffloss_trt.probe import Probe, held_to
from diffloss_trt.tolerances import DIFFERENCE
from diffloss_trt.unet import reload_unet
from exports import Exported, Once

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BACKENDS = ("onnxruntime", "onnxruntime-tensorrt", "tensorrt", "tensorrt-rtx", "inductor", "torch")
PRECISIONS = ("fp32", "fp16", "bf16")
# ONNX Runtime has no bf16 kernels for CPUs.
ON_CPU = [("onnxruntime", "fp32"), ("onnxruntime", "fp16"), *((name, p) for name in BACKENDS[4:] for p in PRECISIONS)]
ON_GPU = [(backend, precision) for backend in BACKENDS for precision in PRECISIONS]
# Compiling takes minutes each.
SLOW = {("inductor", precision) for precision in PRECISIONS}
PLACES = [
    *(pytest.param(CPU, *case, marks=[pytest.mark.slow] if case in SLOW else []) for case in ON_CPU),
    *(pytest.param(CUDA, *case, marks=pytest.mark.gpu) for case in ON_GPU),
]
every_backend = pytest.mark.parametrize(("device", "backend", "precision"), PLACES)

WEIGHTS = (1e-3, 1e-6)


@pytest.fixture(scope="module", autouse=True)
def plans(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Keep what is built in $DIFFLOSS_CACHE, or else in a cache of these tests' own, never in the user's."""
    with pytest.MonkeyPatch.context() as patch:
        if not os.environ.get("DIFFLOSS_CACHE"):
            patch.setenv("DIFFLOSS_CACHE", str(tmp_path_factory.mktemp("plans")))
        yield


@pytest.fixture(scope="module")
def bundle_of(once: Once) -> Callable[[str], Bundle]:
    """(precision) -> a bundle of batch 2."""
    # What lies between levels, too, where nothing else runs it.
    kind = "two_levels" if torch.cuda.is_available() else "one_level"
    return functools.cache(lambda precision: Exported.of(once, kind, precision).bundle)


@pytest.fixture(scope="module")
def loss_of(bundle_of: Callable[[str], Bundle]) -> Callable[[torch.device, str, str], DiffLoss]:
    """(device, backend, precision) -> the loss; the test is skipped if the backend is not installed."""

    @functools.cache
    def loss_of(device: torch.device, backend: str, precision: str) -> DiffLoss:
        try:
            return DiffLoss.load(bundle_of(precision).path, backend, device, *WEIGHTS, value_range=(-1, 1))
        except BackendUnavailableError as error:
            if device == CPU:
                raise
            pytest.skip(str(error))

    return loss_of


def probe(count: int = 2) -> Probe:
    timesteps = torch.tensor([400, 20, 90, 700, 999])[:count]
    return Probe.make(3, (16, 16), timesteps, [35.0] * count)


def step(loss: DiffLoss, probe: Probe, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return value and gradient, on the CPU."""
    restored, target, noise = (x.to(loss.device, dtype) for x in (probe.restored, probe.target, probe.noise))
    restored.requires_grad_()
    total = loss.terms(restored, target, noise=noise, timesteps=probe.timesteps.to(loss.device)).total
    (gradient,) = torch.autograd.grad(total.sum(), restored)
    return total.detach().cpu().double(), gradient.cpu().double()


def expected(bundle: Bundle, probe: Probe, edit: Callable[[Any], None] = lambda _: None) -> tuple[Tensor, Tensor]:
    """Return value and gradient of the stored weights in float64."""
    unet = reload_unet(bundle, torch.float64, CPU)
    edit(unet)
    schedule = NoiseSchedule.from_json(bundle.read_json(SCHEDULE))
    loss = DiffLoss.from_unet(
        unet, schedule, naturalness_weight=WEIGHTS[0], semantic_weight=WEIGHTS[1], value_range=(-1, 1)
    )
    return step(loss, probe, torch.float64)


def errors(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Return the worst sample's relative error of value and of gradient."""
    value = ((found[0] - wanted[0]).abs() / wanted[0]).max()
    gradient = ((found[1] - wanted[1]).flatten(1).norm(dim=1) / wanted[1].flatten(1).norm(dim=1)).max()
    return float(value), float(gradient)


@every_backend
@pytest.mark.parametrize("count", [1, 2, 5])
def test_value_and_gradient(
    device: torch.device,
    backend: str,
    precision: str,
    count: int,
    loss_of: Callable[..., DiffLoss],
    bundle_of: Callable[[str], Bundle],
) -> None:
    """With any number of images; the bundle takes two at once."""
    loss, bundle, images = loss_of(device, backend, precision), bundle_of(precision), probe(count)
    assert (loss.evaluator.backend, loss.evaluator.backward) == (backend, "fused")
    tolerance = DIFFERENCE[held_to(loss.evaluator, bundle)]
    found = step(loss, images)
    value, gradient = errors(found, expected(bundle, images))
    assert value <= tolerance.term
    assert gradient <= tolerance.gradient

    def perturb(unet: Any) -> None:
        unet.conv_in.weight.data.mul_(2)

    value, gradient = errors(found, expected(bundle, images, perturb))
    assert value > tolerance.term
    assert gradient > tolerance.gradient


@every_backend
def test_images_that_are_equal(
    device: torch.device, backend: str, precision: str, loss_of: Callable[..., DiffLoss]
) -> None:
    images = probe()
    equal = Probe(images.target, images.target, images.noise, images.timesteps)
    value, gradient = step(loss_of(device, backend, precision), equal)
    assert not value.any()
    assert not gradient.any()


@every_backend
def test_strides_autocast_and_threads_change_nothing(
    device: torch.device, backend: str, precision: str, loss_of: Callable[..., DiffLoss]
) -> None:
    loss, images = loss_of(device, backend, precision), probe()
    wanted = step(loss, images)

    def same(found: tuple[Tensor, Tensor]) -> bool:
        return all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))

    assert same(step(loss, images))
    target, restored, noise = (
        x.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1) for x in (images.target, images.restored, images.noise)
    )
    assert same(step(loss, Probe(target, restored, noise, images.timesteps)))
    with torch.autocast(device.type, torch.bfloat16):
        assert same(step(loss, images))
    found: list[tuple[Tensor, Tensor]] = []
    threads = [threading.Thread(target=lambda: found.append(step(loss, images))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(map(same, found))


@every_backend
def test_what_was_returned_is_left_alone(
    device: torch.device, backend: str, precision: str, loss_of: Callable[..., DiffLoss]
) -> None:
    """By later calls; and what was given, by all of them."""
    loss, images = loss_of(device, backend, precision), probe()
    restored, target, noise = (x.to(device, torch.float32) for x in (images.restored, images.target, images.noise))
    timesteps = images.timesteps.to(device)
    given = [x.clone() for x in (restored, target, noise, timesteps)]

    def run(image: Tensor) -> tuple[Tensor, ...]:
        leaf = image.clone().requires_grad_()
        terms = loss.terms(leaf, target, noise=noise, timesteps=timesteps)
        return (*(term.detach() for term in terms), *torch.autograd.grad(terms.total.sum(), leaf))

    first = run(restored)
    kept = [result.clone() for result in first]
    second = run(target.lerp(restored, 0.5))
    assert all(map(torch.equal, first, kept))
    assert not any(map(torch.equal, first, second))
    pointers = {x.data_ptr() for x in (restored, target, noise, timesteps, *first, *second)}
    assert len(pointers) == 4 + len(first) + len(second)
    assert all(map(torch.equal, (restored, target, noise, timesteps), given))


on_gpu = pytest.mark.parametrize(
    ("backend", "precision"), [pytest.param(*case, marks=pytest.mark.gpu) for case in ON_GPU]
)


@on_gpu
def test_side_streams(backend: str, precision: str, loss_of: Callable[..., DiffLoss]) -> None:
    """Inputs that are still being computed when the loss is called, and two calls in flight."""
    loss, images = loss_of(CUDA, backend, precision), probe()
    wanted = step(loss, images)
    found: list[tuple[Tensor, Tensor]] = []
    streams = [torch.cuda.Stream() for _ in range(2)]
    busy = torch.ones(4096, 4096, device=CUDA)
    torch.cuda.synchronize()  # the streams wait for nothing that was made before
    for stream in streams:
        with torch.cuda.stream(stream):
            delay = (busy @ busy)[0, 0] * 0
            restored, target, noise = (
                x.to(CUDA, torch.float32) + delay for x in (images.restored, images.target, images.noise)
            )
            restored = restored.detach().requires_grad_()
            total = loss.terms(restored, target, noise=noise, timesteps=images.timesteps.to(CUDA)).total
            (gradient,) = torch.autograd.grad(total.sum(), restored)
            found.append((total.detach(), gradient))
    torch.cuda.synchronize()
    for value, gradient in found:
        assert torch.equal(value.cpu().double(), wanted[0])
        assert torch.equal(gradient.cpu().double(), wanted[1])


@on_gpu
@pytest.mark.parametrize("count", [2, 5])
def test_a_cuda_graph_captures_the_whole_step(
    backend: str, precision: str, count: int, loss_of: Callable[..., DiffLoss]
) -> None:
    loss, images = loss_of(CUDA, backend, precision), probe(count)
    wanted = step(loss, images)
    restored, target, noise = (x.to(CUDA, torch.float32) for x in (images.restored, images.target, images.noise))
    timesteps = images.timesteps.to(CUDA)
    # What is captured runs on other images, and then on these.
    leaf = torch.zeros_like(restored).requires_grad_()

    def run() -> tuple[Tensor, Tensor]:
        total = loss.terms(leaf, target, noise=noise, timesteps=timesteps).total
        (gradient,) = torch.autograd.grad(total.sum(), leaf)
        return total.detach(), gradient

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value, gradient = run()
    with torch.no_grad():
        leaf.copy_(restored)
    for _ in range(3):  # what a replay reads from the host must be there at the next one too
        graph.replay()
        step(loss, images)
        value.zero_()
        gradient.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert errors((value.cpu().double(), gradient.cpu().double()), wanted) == pytest.approx((0, 0), abs=1e-6)


@on_gpu
def test_recorded_as_a_cuda_graph(
    backend: str, precision: str, loss_of: Callable[..., DiffLoss], bundle_of: Callable[[str], Bundle]
) -> None:
    loss = loss_of(CUDA, backend, precision)
    recorded = DiffLoss.load(bundle_of(precision).path, backend, CUDA, *WEIGHTS, value_range=(-1, 1), cuda_graph=True)
    for count in (1, 2, 5):
        wanted = step(loss, probe(count))
        assert errors(step(recorded, probe(count)), wanted) == pytest.approx((0, 0), abs=1e-6)
    found, streams = [], [torch.cuda.Stream() for _ in range(2)]
    for stream in streams:
        with torch.cuda.stream(stream):
            found.append(step(recorded, probe(5)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_cuda_graph_wants_a_gpu_and_an_engine(bundle_of: Callable[[str], Bundle]) -> None:
    with pytest.raises(InputError, match="cuda_graph needs a CUDA device and backward='fused'"):
        DiffLoss.load(bundle_of("fp32").path, "onnxruntime", CPU, cuda_graph=True)


@on_gpu
def test_memory_does_not_grow(backend: str, precision: str, loss_of: Callable[..., DiffLoss]) -> None:
    loss, images = loss_of(CUDA, backend, precision), probe()
    for _ in range(5):
        step(loss, images)
    torch.cuda.synchronize()
    free, _ = torch.cuda.mem_get_info()
    for _ in range(1000):
        step(loss, images)
    torch.cuda.synchronize()
    assert torch.cuda.mem_get_info()[0] >= free - 2**20
