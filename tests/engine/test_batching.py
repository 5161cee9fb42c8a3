"""Any number of samples through a fixed batch: exactly what each sample gives alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from onnx import helper, numpy_helper
from torch import Tensor

from diffloss_engine.batching import run_batched
from diffloss_engine.bundle import Graph
from diffloss_engine.session import Session, open_session
from diffloss_engine.tensors import TensorSpec
from diffloss_engine.torch_session import TorchSession

CPU = torch.device("cpu")
SIZE = 4
INPUTS = (TensorSpec("image", "float32", (SIZE, 3, 8, 8)), TensorSpec("gain", "float32", (SIZE,)))
OUTPUTS = (TensorSpec("scaled", "float32", (SIZE, 5, 8, 8)), TensorSpec("mean", "float32", (SIZE,)))


@pytest.fixture(scope="module")
def kernel() -> Tensor:
    return torch.randn(5, 3, 3, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["onnxruntime", "torch"])
def session(
    request: pytest.FixtureRequest, tmp_path: Path, kernel: Tensor, save_graph: Callable[..., Graph]
) -> Session:
    """Return a session of batch size 4: scaled = gain * convolution of image; mean = mean of scaled."""
    if request.param == "torch":

        def program(image: Tensor, gain: Tensor) -> tuple[Tensor, ...]:
            scaled = torch.nn.functional.conv2d(image, kernel, padding=1) * gain.view(-1, 1, 1, 1)
            return scaled, scaled.mean((1, 2, 3))

        return TorchSession(program, INPUTS, OUTPUTS, CPU)
    constants = {
        "kernel": kernel.numpy(),
        "shape": torch.tensor([SIZE, 1, 1, 1]).numpy(),
        "axes": torch.tensor([1, 2, 3]).numpy(),
    }
    nodes = [
        helper.make_node("Conv", ["image", "kernel"], ["features"], pads=[1, 1, 1, 1]),
        helper.make_node("Reshape", ["gain", "shape"], ["gains"]),
        helper.make_node("Mul", ["features", "gains"], ["scaled"]),
        helper.make_node("ReduceMean", ["scaled", "axes"], ["mean"], keepdims=0),
    ]
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    path = tmp_path / "batch.onnx"
    save_graph(path, nodes, list(INPUTS), list(OUTPUTS), initializers)
    return open_session(path, INPUTS, OUTPUTS, backend="onnxruntime", device=CPU)


def samples(count: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(count)
    return {
        "image": torch.randn(count, 3, 8, 8, generator=generator),
        "gain": torch.randn(count, generator=generator),
    }


@pytest.mark.parametrize("count", range(1, 10))
def test_any_number_equals_sample_by_sample(session: Session, count: int) -> None:
    inputs = samples(count)
    together = run_batched(session, inputs)
    assert together.keys() == {"scaled", "mean"}
    assert together["scaled"].shape == (count, 5, 8, 8)
    assert together["mean"].shape == (count,)
    for index in range(count):
        # Alone in its batch, as far as a graph of fixed size allows.
        alone = session({name: tensor[index].expand(SIZE, *tensor.shape[1:]) for name, tensor in inputs.items()})
        for name, value in together.items():
            assert torch.equal(value[index], alone[name][0]), (name, index)


@pytest.mark.parametrize("count", range(1, 10))
def test_values_are_right(session: Session, kernel: Tensor, count: int) -> None:
    inputs = samples(count)
    expected = torch.nn.functional.conv2d(inputs["image"], kernel, padding=1) * inputs["gain"].view(-1, 1, 1, 1)
    assert torch.allclose(run_batched(session, inputs)["scaled"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("count", "calls"), [(1, 1), (3, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_no_more_batches_than_needed_and_no_foreign_values(count: int, calls: int) -> None:
    seen: list[Tensor] = []

    def program(image: Tensor) -> tuple[Tensor, ...]:
        seen.append(image)
        return (image + 1,)

    spec = TensorSpec("x", "float32", (SIZE, 2))
    session = TorchSession(program, [spec], [TensorSpec("y", "float32", (SIZE, 2))], CPU)
    x = torch.randn(count, 2)
    assert torch.equal(run_batched(session, {"x": x})["y"], x + 1)
    assert len(seen) == calls
    # What fills a batch up is the last sample: zeros could be values that the network cannot take.
    filled = torch.cat(seen)
    assert torch.equal(filled[:count], x)
    assert torch.equal(filled[count:], x[-1:].expand(len(filled) - count, 2))
