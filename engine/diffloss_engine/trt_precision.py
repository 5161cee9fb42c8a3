"""Whether TensorRT computes in the precision asked for: the parsed network before a build, the engine after it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from diffloss_engine.errors import BackendError
from diffloss_engine.tensors import IMAGE_CHANNELS

_DTYPES = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16"}

# What the inspector calls a kernel that is one convolution or one matrix product, in `LayerType` or `ParameterType`: by
# TensorRT's compiler, which makes all kernels of TensorRT-RTX 1.7, and by its library of kernels.
_CONVOLUTIONS = {"correlation", "Convolution"}
_PRODUCTS = {"gemm", "MatrixMultiply"}
# What it calls element types, alone (`Datatype`, `Type`) or, before TensorRT 11, in a sentence (`Format/Datatype`).
_WORDS = {"BFloat16": "bf16", "BF16": "bf16", "Half": "fp16", "FP16": "fp16", "Float": "fp32", "FP32": "fp32"}
_WORD = re.compile(rf"\b({'|'.join(_WORDS)})\b")


def check_network(trt: ModuleType, network: Any, precision: str) -> None:
    """Raise BackendError unless all convolutions and matrix products of a parsed network have this precision.

    Two kinds may be in fp32. Convolutions of images, of at most four channels: at a UNet's input rounding does harm.
    And products of as many rows as the batch, one vector for each sample, such as a time embedding.
    """
    wanted = getattr(trt.DataType, _DTYPES[precision])
    batch = network.get_input(0).shape[0]
    wrong = []
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type not in (trt.LayerType.CONVOLUTION, trt.LayerType.MATRIX_MULTIPLY):
            continue
        output = layer.get_output(0)
        if layer.type == trt.LayerType.CONVOLUTION:
            exempt = layer.get_input(0).shape[1] <= IMAGE_CHANNELS
        else:
            exempt = tuple(output.shape[:-1]) == (batch,)
        # Weights that are constants are not among the inputs.
        inputs = [layer.get_input(place) for place in range(layer.num_inputs)]
        dtypes = {tensor.dtype for tensor in (*inputs, output) if tensor is not None}
        if dtypes != {wanted} and not (exempt and dtypes == {trt.DataType.FLOAT}):
            wrong.append(f"{layer.name} ({', '.join(sorted(dtype.name for dtype in dtypes))})")
    if wrong:
        raise BackendError(
            f"{len(wrong)} convolutions or matrix products are not {wanted.name}, as expected in {precision}, "
            f"the first of them {wrong[0]}"
        )


def check_engine(information: str, precision: str, batch: int) -> int:
    """Raise BackendError if a kernel of an engine reads nothing in this precision; return how many could be judged.

    Judged are kernels that are one convolution or one matrix product and whose operands' types are told; the two kinds
    of `check_network` may be in fp32. Kernels into which more was fused are not judged: they have fp32 on purpose.

    information: what the inspector says of the engine, as JSON; in detail only of a plan that was built so.
    batch: how many samples the engine takes.
    """
    judged, wrong = 0, []
    for layer in _layers(information):
        kinds = {layer.get("LayerType"), layer.get("ParameterType")}
        inputs, outputs = layer.get("Inputs", []), layer.get("Outputs", [])
        if kinds & _CONVOLUTIONS:
            exempt = any(math.prod(_shape(tensor)[1:2]) <= IMAGE_CHANNELS for tensor in inputs)
        elif kinds & _PRODUCTS:
            # Of single vectors, however a kernel lays them out.
            shapes = [_shape(tensor) for tensor in outputs]
            exempt = all(math.prod(shape) <= batch * max(shape, default=1) for shape in shapes)
        else:
            continue
        # A kernel's scalar factors have a precision of their own.
        constants = [tensor for tensor in layer.get("Constants", []) if math.prod(_shape(tensor)) > 1]
        weights = [layer["Weights"]] if "Weights" in layer else []
        dtypes = {_precision(tensor) for tensor in (*inputs, *constants, *weights)}
        if not dtypes or None in dtypes:
            continue
        judged += 1
        if precision not in dtypes and not (exempt and dtypes == {"fp32"}):
            wrong.append(f"{layer.get('Name')} ({', '.join(sorted(map(str, dtypes)))})")
    if wrong:
        raise BackendError(
            f"{len(wrong)} of the plan's convolutions and matrix products do not compute in {precision}, "
            f"the first of them {wrong[0]}"
        )
    return judged


def _layers(information: str) -> list[dict[str, Any]]:
    try:
        # The names of the ONNX nodes in a kernel are separated by control characters.
        layers = json.loads(information, strict=False)["Layers"]
    except (ValueError, KeyError):
        return []
    # Of a plan that was not built in detail there are names alone.
    return [layer for layer in layers if isinstance(layer, dict)]


def _shape(tensor: Mapping[str, Any]) -> list[int]:
    return list(tensor.get("Dimensions", []))


def _precision(tensor: Mapping[str, Any]) -> str | None:
    told = next((tensor[key] for key in ("Datatype", "Format/Datatype", "Type") if key in tensor), "")
    found = _WORD.search(told)
    return found and _WORDS[found[0]]
