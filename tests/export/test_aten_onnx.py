"""Each translation from ATen to ONNX: what ONNX Runtime computes is what PyTorch does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffloss_engine.errors import ModelError
from diffloss_engine.session import open_session
from diffloss_engine.tensors import TensorSpec
from diffloss_export.aten_onnx import Emitter, to_onnx
from diffloss_trt.norms import group_norm
from diffloss_trt.objective import wide
from diffloss_trt.tape import Pair, Tape
from diffloss_trt.traced import TracedProgram
from exports import Exported, read_graph

aten = torch.ops.aten
Function = Callable[[Tensor, Tensor], Tensor]

CASES: dict[str, Function] = {
    "arithmetic": lambda x, y: (x + 2 * y - y / x - 3) * 0.1 + 1 / (2 - x.abs()),
    "alpha": lambda x, y: torch.add(x, y, alpha=-1) + torch.sub(x, y[..., :1], alpha=0.3) + torch.add(x, 2, alpha=3),
    "rsub": lambda x, y: torch.rsub(x, y),
    "elementary": lambda x, y: x.exp() + y.sin() + x.cos() + y.tanh() + x.sigmoid() + y.floor() - (-x) + x.abs().sqrt(),
    "powers": lambda x, y: x.pow(2) + x.pow(3) + (x * x + 1).rsqrt() + y.square().add(1).log2().exp2(),
    "silu": lambda x, y: F.silu(x) * y,
    "clamp": lambda x, y: x.clamp(min=0.1) + y.clamp(-0.5, 0.5) + x.clamp(max=0.2),
    "where": lambda x, y: torch.where(x > 0.25, y, x * 2),
    "reductions": lambda x, y: x.mean((1, 2)) + y.sum(2).amax(1) + x.mean(-1, keepdim=True).amax((1, 2)),
    "softmax": lambda x, y: torch.softmax(x, -1) + torch.softmax(y, 1),
    "shapes": lambda x, y: x.view(2, -1).unsqueeze(1).reshape(2, 4, 3, 6) + y.transpose(1, 2).transpose(2, 1),
    "unit transposes": lambda x, y: (
        x[:, :1].transpose(0, 1).transpose(2, 3) + y.mean(1, keepdim=True).permute(1, 0, 3, 2)
    ),
    "permute": lambda x, y: x.permute(3, 1, 0, 2) * y.permute(-1, 1, 0, 2),
    "expand": lambda x, y: x[:, :, :1].expand(2, 4, 3, 6) * y,
    "cat": lambda x, y: torch.cat([x, y, x * 2], 1).sum(1),
    "stack": lambda x, y: torch.stack([x, y], 2).sum(1),
    "stack, last": lambda x, y: torch.stack([x, y], -1).sum(1),
    "split": lambda x, y: torch.cat(x.split([1, 3], 1)[::-1], 1) + torch.cat(y.chunk(2, 3)[::-1], 3),
    "slices": lambda x, y: x[:, 1:3, ::2] * y[:, :2, 1::2][:, :, :1],
    "flip": lambda x, y: x.flip(2, 3) + y.flip(1),
    "pad": lambda x, y: F.pad(x, (1, 2, 0, 1)) + F.pad(y, (2, 1, 1, -1, 0, 0))[:, :, :1],
    "cut": lambda x, y: F.pad(x, (-1, -2, 1, 0)),
    "gather": lambda x, y: x.flatten()[(y.flatten()[:5].abs() * 3).long()],
    "embedding": lambda x, y: F.embedding((y.flatten()[:7].abs() * 2).long(), x.reshape(-1, 6)),
    "conversions": lambda x, y: x.half().float() + (y > 0).to(torch.float32),
    "constants": lambda x, y: x + torch.ones_like(y) - torch.zeros_like(x),
    "convolution": lambda x, y: F.conv2d(x, y.flatten()[:108].reshape(3, 4, 3, 3), y.flatten()[:3], 2, 1),
    "groups": lambda x, y: F.conv2d(x, y.flatten()[:72].reshape(4, 2, 3, 3), None, 1, (1, 0), 1, 2),
    "average pool": lambda x, y: F.avg_pool2d(x, (3, 2)),
    "nearest": lambda x, y: F.interpolate(x, scale_factor=2.0) + F.interpolate(y, scale_factor=[2.0, 2.0]),
    "products": lambda x, y: x @ y.transpose(2, 3),
    "linear": lambda x, y: (
        F.linear(x, y.view(24, 6)[:3], y.flatten()[:3]) + F.linear(x.flatten(0, 2), y.view(24, 6)[3:6]).view(2, 4, 3, 3)
    ),
}


def to_session(
    function: Function, folder: Path, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (2, 4, 3, 6)
) -> tuple[onnx.ModelProto, Function]:
    """Return a function's ONNX model, and the function as ONNX Runtime computes it."""
    example = {name: torch.zeros(shape, dtype=dtype) for name in "xy"}
    program = TracedProgram.trace(
        "case", lambda inputs, _, __: (function(inputs["x"], inputs["y"]),), example, {}, {}, ("out",)
    )
    path = folder / "case.onnx"
    ir.save(to_onnx(program, {}), path)
    onnx.checker.check_model(path, full_check=True)
    specs = [[TensorSpec.of(name, t) for name, t in group.items()] for group in (program.inputs, program.results)]
    session = open_session(path, specs[0], specs[1], backend="onnxruntime", device=torch.device("cpu"))
    return onnx.load(path), lambda x, y: session({"x": x, "y": y})["out"]


@pytest.mark.parametrize("name", CASES)
def test_onnx_runtime_computes_what_pytorch_does(name: str, tmp_path: Path) -> None:
    x, y = (torch.randn(2, 4, 3, 6) for _ in range(2))
    _, run = to_session(CASES[name], tmp_path)
    found, expected = run(x, y), CASES[name](x, y)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)


def test_numbers_are_not_rounded_to_half_precision(tmp_path: Path) -> None:
    """PyTorch multiplies a half-precision tensor by 1/3 in float32."""
    x = torch.randn(2, 4, 3, 6).half()
    model, run = to_session(lambda x, y: x * (1 / 3) + y * 0.5, tmp_path, torch.float16)
    assert torch.equal(run(x, torch.zeros_like(x)), x * (1 / 3))
    assert Counter(node.op_type for node in model.graph.node)["Cast"] == 2  # none for the exact 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_constants_are_made_once_and_zero_is_not_minus_zero(dtype: torch.dtype) -> None:
    emitter = Emitter()
    ones, zero, minus = (emitter.constant(torch.tensor(number, dtype=dtype)) for number in (1.0, 0.0, -0.0))
    assert emitter.constant(torch.ones(2, dtype=dtype)[::2][0]) is ones
    assert emitter.constant(torch.ones(1, dtype=dtype)) is not ones
    assert emitter.constant(torch.tensor(1.0, dtype=torch.float16)) is not ones
    assert zero is not minus


def test_reshapes_in_a_row_become_one(tmp_path: Path) -> None:
    model, _ = to_session(lambda x, y: x.view(-1).view(6, 24).view(2, 72) + y.view(2, 72).view(2, 72), tmp_path)
    used = [name for node in model.graph.node for name in node.input]
    assert sum(node.op_type == "Reshape" and node.output[0] in used for node in model.graph.node) == 2


def test_weights_transposition_goes_into_the_product(tmp_path: Path) -> None:
    model, _ = to_session(lambda x, y: F.linear(x.flatten(0, 2), y.view(24, 6)), tmp_path)
    (product,) = (node for node in model.graph.node if node.op_type == "Gemm")
    assert {attribute.name: attribute.i for attribute in product.attribute} == {"transB": 1}


def test_unknown_operation_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"the case graph cannot be expressed in ONNX: aten\.cummax\.default"):
        to_session(lambda x, y: x.cummax(-1).values, tmp_path)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_gradient_graphs_hold_nothing_needless(exported: Callable[..., Exported], precision: str) -> None:
    bundle = exported(precision=precision).bundle
    for name in ("gradient", "semantic_gradient"):
        graph = read_graph(bundle.path / f"{name}.onnx").graph
        used = {value for node in graph.node for value in node.input} | {value.name for value in graph.output}
        assert not [node.op_type for node in graph.node if not used & set(node.output)]
        assert not [tensor.name for tensor in graph.initializer if tensor.name not in used]
        kinds = Counter(node.op_type for node in graph.node)
        # The time embedding once, softmax without guards for rows that are masked out, no transposed convolutions.
        assert kinds["Sin"] == kinds["Cos"] == 1
        assert kinds["Sigmoid"] == 2
        assert not kinds.keys() & {"IsNaN", "Equal", "ConvTranspose", "Dropout", "Identity"}
        seen = [(node.op_type, tuple(node.input), node.attribute) for node in graph.node]
        assert len({str(item) for item in seen}) == len(seen)


@pytest.mark.parametrize("mean", [5.3, 100.0])
def test_statistics_of_a_large_image_are_right_in_onnx_runtime(mean: float, tmp_path: Path) -> None:
    """Its sums are less exact than PyTorch's: of squares of what lies far from zero, nothing right would be left."""
    d = torch.randn(2, 4, 64, 64).half()
    v = (torch.randn_like(d) * (mean > 10) + mean).half()

    def norm(v: Tensor, d: Tensor) -> Tensor:
        ones = torch.ones_like(v.mean((0, 2, 3)))
        tape = Tape(2.0**-10 * torch.ones_like(wide(v).mean((1, 2, 3))), v.dtype)
        return group_norm(tape, Pair(v, d), 2, ones, 0 * ones, 1e-5, activate=True).difference

    _, run = to_session(norm, tmp_path, torch.float16, (2, 4, 64, 64))
    found, expected = run(v, d).double(), norm(v.double(), d.double())
    assert (found - expected).norm() < 1e-3 * expected.norm()
