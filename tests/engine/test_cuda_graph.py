"""Sessions recorded as CUDA graphs, here PyTorch programs; those of every backend are in tests/loss."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from diffloss_engine import BackendError, InputError, TensorSpec, TorchSession
from diffloss_engine.cuda_graph import GraphedSession

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
X, Y = TensorSpec("x", "float32", (4, 8)), TensorSpec("y", "float32", (4, 8))


def sample() -> dict[str, Tensor]:
    return {"x": torch.randn(4, 8, device=CUDA)}


@pytest.fixture
def recorded() -> GraphedSession:
    """y = 3 x + 1."""
    return GraphedSession(TorchSession(lambda x: (3 * x + 1,), [X], [Y], CUDA))


def test_it_runs_on_what_it_is_given(recorded: GraphedSession) -> None:
    assert (recorded.backend, recorded.inputs, recorded.outputs) == ("torch", (X,), (Y,))
    for _ in range(3):
        inputs = sample()
        before = inputs["x"].clone()
        assert torch.equal(recorded(inputs)["y"], 3 * inputs["x"] + 1)
        assert torch.equal(inputs["x"], before)
    with pytest.raises(InputError, match="named"):
        recorded({})


def test_two_calls_share_no_memory(recorded: GraphedSession) -> None:
    first = recorded(sample())["y"]
    kept = first.clone()
    second = recorded(sample())["y"]
    assert torch.equal(first, kept)
    assert not torch.equal(first, second)


def test_calls_on_two_streams_wait_for_each_other(recorded: GraphedSession) -> None:
    """There is one set of inputs and outputs; the first call is held up until the second has been made."""
    first, second = sample(), sample()
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    found = []
    for stream, inputs in zip(streams, (first, second), strict=True):
        with torch.cuda.stream(stream):
            if inputs is first:
                torch.cuda._sleep(100_000_000)
            found.append(recorded(inputs)["y"])
    torch.cuda.synchronize()
    for inputs, result in zip((first, second), found, strict=True):
        assert torch.equal(result, 3 * inputs["x"] + 1)


def test_a_capture_around_it_is_left_its_own(recorded: GraphedSession) -> None:
    inputs = sample()
    recorded(inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = recorded(inputs)["y"]
    inputs["x"].copy_(torch.randn_like(inputs["x"]))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(result, 3 * inputs["x"] + 1)


def test_closed_with_what_it_recorded(recorded: GraphedSession) -> None:
    result = recorded(sample())["y"]
    recorded.close()
    recorded.close()
    assert result.isfinite().all()
    with pytest.raises(BackendError, match="closed"):
        recorded(sample())


def test_what_waits_for_the_gpu_cannot_be_recorded() -> None:
    """In a process of its own: where a capture fails, PyTorch's allocator may believe for ever that it goes on."""
    program = (
        "import torch\n"
        "from diffloss_engine import BackendError, TensorSpec, TorchSession\n"
        "from diffloss_engine.cuda_graph import GraphedSession\n"
        "x, y = (TensorSpec(name, 'float32', (4, 8)) for name in 'xy')\n"
        "session = TorchSession(lambda x: (x * float(x.sum()),), [x], [y], torch.device('cuda'))\n"
        "before = torch.cuda.current_stream()\n"
        "try:\n"
        "    GraphedSession(session)\n"
        "except BackendError as error:\n"
        "    print(error, torch.cuda.current_stream() == before)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "torch cannot be recorded as a CUDA graph" in done.stdout, done.stderr
    assert done.stdout.strip().endswith("True")
