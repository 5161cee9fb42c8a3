"""What can be seen of running plans without a GPU: by TensorRT's own lean runtime and by TensorRT-RTX."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="is for machines without a GPU")


@no_gpu
def test_a_runtime_that_cannot_be_made_is_an_error() -> None:
    """TensorRT's binding returns an object nevertheless, and dies when that is called; so in a process of its own."""
    pytest.importorskip("tensorrt_lean_bindings", reason="TensorRT's lean runtime is not installed")
    program = (
        "import tensorrt_lean_bindings as trt\n"
        "from diffloss_engine import BackendUnavailableError\n"
        "from diffloss_engine.trt_build import make_runtime, recording_logger\n"
        "try:\n"
        "    make_runtime(trt, recording_logger(trt)).deserialize_cuda_engine(b'no plan')\n"
        "except BackendUnavailableError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0
    assert "does not work here: " in done.stdout
    assert "CUDA" in done.stdout


@pytest.mark.parametrize("module", ["tensorrt_lean_bindings", "tensorrt_rtx"])
def test_every_call_that_runs_a_plan_is_there(module: str) -> None:
    """A method that a version has lost would be found on a GPU only."""
    trt = pytest.importorskip(module)
    for owner, names in (
        (trt.Runtime, ["deserialize_cuda_engine"]),
        (
            trt.ICudaEngine,
            [
                "create_execution_context",
                "device_memory_size_v2",
                "get_tensor_dtype",
                "get_tensor_mode",
                "get_tensor_name",
                "get_tensor_shape",
                "num_io_tensors",
            ],
        ),
        (trt.IExecutionContext, ["execute_async_v3", "profiler", "set_device_memory", "set_tensor_address"]),
        (trt.IProfiler, ["report_layer_time"]),
        (trt.ExecutionContextAllocationStrategy, ["USER_MANAGED"]),
        (trt.TensorIOMode, ["INPUT", "OUTPUT"]),
        (trt.DataType, ["FLOAT", "HALF", "BF16", "INT64", "INT32", "BOOL"]),
        (trt.DataType.HALF, ["itemsize"]),
        (trt, ["volume"]),
    ):
        assert [name for name in names if not hasattr(owner, name)] == []


def test_version_of_the_lean_runtime_is_one_that_is_taken() -> None:
    trt = pytest.importorskip("tensorrt_lean_bindings")
    major, minor = (int(part) for part in trt.__version__.split(".")[:2])
    assert (10, 12) <= (major, minor) < (12, 0)
