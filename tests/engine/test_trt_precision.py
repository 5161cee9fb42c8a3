"""Networks and engines in another precision than was asked for; both are made for real, by TensorRT-RTX."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from plan_traffic import kernels

from diffloss_engine import BackendError, Graph
from diffloss_engine.tensors import TensorSpec
from diffloss_engine.trt_build import build_plan
from diffloss_engine.trt_precision import check_engine
from diffloss_engine.trt_session import TrtSession

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")

FP16, FP32 = "float16", "float32"
SaveGraph = Callable[..., Graph]


def products(folder: Path, save_graph: SaveGraph, convolution: str, product: str, vectors: str) -> Graph:
    """Write a graph with a convolution, one of an image, a batched product and one of vectors, in these dtypes."""

    def constant(name: str, dtype: str, *shape: int) -> onnx.TensorProto:
        return onnx.numpy_helper.from_array(np.zeros(shape, dtype), name)

    inputs = [
        TensorSpec("image", FP32, (2, 3, 8, 8)),
        TensorSpec("features", convolution, (2, 8, 8, 8)),
        TensorSpec("tokens", product, (2, 64, 32)),
        TensorSpec("time", vectors, (2, 64)),
    ]
    outputs = [
        TensorSpec("a", FP32, (2, 8, 8, 8)),
        TensorSpec("b", convolution, (2, 8, 8, 8)),
        TensorSpec("c", product, (2, 64, 64)),
        TensorSpec("d", vectors, (2, 96)),
    ]
    nodes = [
        helper.make_node("Conv", ["image", "first"], ["a"], name="the_first", pads=[1] * 4),
        helper.make_node("Conv", ["features", "second"], ["b"], name="the_convolution", pads=[1] * 4),
        helper.make_node("Transpose", ["tokens"], ["transposed"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["tokens", "transposed"], ["c"], name="the_product"),
        helper.make_node("Gemm", ["time", "matrix"], ["d"], name="the_time"),
    ]
    weights = [
        constant("first", FP32, 8, 3, 3, 3),
        constant("second", convolution, 8, 8, 3, 3),
        constant("matrix", vectors, 64, 96),
    ]
    return save_graph(folder / "products.onnx", nodes, inputs, outputs, weights)


# Networks


@pytest.mark.parametrize("vectors", [FP32, FP16])
def test_precision_is_right(vectors: str, tmp_path: Path, save_graph: SaveGraph) -> None:
    file = tmp_path / products(tmp_path, save_graph, FP16, FP16, vectors).file
    assert build_plan(file, flavour="tensorrt-rtx", precision="fp16")
    with pytest.raises(BackendError, match=r"[23] convolutions or matrix products are not FLOAT, as expected in fp32"):
        build_plan(file, flavour="tensorrt-rtx", precision="fp32")


@pytest.mark.parametrize(
    ("convolution", "product", "named"), [(FP32, FP16, "the_convolution"), (FP16, FP32, "the_product")]
)
def test_one_product_in_another_precision_is_named(
    convolution: str, product: str, named: str, tmp_path: Path, save_graph: SaveGraph
) -> None:
    file = tmp_path / products(tmp_path, save_graph, convolution, product, FP32).file
    with pytest.raises(BackendError, match=f"1 convolutions or matrix products are not HALF.*{named} .*FLOAT"):
        build_plan(file, flavour="tensorrt-rtx", precision="fp16")


# Engines


def information(file: Path) -> str:
    """Build an engine, whatever its precision, and return what the builder then says of its layers, as JSON."""
    return json.dumps({"Layers": kernels(file)[0]})


def test_an_engine_in_the_right_precision(tmp_path: Path, save_graph: SaveGraph) -> None:
    half = information(tmp_path / products(tmp_path, save_graph, FP16, FP16, FP32).file)
    assert check_engine(half, "fp16", batch=2) == 4
    with pytest.raises(BackendError, match=r"2 of the plan's .* in fp32, the first of them the_.*fp16"):
        check_engine(half, "fp32", batch=2)
    with pytest.raises(BackendError, match=r"2 of the plan's .* in bf16, the first of them the_.*fp16"):
        check_engine(half, "bf16", batch=2)
    single = information(tmp_path / products(tmp_path, save_graph, FP32, FP32, FP32).file)
    assert check_engine(single, "fp32", batch=2) == 4


@pytest.mark.parametrize(
    ("convolution", "product", "named"), [(FP32, FP16, "the_convolution"), (FP16, FP32, "the_product")]
)
def test_one_kernel_in_another_precision_is_named(
    convolution: str, product: str, named: str, tmp_path: Path, save_graph: SaveGraph
) -> None:
    found = information(tmp_path / products(tmp_path, save_graph, convolution, product, FP32).file)
    with pytest.raises(BackendError, match=rf"1 of the plan's .* in fp16, the first of them {named}.* \(fp32\)"):
        check_engine(found, "fp16", batch=2)


def of_library(
    channels: int = 64, data: str = "Channel major FP16 format where channel % 8 == 0", weights: str = "Half"
) -> str:
    """Return what TensorRT 10 documents of a convolution from its library of kernels."""
    layer = {
        "Name": "conv + relu",
        "LayerType": "CaskConvolution",
        "Inputs": [{"Name": "x", "Location": "Device", "Dimensions": [2, channels, 8, 8], "Format/Datatype": data}],
        "Outputs": [{"Name": "y", "Location": "Device", "Dimensions": [2, 16, 8, 8], "Format/Datatype": data}],
        "ParameterType": "Convolution",
        "Weights": {"Type": weights, "Count": 9216},
        "Bias": {"Type": "Float", "Count": 16},
        "Metadata": "[ONNX Layer: conv]\x1f[ONNX Layer: relu]",
    }
    # The separator as it is, not escaped.
    return json.dumps({"Layers": [layer], "Bindings": ["x", "y"]}).replace("\\u001f", "\x1f")


def test_a_kernel_of_the_library() -> None:
    assert check_engine(of_library(), "fp16", batch=2) == 1
    single = of_library(data="Row major linear FP32", weights="Float")
    assert check_engine(single, "fp32", batch=2) == 1
    with pytest.raises(BackendError, match=r"1 of the plan's .* conv \+ relu \(fp32\)"):
        check_engine(single, "fp16", batch=2)
    # Of an image it may be more precise, but not less.
    assert check_engine(of_library(3, "Row major linear FP32", "Float"), "fp16", batch=2) == 1
    with pytest.raises(BackendError, match="fp16"):
        check_engine(of_library(3), "fp32", batch=2)


@pytest.mark.parametrize("shape", [[2, 64], [64, 2], [2, 64, 1, 1]])
def test_products_of_single_vectors_may_be_in_fp32_however_they_are_laid_out(shape: list[int]) -> None:
    def of_product(shape: list[int]) -> str:
        tensors = [{"Dimensions": shape, "Datatype": "Float"}]
        return json.dumps({"Layers": [{"Name": "gemm", "LayerType": "gemm", "Inputs": tensors, "Outputs": tensors}]})

    assert check_engine(of_product(shape), "fp16", batch=2) == 1
    with pytest.raises(BackendError, match=r"1 of the plan's .* gemm \(fp32\)"):
        check_engine(of_product([2, 3, 64]), "fp16", batch=2)


@pytest.mark.parametrize(
    "unknown",
    [
        of_library(data="Two wide channel vectorized row major E5M2 format"),
        json.dumps({"Layers": ["conv + relu", "gemm"]}),
        json.dumps(
            {"Layers": [{"Name": "a", "LayerType": "kgen", "Inputs": [{"Dimensions": [2], "Datatype": "Float"}]}]}
        ),
        json.dumps({"Layers": [{"Name": "a", "LayerType": "gemm"}]}),
        "{}",
        "",
    ],
    ids=["another type", "names alone", "fused", "no operands", "no layers", "nothing"],
)
def test_what_is_not_told_is_not_judged(unknown: str) -> None:
    assert check_engine(unknown, "fp16", batch=2) == 0


@pytest.mark.gpu
def test_the_inspector_tells(
    flavour: str, tmp_path: Path, save_graph: SaveGraph, caplog: pytest.LogCaptureFixture
) -> None:
    graph = products(tmp_path, save_graph, FP16, FP16, FP32)
    plan = build_plan(tmp_path / graph.file, flavour=flavour, precision="fp16")
    open_session = functools.partial(
        TrtSession, plan, graph.inputs, graph.outputs, flavour=flavour, device=torch.device("cuda")
    )
    with caplog.at_level(logging.INFO):
        open_session(precision="fp16")
    assert "does not tell" not in caplog.text
    with pytest.raises(BackendError, match="of the plan's convolutions and matrix products do not compute in bf16"):
        open_session(precision="bf16")
