"""Plans on a GPU, and what can be seen without one: by TensorRT's own lean runtime and by TensorRT-RTX."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffloss_engine import DTYPES, BackendError, BackendUnavailableError, Graph
from diffloss_engine.plan_cache import PlanCache
from diffloss_engine.tensors import concrete_device
from diffloss_engine.trt_build import build_addition, build_plan, make_runtime, recording_logger
from diffloss_engine.trt_session import RefusedPlanError, TrtSession, kept_or_built, open_kept_or_built

SaveConv = Callable[[Path, str], Graph]
CUDA = torch.device("cuda")

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


@pytest.mark.parametrize("said", ["CUDA initialization failure with error: 35", None])
def test_a_binding_that_raises_says_why(said: str | None) -> None:
    """As that of TensorRT 10.14 does, of which no library can be had without NVIDIA's index."""
    trt = pytest.importorskip("tensorrt_lean_bindings", reason="TensorRT's lean runtime is not installed")

    def make(logger: Any) -> None:
        if said:
            logger.log(trt.ILogger.ERROR, said)
        raise TypeError("pybind11::init(): factory function returned nullptr")

    broken = ModuleType("tensorrt")
    broken.__dict__.update(__version__="10.14.1", ILogger=trt.ILogger, Runtime=make, Builder=make)
    for work in (lambda: make_runtime(broken, recording_logger(broken)), lambda: build_addition(broken)):
        with pytest.raises(
            BackendUnavailableError, match=rf"^tensorrt 10\.14\.1 does not work here: {said or 'it gave no reason'}$"
        ):
            work()


def test_a_plan_of_other_options_is_used_and_never_rebuilt_without_them(tmp_path: Path) -> None:
    cache = PlanCache(tmp_path / "plans")
    key = {"graph": "a" * 64, "options": {"optimization_level": None}}
    other = key | {"options": {"optimization_level": 5}}
    assert kept_or_built(cache, key, lambda: b"by default", capability="8.0") == (key, b"by default")
    cache.get(other, lambda: b"chosen")
    assert kept_or_built(cache, key, lambda: b"", capability="8.0") == (other, b"chosen")
    (plan,) = (plan for plan in cache.folder.glob("*.plan") if b"chosen" in plan.read_bytes())
    plan.write_bytes(plan.read_bytes().replace(b"chosen", b"broken"))
    assert kept_or_built(cache, key, lambda: b"", capability="8.0") == (key, b"by default")
    assert cache.list_keys() == [key]


def test_a_plan_that_is_refused_makes_way_for_the_next(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = PlanCache(tmp_path / "plans")
    key = {"graph": "a" * 64, "options": {"optimization_level": None}}
    cache.get(key, lambda: b"of another driver")
    cache.get(key | {"options": {"optimization_level": 5}}, lambda: b"of another driver, too")

    def load(plan: bytes | memoryview) -> bytes:
        if bytes(plan) != b"new":
            raise RefusedPlanError(f"refused {bytes(plan).decode()}")
        return b"loaded"

    assert open_kept_or_built(cache, key, lambda: b"new", load, capability="8.0") == b"loaded"
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
        "refused of another driver, too",
        "refused of another driver",
    ]
    assert cache.list_keys() == [key]
    assert cache.find(key) == b"new"
    assert len(list(cache.folder.glob("*.rejected"))) == 2
    # What was built now would be built in vain again.
    with pytest.raises(RefusedPlanError, match="refused broken"):
        open_kept_or_built(cache, key | {"graph": "b" * 64}, lambda: b"broken", load, capability="8.0")


AMPERE = {"name": "A100", "compute_capability": "8.0"}
ADA = {"name": "L40", "compute_capability": "8.9"}
TURING = {"name": "T4", "compute_capability": "7.5"}


@pytest.mark.parametrize(
    ("options", "changes", "serves"),
    [
        ({}, {"version": "11.5.0"}, False),
        ({}, {"gpu": ADA}, False),
        ({"version_compatible": True}, {"version": "11.5.0"}, True),
        ({"version_compatible": True}, {"version": "11.3.9"}, False),
        ({"version_compatible": True}, {"version": "12.0.0"}, False),
        ({"version_compatible": True}, {"gpu": ADA}, False),
        ({"version_compatible": True}, {"version": "11.5.0", "precision": "bf16"}, False),
        ({"hardware_compatibility": "ampere-plus"}, {"gpu": ADA}, True),
        ({"hardware_compatibility": "ampere-plus"}, {"gpu": TURING}, False),
        ({"hardware_compatibility": "ampere-plus"}, {"version": "11.5.0"}, False),
        ({"hardware_compatibility": "same-compute-capability"}, {"gpu": AMPERE | {"name": "A30"}}, True),
        ({"hardware_compatibility": "same-compute-capability"}, {"gpu": ADA}, False),
        ({"hardware_compatibility": "ampere-plus"}, {"flavour": "tensorrt-rtx", "version": "1.7", "gpu": None}, False),
        ({"version_compatible": True}, {"flavour": "inductor", "version": None, "torch": "2.13.0"}, False),
        # The GPU here has 8.0; of TensorRT-RTX the options alone say what a plan is for.
        ({"compute_capabilities": []}, {}, True),
        ({"compute_capabilities": ["8.0"]}, {}, True),
        ({"compute_capabilities": ["7.5", "8.0"]}, {}, True),
        ({"compute_capabilities": ["12.0"]}, {}, False),
        ({"compute_capabilities": ["8.6", "8.9"]}, {}, False),
    ],
)
def test_a_plan_serves_where_it_was_built_to(
    options: dict[str, Any], changes: dict[str, Any], serves: bool, tmp_path: Path
) -> None:
    cache = PlanCache(tmp_path / "plans")
    key = {"graph": "a" * 64, "flavour": "tensorrt", "version": "11.4.1.7", "gpu": AMPERE, "precision": "fp16"}
    key |= {"options": options}
    cache.get(key, lambda: b"portable")
    wanted = key | {"options": {}} | changes
    used = kept_or_built(cache, wanted, lambda: b"own", capability="8.0")
    assert used == ((key, b"portable") if serves else (wanted, b"own"))
    # What does not serve here is left to where it does.
    assert cache.find(key) == b"portable"


@pytest.mark.parametrize("module", ["tensorrt_lean_bindings", "tensorrt_rtx"])
def test_every_call_that_runs_a_plan_is_there(module: str) -> None:
    """A method that a version has lost would be found on a GPU only."""
    trt = pytest.importorskip(module)
    for owner, names in (
        (trt.Runtime, ["deserialize_cuda_engine", "engine_host_code_allowed"]),
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


def test_the_inspector_is_there() -> None:
    """In TensorRT-RTX; the lean runtime leaves it out."""
    trt = pytest.importorskip("tensorrt_rtx")
    assert hasattr(trt.ICudaEngine, "create_engine_inspector")
    assert hasattr(trt.EngineInspector, "get_engine_information")
    assert hasattr(trt.LayerInformationFormat, "JSON")


def test_version_of_the_lean_runtime_is_one_that_is_taken() -> None:
    trt = pytest.importorskip("tensorrt_lean_bindings")
    major, minor = (int(part) for part in trt.__version__.split(".")[:2])
    assert (10, 12) <= (major, minor) < (12, 0)


def open_conv(folder: Path, graph: Graph, flavour: str, precision: str) -> TrtSession:
    plan = build_plan(folder / graph.file, flavour=flavour, precision=precision)
    return TrtSession(plan, graph.inputs, graph.outputs, flavour=flavour, device=CUDA, precision=precision)


def sample(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {"image": torch.randn(2, 3, 8, 8, device=CUDA).to(dtype), "gain": torch.tensor([1.5], device=CUDA).to(dtype)}


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "precision"), [("float32", "fp32"), ("float16", "fp16"), ("bfloat16", "bf16")])
def test_values_are_right(
    dtype: str, precision: str, flavour: str, tmp_path: Path, save_conv: SaveConv, kernel: tuple[Tensor, Tensor]
) -> None:
    session = open_conv(tmp_path, save_conv(tmp_path, dtype), flavour, precision)
    assert (session.backend, session.device) == (flavour, concrete_device(CUDA))
    inputs = sample(DTYPES[dtype].torch)
    outputs = session(inputs)
    assert {tensor.dtype for tensor in outputs.values()} == {DTYPES[dtype].torch}
    weight, bias = (tensor.to(CUDA, DTYPES[dtype].torch).double() for tensor in kernel)
    expected = F.conv2d(inputs["image"].double(), weight, bias, padding=1)
    tolerance = {"fp32": 1e-5, "fp16": 5e-3, "bf16": 4e-2}[precision]
    torch.testing.assert_close(outputs["features"].double(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(outputs["scaled"].double(), expected * 1.5, atol=2 * tolerance, rtol=tolerance)


@pytest.mark.gpu
def test_any_strided_tensor_is_taken_and_left_alone(flavour: str, tmp_path: Path, save_conv: SaveConv) -> None:
    session = open_conv(tmp_path, save_conv(tmp_path, "float32"), flavour, "fp32")
    inputs = sample()
    expected = session(inputs)["features"]
    image = inputs["image"]
    odd = torch.empty(image.numel() + 1, device=CUDA)[1:].view_as(image).copy_(image)
    for same in (image.to(memory_format=torch.channels_last), odd, torch.complex(image, -image).conj().imag):
        before, strides = same.clone(), same.stride()
        assert torch.equal(session({**inputs, "image": same})["features"], expected)
        assert torch.equal(same, before)
        assert same.stride() == strides


@pytest.mark.gpu
def test_two_calls_share_no_memory(flavour: str, tmp_path: Path, save_conv: SaveConv) -> None:
    session = open_conv(tmp_path, save_conv(tmp_path, "float32"), flavour, "fp32")
    inputs = sample()
    first = session(inputs)
    kept = {name: tensor.clone() for name, tensor in first.items()}
    second = session({**inputs, "image": inputs["image"] + 1})
    assert len({tensor.data_ptr() for tensor in (*inputs.values(), *first.values(), *second.values())}) == 6
    assert all(torch.equal(first[name], kept[name]) for name in kept)
    assert not torch.equal(first["features"], second["features"])
    session.close()
    session.close()
    with pytest.raises(BackendError, match="closed"):
        session(inputs)


@pytest.mark.gpu
def test_what_is_not_a_plan_of_these_tensors(flavour: str, tmp_path: Path, save_conv: SaveConv) -> None:
    graph = save_conv(tmp_path, "float32")
    plan = build_plan(tmp_path / graph.file, flavour=flavour, precision="fp32")
    image, gain = graph.inputs
    wrong = (replace(image, name="picture"), gain)
    with pytest.raises(BackendUnavailableError, match=r"the plan has the tensors .*image.* expected .*picture"):
        TrtSession(plan, wrong, graph.outputs, flavour=flavour, device=CUDA, precision="fp32")
    with pytest.raises(BackendUnavailableError, match="refuses the plan"):
        TrtSession(b"no plan", graph.inputs, graph.outputs, flavour=flavour, device=CUDA, precision="fp32")
