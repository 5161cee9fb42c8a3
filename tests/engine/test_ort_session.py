from __future__ import annotations

import functools
import gc
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor
from torch.nn import functional as F

from diffloss_engine import (
    DTYPES,
    BackendError,
    BackendUnavailableError,
    BundleError,
    DiffLossError,
    Graph,
    InputError,
    InputTypeError,
    TensorSpec,
)
from diffloss_engine.ort_session import OrtSession
from forked import forks, run_forked

CPU = torch.device("cpu")
Kernel = tuple[Tensor, Tensor]
SaveConv = Callable[[Path, str], Graph]
SaveGraph = Callable[..., Graph]
TOLERANCES = {"float32": 1e-5, "float16": 5e-3}


def open_graph(folder: Path, graph: Graph, device: torch.device = CPU) -> OrtSession:
    return OrtSession(folder / graph.file, graph.inputs, graph.outputs, device=device)


@pytest.fixture
def conv(tmp_path: Path, save_conv: SaveConv) -> OrtSession:
    return open_graph(tmp_path, save_conv(tmp_path, "float32"))


def sample(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {"image": torch.randn(2, 3, 8, 8).to(dtype), "gain": torch.tensor([1.5], dtype=dtype)}


def expected(kernel: Kernel, inputs: dict[str, Tensor]) -> Tensor:
    """The convolution of the image, in float64."""
    weight, bias = (tensor.to(inputs["image"].dtype).double() for tensor in kernel)
    return F.conv2d(inputs["image"].detach().cpu().double(), weight, bias, padding=1)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_values_are_right(tmp_path: Path, save_conv: SaveConv, kernel: Kernel, dtype: str) -> None:
    graph = save_conv(tmp_path, dtype)
    session = open_graph(tmp_path, graph)
    inputs = sample(DTYPES[dtype].torch)
    outputs = session(inputs)
    assert {name: TensorSpec.of(name, tensor) for name, tensor in outputs.items()} == {
        spec.name: spec for spec in graph.outputs
    }
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(outputs["features"].double(), expected(kernel, inputs), atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(outputs["scaled"], outputs["features"] * 1.5, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_passes_through(tmp_path: Path, save_graph: SaveGraph, dtype: str) -> None:
    nodes = [helper.make_node("Identity", ["x"], ["y"])]
    graph = save_graph(tmp_path / "g.onnx", nodes, [TensorSpec("x", dtype, (2, 3))], [TensorSpec("y", dtype, (2, 3))])
    x = torch.randn(2, 3).mul(9).to(DTYPES[dtype].torch)
    assert torch.equal(open_graph(tmp_path, graph)({"x": x})["y"], x)


def test_bfloat16_goes_in_and_out(tmp_path: Path, save_graph: SaveGraph) -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Exp", ["wide"], ["y"]),
        helper.make_node("Cast", ["y"], ["z"], to=TensorProto.BFLOAT16),
    ]
    graph = save_graph(
        tmp_path / "g.onnx",
        nodes,
        [TensorSpec("x", "bfloat16", (4,))],
        [TensorSpec("y", "float32", (4,)), TensorSpec("z", "bfloat16", (4,))],
    )
    x = torch.tensor([-1.0, 0.0, 0.5, 3.0], dtype=torch.bfloat16)
    outputs = open_graph(tmp_path, graph)({"x": x})
    torch.testing.assert_close(outputs["y"], x.float().exp())
    assert torch.equal(outputs["z"], outputs["y"].bfloat16())


def test_scalars_and_order_of_names(tmp_path: Path, save_graph: SaveGraph) -> None:
    scalar = [TensorSpec(name, "float32", ()) for name in "ab"]
    nodes = [helper.make_node("Sub", ["a", "b"], ["y"])]
    graph = save_graph(tmp_path / "g.onnx", nodes, scalar, [TensorSpec("y", "float32", ())])
    session = OrtSession(tmp_path / graph.file, scalar[::-1], graph.outputs, device=CPU)
    assert session({"b": torch.tensor(1.0), "a": torch.tensor(4.0)})["y"] == 3


def test_only_onnx_is_read(tmp_path: Path, save_conv: SaveConv) -> None:
    """ONNX Runtime has a format of its own, known by the end of a name, which no check of a graph looks through."""
    graph = save_conv(tmp_path, "float32")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "conv.ort")
    onnxruntime.InferenceSession(tmp_path / graph.file, options, providers=["CPUExecutionProvider"])
    assert (tmp_path / "conv.ort").read_bytes()[4:8] == b"ORTM"
    with pytest.raises(BundleError, match="cannot be read by ONNX Runtime"):
        open_graph(tmp_path, replace(graph, file="conv.ort"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and limits the address space")
def test_neither_inputs_nor_outputs_are_copied(tmp_path: Path, save_graph: SaveGraph) -> None:
    import resource

    count, spare = 64 * 1024 * 1024, 128 * 1024 * 1024
    specs = [TensorSpec(name, "float32", (count,)) for name in "xy"]
    graph = save_graph(tmp_path / "g.onnx", [helper.make_node("Neg", ["x"], ["y"])], specs[:1], specs[1:])
    session = open_graph(tmp_path, graph)
    x = torch.ones(count)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    # Room for the output that torch allocates, and not for a copy of it or of the input.
    resource.setrlimit(resource.RLIMIT_AS, (used + x.nbytes + spare, hard))
    try:
        y = session({"x": x})["y"]
        with pytest.raises(RuntimeError, match="memory"):
            x.clone()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert torch.equal(y, -x)


def test_two_calls_share_no_memory(conv: OrtSession) -> None:
    inputs = sample()
    first = conv(inputs)
    kept = {name: tensor.clone() for name, tensor in first.items()}
    second = conv({**inputs, "image": inputs["image"] + 1})
    pointers = {tensor.data_ptr() for tensor in (*inputs.values(), *first.values(), *second.values())}
    assert len(pointers) == 6
    assert all(torch.equal(first[name], kept[name]) for name in kept)
    assert not torch.equal(first["features"], second["features"])


@pytest.mark.parametrize(
    "rearrange",
    [
        lambda image: image.to(memory_format=torch.channels_last),
        lambda image: image.permute(0, 1, 3, 2),
        lambda image: image.flip(-1)[:, :, :, :1].expand(2, 3, 8, 8),
        lambda image: torch.cat([image, image], dim=3)[..., 3:11],
        lambda image: torch.cat([image.new_zeros(1), image.flatten()])[1:].view_as(image),
        lambda image: torch.complex(image, image).conj().imag,
        lambda image: torch.nn.Parameter(image),
    ],
    ids=["channels_last", "transposed", "expanded", "window", "odd address", "negated", "parameter"],
)
def test_any_strided_tensor_is_taken_and_left_alone(
    conv: OrtSession, kernel: Kernel, rearrange: Callable[[Tensor], Tensor]
) -> None:
    inputs = sample()
    inputs["image"] = rearrange(inputs["image"])
    before, strides = inputs["image"].detach().clone(), inputs["image"].stride()
    outputs = conv(inputs)
    torch.testing.assert_close(outputs["features"].double(), expected(kernel, inputs), atol=1e-5, rtol=1e-5)
    assert torch.equal(inputs["image"], before)
    assert inputs["image"].stride() == strides


def test_lazily_negated_tensor_keeps_its_sign(conv: OrtSession) -> None:
    inputs = sample()
    negated = torch.complex(inputs["gain"], inputs["gain"]).conj().imag
    assert negated.is_neg()
    assert negated.is_contiguous()
    torch.testing.assert_close(conv({**inputs, "gain": negated})["scaled"], -conv(inputs)["scaled"])


def test_no_gradient_flows_through(conv: OrtSession) -> None:
    inputs = sample()
    outputs = conv({**inputs, "image": inputs["image"].requires_grad_()})
    assert not any(tensor.requires_grad for tensor in outputs.values())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"noise": torch.zeros(1)}, InputError, r"expected \['gain', 'image'\]"),
        ({"image": torch.zeros(2, 3, 8, 8).half()}, InputTypeError, r"torch\.float16, expected torch\.float32"),
        ({"image": torch.zeros(1, 3, 8, 8)}, InputError, r"\[1, 3, 8, 8\], expected \[2, 3, 8, 8\]"),
        ({"image": torch.zeros(2, 3, 8, 8, device="meta")}, InputTypeError, "device meta, expected cpu"),
        ({"gain": 1.5}, InputTypeError, r"'gain' is a float, expected a torch\.Tensor"),
    ],
)
def test_inputs_are_checked(
    conv: OrtSession, changes: dict[str, Tensor], error: type[DiffLossError], message: str
) -> None:
    with pytest.raises(error, match=message):
        conv({**sample(), **changes})


def test_threads_do_not_disturb_each_other(conv: OrtSession, kernel: Kernel) -> None:
    barrier = threading.Barrier(2)

    def run(inputs: dict[str, Tensor]) -> list[Tensor]:
        barrier.wait()
        return [conv(inputs)["features"] for _ in range(200)]

    samples = [sample(), sample()]
    with ThreadPoolExecutor(2) as pool:
        for inputs, results in zip(samples, pool.map(run, samples), strict=True):
            reference = expected(kernel, inputs).float()
            for result in results:
                torch.testing.assert_close(result, reference, atol=1e-5, rtol=1e-5)


def test_call_after_close_says_so(conv: OrtSession) -> None:
    outputs = conv(sample())
    conv.close()
    conv.close()
    assert outputs["features"].isfinite().all()
    with pytest.raises(BackendError, match="closed"):
        conv(sample())


def test_bfloat16_convolution_is_refused_on_the_cpu(tmp_path: Path, save_conv: SaveConv) -> None:
    with pytest.raises(BackendUnavailableError, match=r"conv\.onnx on CPUExecutionProvider: .*NOT_IMPLEMENTED.*Conv"):
        open_graph(tmp_path, save_conv(tmp_path, "bfloat16"))


def test_invalid_graph_is_refused(tmp_path: Path, save_graph: SaveGraph) -> None:
    x, y = TensorSpec("x", "float32", (1,)), TensorSpec("y", "float32", (1,))
    graph = save_graph(tmp_path / "g.onnx", [helper.make_node("NoSuchOperator", ["x"], ["y"])], [x], [y])
    with pytest.raises(BackendUnavailableError, match="NoSuchOperator"):
        open_graph(tmp_path, graph)


def test_file_that_cannot_be_read_is_a_bundle_error(tmp_path: Path, save_conv: SaveConv) -> None:
    graph = save_conv(tmp_path, "float32")
    (tmp_path / graph.file).write_bytes(b"no protobuf at all")
    with pytest.raises(BundleError, match=r"conv\.onnx cannot be read"):
        open_graph(tmp_path, graph)
    (tmp_path / graph.file).unlink()
    with pytest.raises(BundleError, match=r"conv\.onnx cannot be read"):
        open_graph(tmp_path, graph)


def test_missing_weights_are_an_error(tmp_path: Path, save_conv: SaveConv) -> None:
    graph = save_conv(tmp_path, "float32")
    (tmp_path / "conv.weights").unlink()
    with pytest.raises(BackendUnavailableError, match=r"conv\.weights"):
        open_graph(tmp_path, graph)


@pytest.mark.parametrize(
    "image",
    [
        TensorSpec("picture", "float32", (2, 3, 8, 8)),
        TensorSpec("image", "float16", (2, 3, 8, 8)),
        TensorSpec("image", "float32", (1, 3, 8, 8)),
    ],
    ids=["name", "dtype", "shape"],
)
@pytest.mark.parametrize("kind", ["inputs", "outputs"])
def test_graph_that_is_not_what_the_specs_say_is_refused(
    tmp_path: Path, save_conv: SaveConv, image: TensorSpec, kind: str
) -> None:
    graph = save_conv(tmp_path, "float32")
    specs = {"inputs": graph.inputs, "outputs": graph.outputs}
    specs[kind] = (image, *specs[kind][1:])
    with pytest.raises(BundleError, match=rf"conv\.onnx has the {kind} .*'{image.name}'"):
        OrtSession(tmp_path / graph.file, specs["inputs"], specs["outputs"], device=CPU)


def test_graph_with_a_free_dimension_is_refused(tmp_path: Path, save_graph: SaveGraph) -> None:
    x, y = TensorSpec("x", "float32", (2,)), TensorSpec("y", "float32", (2,))
    graph = save_graph(tmp_path / "g.onnx", [helper.make_node("Neg", ["x"], ["y"])], [x], [y])
    model = onnx.load(tmp_path / "g.onnx")
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    (tmp_path / "g.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match=r"batch.*expected .*\[2\]"):
        open_graph(tmp_path, graph)


def test_failure_during_a_run_is_a_backend_error(tmp_path: Path, save_graph: SaveGraph) -> None:
    specs = [TensorSpec("x", "float32", (4,)), TensorSpec("index", "int64", (1,))]
    nodes = [helper.make_node("Gather", ["x", "index"], ["y"])]
    session = open_graph(tmp_path, save_graph(tmp_path / "g.onnx", nodes, specs, [TensorSpec("y", "float32", (1,))]))
    assert session({"x": torch.arange(4.0), "index": torch.tensor([3])})["y"] == 3
    with pytest.raises(BackendError, match="ONNX Runtime failed"):
        session({"x": torch.arange(4.0), "index": torch.tensor([4])})
    assert session({"x": torch.arange(4.0), "index": torch.tensor([1])})["y"] == 1


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted as Linux lists them")
@pytest.mark.parametrize("threads", [1, 3])
def test_a_call_uses_as_many_threads_as_torch(tmp_path: Path, save_conv: SaveConv, threads: int) -> None:
    """The calling one and its own, which is none beside a data loader's worker, where torch is told to use one."""
    graph = save_conv(tmp_path, "float32")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        running = len(os.listdir("/proc/self/task"))
        session = open_graph(tmp_path, graph)
        session(sample())
        assert len(os.listdir("/proc/self/task")) - running == threads - 1
    finally:
        torch.set_num_threads(before)


@forks
def test_a_forked_process_can_call_and_close_it(
    tmp_path: Path, save_conv: SaveConv, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its threads are not there; freed for good, it would wait for them for ever."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # one thread of its own, wherever this is run
    session, inputs = open_graph(tmp_path, save_conv(tmp_path, "float32")), sample()
    wanted = session(inputs)["features"]

    def use() -> None:
        assert torch.equal(session(inputs)["features"], wanted)
        session.close()

    run_forked(use)


def test_device_without_a_provider_is_refused(tmp_path: Path, save_conv: SaveConv) -> None:
    with pytest.raises(BackendUnavailableError, match="device meta"):
        open_graph(tmp_path, save_conv(tmp_path, "float32"), torch.device("meta"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is what happens without a CUDA device")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cuda_is_never_replaced_by_the_cpu(
    tmp_path: Path, save_conv: SaveConv, device: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(BackendUnavailableError, match=r"cannot run on cuda.*missing: .*torch\.cuda\.is_available"):
        open_graph(tmp_path, save_conv(tmp_path, "float32"), torch.device(device))
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is what happens without a CUDA device")
def test_the_tensorrt_provider_is_never_replaced_by_another(
    tmp_path: Path, save_conv: SaveConv, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    graph = save_conv(tmp_path, "float32")

    def refused(device: str) -> str:
        with pytest.raises(BackendUnavailableError) as caught:
            OrtSession(
                tmp_path / graph.file,
                graph.inputs,
                graph.outputs,
                device=torch.device(device),
                backend="onnxruntime-tensorrt",
            )
        return str(caught.value)

    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    assert refused("cuda").startswith("onnxruntime-tensorrt cannot run on cuda; missing: a GPU that torch can use")
    assert "NVIDIA_TF32_OVERRIDE=0 in the environment" in refused("cuda")
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    assert "NVIDIA" not in refused("cuda")
    if "TensorrtExecutionProvider" not in onnxruntime.get_available_providers():
        assert "ONNX Runtime's TensorrtExecutionProvider (install 'onnxruntime-gpu'" in refused("cuda")
    assert refused("cpu") == "onnxruntime-tensorrt is not used on device cpu; it is on ['cuda']"
    assert capfd.readouterr() == ("", "")


def test_options_of_a_provider_that_takes_none_are_refused(tmp_path: Path, save_conv: SaveConv) -> None:
    graph = save_conv(tmp_path, "float32")
    with pytest.raises(InputError, match="on device cpu ONNX Runtime would silently ignore provider_options"):
        OrtSession(
            tmp_path / graph.file, graph.inputs, graph.outputs, device=CPU, provider_options={"prefer_nhwc": "1"}
        )


@pytest.fixture
def cuda() -> torch.device:
    """The GPU, or a skip where ONNX Runtime was installed without its CUDA provider."""
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("needs onnxruntime-gpu")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_cuda_values_are_right_and_stay_on_the_device(
    tmp_path: Path, save_conv: SaveConv, kernel: Kernel, dtype: str, cuda: torch.device
) -> None:
    session = open_graph(tmp_path, save_conv(tmp_path, dtype), torch.device("cuda"))
    assert session.device == cuda
    inputs = {name: tensor.to(cuda) for name, tensor in sample(DTYPES[dtype].torch).items()}
    outputs = session(inputs)
    assert {tensor.device for tensor in outputs.values()} == {cuda}
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(
        outputs["features"].cpu().double(), expected(kernel, inputs), atol=tolerance, rtol=tolerance
    )
    with pytest.raises(InputTypeError, match="on device cpu, expected cuda"):
        session(sample(DTYPES[dtype].torch))


@pytest.mark.gpu
def test_cuda_provider_options(tmp_path: Path, save_conv: SaveConv, kernel: Kernel, cuda: torch.device) -> None:
    graph = save_conv(tmp_path, "float32")
    open_with = functools.partial(OrtSession, tmp_path / graph.file, graph.inputs, graph.outputs, device=cuda)
    inputs = {name: tensor.to(cuda) for name, tensor in sample().items()}
    for options in ({"prefer_nhwc": "1"}, {"cudnn_conv_algo_search": "HEURISTIC"}):
        outputs = open_with(provider_options=options)(inputs)
        torch.testing.assert_close(outputs["features"].cpu().double(), expected(kernel, inputs), atol=1e-5, rtol=1e-5)
    with pytest.raises(BackendUnavailableError, match="no_such_option"):
        open_with(provider_options={"no_such_option": "1"})


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "precision"), [("float16", "fp16"), ("bfloat16", "bf16")])
def test_cuda_uses_tensor_cores_in_half_precision(
    tmp_path: Path, save_graph: SaveGraph, dtype: str, precision: str, cuda: torch.device
) -> None:
    """Where TF32 is off, ONNX Runtime keeps convolutions of every type off them."""

    def milliseconds(dtype: str, precision: str) -> float:
        image, weight = TensorSpec("x", dtype, (32, 256, 64, 64)), torch.randn(256, 256, 3, 3).to(DTYPES[dtype].torch)
        content = weight.view(torch.uint8).numpy().tobytes()
        graph = save_graph(
            tmp_path / f"{dtype}.onnx",
            [helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1])],
            [image],
            [replace(image, name="y")],
            [helper.make_tensor("w", DTYPES[dtype].onnx, weight.shape, content, raw=True)],
        )
        session = OrtSession(tmp_path / graph.file, graph.inputs, graph.outputs, device=cuda, precision=precision)
        given = {"x": torch.randn(image.shape, device=cuda).to(image.torch_dtype)}
        for _ in range(3):
            session(given)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(10):
            session(given)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    assert 2 * milliseconds(dtype, precision) < milliseconds("float32", "fp32")


@pytest.mark.gpu
def test_cuda_is_ordered_with_the_current_stream(
    tmp_path: Path, save_conv: SaveConv, kernel: Kernel, cuda: torch.device
) -> None:
    session = open_graph(tmp_path, save_conv(tmp_path, "float32"), cuda)
    inputs = {name: tensor.to(cuda) for name, tensor in sample().items()}
    session(inputs)
    stream = torch.cuda.Stream(cuda)
    stream.wait_stream(torch.cuda.current_stream(cuda))
    with torch.cuda.stream(stream):
        for step in range(20):
            image = torch.zeros_like(inputs["image"])
            # Long enough that a run that did not wait for the stream would read the zeros.
            torch.cuda._sleep(2_000_000)
            image += inputs["image"] + step
            features = session({"image": image, "gain": inputs["gain"]})["features"]
            given = {"image": image.clone()}
            # Memory freed here must not be written by the next step while the run still reads it.
            del image
            result = features.clone()
            torch.testing.assert_close(result.cpu().double(), expected(kernel, given), atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("by", ["close", "del"])
def test_a_session_that_goes_leaves_the_current_device(tmp_path: Path, save_conv: SaveConv, by: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    device = torch.device("cuda", 1 - torch.cuda.current_device())
    session = open_graph(tmp_path, save_conv(tmp_path, "float32"), device)
    session({name: tensor.to(device) for name, tensor in sample().items()})
    if by == "close":
        session.close()
    del session
    gc.collect()
    assert torch.cuda.current_device() != device.index


@pytest.mark.gpu
def test_cuda_run_does_not_wait_for_its_results(tmp_path: Path, save_conv: SaveConv, cuda: torch.device) -> None:
    session = open_graph(tmp_path, save_conv(tmp_path, "float32"), cuda)
    inputs = {name: tensor.to(cuda) for name, tensor in sample().items()}
    session(inputs)
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)
    session(inputs)
    done = torch.cuda.current_stream(cuda).record_event()
    assert not done.query()
    done.synchronize()


@pytest.mark.gpu
def test_cuda_threads_do_not_disturb_each_other(
    tmp_path: Path, save_conv: SaveConv, kernel: Kernel, cuda: torch.device
) -> None:
    session = open_graph(tmp_path, save_conv(tmp_path, "float32"), cuda)
    samples = [{name: tensor.to(cuda) for name, tensor in sample().items()} for _ in range(2)]
    torch.cuda.synchronize()

    def run(inputs: dict[str, Tensor]) -> list[Tensor]:
        stream = torch.cuda.Stream(cuda)
        with torch.cuda.stream(stream):
            results = [session(inputs)["features"] for _ in range(100)]
        stream.synchronize()
        return results

    with ThreadPoolExecutor(2) as pool:
        for inputs, results in zip(samples, pool.map(run, samples), strict=True):
            reference = expected(kernel, inputs)
            for result in results:
                torch.testing.assert_close(result.cpu().double(), reference, atol=1e-4, rtol=1e-4)
