"""A traced program of ATen operations as an ONNX graph, operation by operation.

The programs are traced already, static in shape, and use some fifty operations. Written directly, a graph of thousands
of nodes takes seconds; it refers to its weights by name; and each operation takes the form that runtimes run best.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_aggregate

from diffloss_engine.errors import ModelError
from diffloss_engine.tensors import DTYPES
from diffloss_trt.difference import whole_factors

if TYPE_CHECKING:
    import onnx_ir as ir

    from diffloss_trt.traced import TracedProgram

# The first opset in which convolutions take bfloat16.
OPSET = 22
_IR_VERSION = 10

aten = torch.ops.aten

_ONNX_DTYPES = {entry.torch: entry.onnx for entry in DTYPES.values()}


class Emitter:
    """Builds one graph; operations are appended with `op`."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self._numbers: dict[tuple[str, Any], ir.Value] = {}
        # What a reshaped value was reshaped from.
        self._unshaped: dict[ir.Value, ir.Value] = {}
        self.name = ""
        self._count = 0

    def value(self, name: str, tensor: Tensor) -> ir.Value:
        """Return a value that looks like `tensor`."""
        import onnx_ir as ir

        return ir.Value(
            name=name, type=ir.TensorType(ir.DataType(_ONNX_DTYPES[tensor.dtype])), shape=ir.Shape(list(tensor.shape))
        )

    def op(self, kind: str, inputs: Sequence[ir.Value | None], like: Tensor, **attributes: Any) -> ir.Value:
        """Append a node, and return its output."""
        import onnx_ir as ir

        self._count += 1
        output = self.value(f"{self.name}.{self._count}", like)
        self.nodes.append(ir.node(kind, inputs, attributes, outputs=[output]))
        return output

    def constant(self, tensor: Tensor, name: str | None = None) -> ir.Value:
        """Return an initializer with the values of `tensor`; equal small ones are made once."""
        import onnx_ir as ir

        content: Any = name
        if name is None:  # by bytes: 0.0 == -0.0, and their reciprocals are not equal
            content = tuple(tensor.shape), tensor.flatten().contiguous().view(torch.uint8).numpy().tobytes()
        key = (str(tensor.dtype), content)
        if key not in self._numbers:
            value = self.value(name or f"constant_{len(self._numbers)}", tensor)
            value.const_value = (
                ir.tensor(tensor.contiguous(), name=value.name)
                if tensor.dtype != torch.bfloat16
                else _bf16(tensor, value.name)
            )
            self._numbers[key] = self.initializers[str(value.name)] = value
        return self._numbers[key]

    def integers(self, numbers: Sequence[int]) -> ir.Value:
        """Return a constant int64 vector."""
        return self.constant(torch.tensor(list(numbers), dtype=torch.int64))

    def cast(self, value: ir.Value, dtype: torch.dtype) -> ir.Value:
        """Return `value` in another dtype."""
        wanted = _ONNX_DTYPES[dtype]
        if value.dtype == wanted:
            return value
        return self.op("Cast", [value], _looks(value, dtype), to=wanted)

    def reshape(self, value: ir.Value, like: Tensor) -> ir.Value:
        """Return `value` in the shape of `like`; of reshapes in a row only the last is made."""
        source = self._unshaped.get(value, value)
        if list(source.shape or ()) == list(like.shape):
            return source
        result = self.op("Reshape", [source, self.integers(like.shape)], like)
        self._unshaped[result] = source
        return result

    def operand(self, argument: Any, dtype: torch.dtype) -> ir.Value:
        """Return a tensor or a number as an operand of `dtype`."""
        if isinstance(argument, int | float):
            return self.constant(torch.tensor(argument, dtype=dtype))
        return self.cast(argument, dtype)


def _bf16(tensor: Tensor, name: str | None) -> ir.TensorProtocol:
    import ml_dtypes
    import onnx_ir as ir

    bits = tensor.contiguous().view(torch.int16).numpy()
    return ir.Tensor(bits.view(ml_dtypes.bfloat16), name=name)


def _looks(value: ir.Value, dtype: torch.dtype) -> Tensor:
    """Return a tensor without data of `value`'s shape."""
    assert value.shape is not None
    return torch.empty(value.shape.numpy(), dtype=dtype, device="meta")


Rule = Callable[..., Any]
_RULES: dict[Any, Rule] = {}


def _rule(*targets: Any) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(targets, rule))
        return rule

    return register


# Each rule is called with the emitter, what the result looks like, and the operation's own arguments.


def _elementwise(kind: str) -> Rule:
    def rule(emit: Emitter, like: Tensor, *args: Any) -> Any:
        dtype = _compute_dtype(like.dtype, args)
        result = emit.op(kind, [emit.operand(arg, dtype) for arg in args], like.to(dtype))
        return emit.cast(result, like.dtype)

    return rule


def _compute_dtype(dtype: torch.dtype, args: Sequence[Any]) -> torch.dtype:
    """Return float32 if a number among `args` would lose digits as a constant of `dtype`; PyTorch loses none."""
    numbers = [arg for arg in args if isinstance(arg, int | float)]
    exact = all(torch.tensor(number, dtype=dtype).double() == number for number in numbers)
    return dtype if exact or not dtype.is_floating_point else torch.promote_types(dtype, torch.float32)


_RULES |= {
    aten.abs.default: _elementwise("Abs"),
    aten.cos.default: _elementwise("Cos"),
    aten.div.Scalar: _elementwise("Div"),
    aten.div.Tensor: _elementwise("Div"),
    aten.exp.default: _elementwise("Exp"),
    aten.floor.default: _elementwise("Floor"),
    aten.mul.Scalar: _elementwise("Mul"),
    aten.mul.Tensor: _elementwise("Mul"),
    aten.neg.default: _elementwise("Neg"),
    aten.reciprocal.default: _elementwise("Reciprocal"),
    aten.sigmoid.default: _elementwise("Sigmoid"),
    aten.sin.default: _elementwise("Sin"),
    aten.sqrt.default: _elementwise("Sqrt"),
    aten.tanh.default: _elementwise("Tanh"),
}


def _sum(kind: str) -> Rule:
    def rule(emit: Emitter, like: Tensor, a: Any, b: Any, *, alpha: float = 1) -> Any:
        if alpha != 1:
            is_number = isinstance(b, int | float)
            b = b * alpha if is_number else _elementwise("Mul")(emit, _looks(b, like.dtype), b, alpha)
        return _elementwise(kind)(emit, like, a, b)

    return rule


_RULES |= {aten.add.Tensor: _sum("Add"), aten.sub.Tensor: _sum("Sub")}


@_rule(aten.rsub.Scalar, aten.rsub.Tensor)
def _rsub(emit: Emitter, like: Tensor, a: Any, b: Any) -> Any:
    return emit.op("Sub", [emit.operand(b, like.dtype), emit.operand(a, like.dtype)], like)


@_rule(aten.rsqrt.default)
def _rsqrt(emit: Emitter, like: Tensor, x: Any) -> Any:
    return emit.op("Reciprocal", [emit.op("Sqrt", [x], like)], like)


@_rule(aten.log2.default)
def _log2(emit: Emitter, like: Tensor, x: Any) -> Any:
    return emit.op("Mul", [emit.op("Log", [x], like), emit.operand(1 / math.log(2), like.dtype)], like)


@_rule(aten.exp2.default)
def _exp2(emit: Emitter, like: Tensor, x: Any) -> Any:
    return emit.op("Pow", [emit.operand(2.0, like.dtype), x], like)


@_rule(aten.pow.Tensor_Scalar)
def _pow(emit: Emitter, like: Tensor, x: Any, exponent: float) -> Any:
    if exponent == 1:
        return x
    if exponent == 2:
        return emit.op("Mul", [x, x], like)
    return emit.op("Pow", [x, emit.operand(exponent, like.dtype)], like)


@_rule(aten.silu.default)
def _silu(emit: Emitter, like: Tensor, x: Any) -> Any:
    return emit.op("Mul", [x, emit.op("Sigmoid", [x], like)], like)


@_rule(aten.clamp.default)
def _clamp(emit: Emitter, like: Tensor, x: Any, low: float | None = None, high: float | None = None) -> Any:
    bounds = [None if bound is None else emit.operand(bound, like.dtype) for bound in (low, high)]
    return emit.op("Clip", [x, *bounds], like)


@_rule(aten.gt.Scalar)
def _greater(emit: Emitter, like: Tensor, x: Any, bound: float) -> Any:
    return emit.op("Greater", [x, emit.operand(bound, _torch_dtype(x))], like)


def _torch_dtype(value: ir.Value) -> torch.dtype:
    return next(entry.torch for entry in DTYPES.values() if entry.onnx == value.dtype)


@_rule(aten.where.self)
def _where(emit: Emitter, like: Tensor, condition: Any, a: Any, b: Any) -> Any:
    return emit.op("Where", [condition, emit.operand(a, like.dtype), emit.operand(b, like.dtype)], like)


def _reduction(kind: str) -> Rule:
    def rule(emit: Emitter, like: Tensor, x: Any, dims: Sequence[int], keepdim: bool = False) -> Any:
        return emit.op(kind, [x, emit.integers(dims)], like, keepdims=int(keepdim))

    return rule


_RULES |= {
    aten.amax.default: _reduction("ReduceMax"),
    aten.mean.dim: _reduction("ReduceMean"),
    aten.sum.dim_IntList: _reduction("ReduceSum"),
}


@_rule(aten._softmax.default, aten._safe_softmax.default)
def _softmax(emit: Emitter, like: Tensor, x: Any, dim: int, *_: Any) -> Any:
    return emit.op("Softmax", [x], like, axis=dim)


# Shape and dtype


@_rule(aten.alias.default, aten.clone.default, aten.detach.default, aten.lift_fresh_copy.default)
def _same(emit: Emitter, like: Tensor, x: Any, **_: Any) -> Any:
    return x


@_rule(aten._to_copy.default)
def _to_copy(emit: Emitter, like: Tensor, x: Any, **_: Any) -> Any:
    return emit.cast(x, like.dtype)


@_rule(aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dims, aten.squeeze.dim)
def _reshape(emit: Emitter, like: Tensor, x: Any, *_: Any) -> Any:
    return emit.reshape(x, like)


@_rule(aten.expand.default)
def _expand(emit: Emitter, like: Tensor, x: Any, shape: Any) -> Any:
    if list(x.shape or ()) == list(like.shape):
        return x
    return emit.op("Expand", [x, emit.integers(like.shape)], like)


@_rule(aten.permute.default)
def _permute(emit: Emitter, like: Tensor, x: Any, dims: Sequence[int]) -> Any:
    perm = [dim % like.ndim for dim in dims]
    moved = [dim for dim in perm if int(x.shape[dim]) != 1]
    if moved == sorted(moved):
        return emit.reshape(x, like)
    return emit.op("Transpose", [x], like, perm=perm)


@_rule(aten.transpose.int)
def _transpose(emit: Emitter, like: Tensor, x: Any, first: int, second: int) -> Any:
    dims = list(range(like.ndim))
    dims[first], dims[second] = dims[second], dims[first]
    return _permute(emit, like, x, dims)


@_rule(aten.t.default)
def _t(emit: Emitter, like: Tensor, x: Any) -> Any:
    return _permute(emit, like, x, [1, 0])


@_rule(aten.cat.default)
def _cat(emit: Emitter, like: Tensor, parts: Sequence[Any], dim: int = 0) -> Any:
    return emit.op("Concat", [emit.cast(part, like.dtype) for part in parts], like, axis=dim)


@_rule(aten.stack.default)
def _stack(emit: Emitter, like: Tensor, parts: Sequence[Any], dim: int = 0) -> Any:
    dim %= like.ndim
    row = torch.empty((*like.shape[:dim], 1, *like.shape[dim + 1 :]), dtype=like.dtype, device="meta")
    return emit.op("Concat", [emit.reshape(part, row) for part in parts], like, axis=dim)


@_rule(aten.split_with_sizes.default, aten.split.Tensor)
def _split(emit: Emitter, like: Sequence[Tensor], x: Any, _: Any, dim: int = 0) -> Any:
    # Not as Split: for parts of different sizes ONNX Runtime's CUDA provider then keeps host memory at each call.
    ends = list(itertools.accumulate(part.shape[dim] for part in like))
    return [_slice(emit, part, x, dim, end - part.shape[dim], end) for part, end in zip(like, ends, strict=True)]


@_rule(operator.getitem)
def _getitem(emit: Emitter, like: Tensor, parts: Sequence[Any], index: int) -> Any:
    return parts[index]


@_rule(aten.slice.Tensor)
def _slice(
    emit: Emitter, like: Tensor, x: Any, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Any:
    size = int(x.shape[dim])
    first, last, step = slice(start, end, step).indices(size)
    if (first, last, step) == (0, size, 1):
        return x
    return emit.op("Slice", [x, *(emit.integers([number]) for number in (first, last, dim, step))], like)


@_rule(aten.flip.default)
def _flip(emit: Emitter, like: Tensor, x: Any, dims: Sequence[int]) -> Any:
    count = len(dims)
    bounds = [-1] * count, [torch.iinfo(torch.int64).min] * count, dims, [-1] * count
    return emit.op("Slice", [x, *(emit.integers(numbers) for numbers in bounds)], like)


@_rule(aten.constant_pad_nd.default)
def _pad(emit: Emitter, like: Tensor, x: Any, pads: Sequence[int], value: float = 0.0) -> Any:
    sides = [(before, behind) for before, behind in zip(pads[::2], pads[1::2], strict=True)][::-1]
    sides = [(0, 0)] * (like.ndim - len(sides)) + sides
    if any(width < 0 for side in sides for width in side):
        cuts = [
            (axis, max(0, -before), int(x.shape[axis]) - max(0, -behind))
            for axis, (before, behind) in enumerate(sides)
            if before < 0 or behind < 0
        ]
        sides = [(max(0, before), max(0, behind)) for before, behind in sides]
        shape = [side - sum(added) for side, added in zip(like.shape, sides, strict=True)]
        axes, first, last = zip(*cuts, strict=True)
        x = emit.op(
            "Slice",
            [x, emit.integers(first), emit.integers(last), emit.integers(axes)],
            torch.empty(shape, dtype=like.dtype, device="meta"),
        )
    if not any(width for side in sides for width in side):
        return x
    widths = [before for before, _ in sides] + [behind for _, behind in sides]
    return emit.op("Pad", [x, emit.integers(widths), emit.operand(value, like.dtype)], like)


@_rule(aten.ones_like.default)
def _ones_like(emit: Emitter, like: Tensor, x: Any, **_: Any) -> Any:
    return emit.constant(torch.ones(like.shape, dtype=like.dtype))


@_rule(aten.zeros_like.default)
def _zeros_like(emit: Emitter, like: Tensor, x: Any, **_: Any) -> Any:
    return emit.constant(torch.zeros(like.shape, dtype=like.dtype))


@_rule(aten.index.Tensor)
def _index(emit: Emitter, like: Tensor, table: Any, indices: Sequence[Any]) -> Any:
    (index,) = indices
    return emit.op("Gather", [table, index], like, axis=0)


@_rule(aten.embedding.default)
def _embedding(emit: Emitter, like: Tensor, table: Any, index: Any, *_: Any) -> Any:
    return emit.op("Gather", [table, index], like, axis=0)


# Convolutions, pooling, matrix products, norms


@_rule(aten.convolution.default)
def _convolution(
    emit: Emitter,
    like: Tensor,
    x: Any,
    weight: Any,
    bias: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Any:
    if transposed:
        raise ModelError("a transposed convolution cannot be expressed: no supported UNet has one")
    return emit.op(
        "Conv",
        [x, weight] if bias is None else [x, weight, bias],
        like,
        kernel_shape=[int(side) for side in weight.shape[2:]],
        strides=list(stride),
        pads=[*padding, *padding],
        dilations=list(dilation),
        group=groups,
    )


@_rule(aten.avg_pool2d.default)
def _avg_pool(emit: Emitter, like: Tensor, x: Any, kernel: Sequence[int], stride: Sequence[int] = ()) -> Any:
    return emit.op("AveragePool", [x], like, kernel_shape=list(kernel), strides=list(stride or kernel))


@_rule(aten.upsample_nearest2d.default, aten.upsample_nearest2d.vec)
def _upsample(emit: Emitter, like: Tensor, x: Any, *_: Any) -> Any:
    batch, channels, height, width = x.shape.numpy()
    factors = whole_factors((height, width), like.shape[2:], None)

    def shaped(rows: int, columns: int) -> Tensor:
        return torch.empty((batch, channels, height, rows, width, columns), dtype=like.dtype, device="meta")

    # Not as Resize, which ONNX Runtime does not know in bfloat16.
    enlarged = shaped(*factors)
    apart = emit.reshape(x, shaped(1, 1))
    return emit.reshape(emit.op("Expand", [apart, emit.integers(enlarged.shape)], enlarged), like)


@_rule(aten.bmm.default)
def _matmul(emit: Emitter, like: Tensor, a: Any, b: Any) -> Any:
    return emit.op("MatMul", [a, b], like)


@_rule(aten.mm.default)
def _mm(emit: Emitter, like: Tensor, a: Any, b: Any) -> Any:
    return _addmm(emit, like, None, a, b)


@_rule(aten.addmm.default)
def _addmm(emit: Emitter, like: Tensor, bias: Any, a: Any, b: Any) -> Any:
    inputs, attributes = [a, b], {}
    producer = b.producer()
    if producer is not None and producer.op_type == "Transpose":
        # The transposition of a weight: the node itself is removed with everything else that nobody reads.
        inputs[1], attributes["transB"] = producer.inputs[0], 1
    return emit.op("Gemm", inputs if bias is None else [*inputs, bias], like, **attributes)


def to_onnx(program: TracedProgram, weights: Mapping[str, ir.Value]) -> ir.Model:
    """Return a traced program as an ONNX model; `weights` are its weights' initializers by name.

    Raises ModelError, naming it, for an operation that has no translation.
    """
    import onnx_ir as ir

    emit = Emitter()
    found: dict[Node, Any] = {}
    graph = program.module.graph
    placeholders = iter(graph.find_nodes(op="placeholder"))
    inputs = []
    for name, tensor in program.inputs.items():
        inputs.append(emit.value(name, tensor))
        found[next(placeholders)] = inputs[-1]
    for key in program.weights:
        found[next(placeholders)] = emit.initializers[key] = weights[key]
    for name, tensor in program.constants.items():
        found[next(placeholders)] = emit.constant(tensor, name)
    for node in graph.nodes:
        if node.op == "placeholder":
            continue
        if node.op == "output":
            break
        rule = _RULES.get(node.target)
        if rule is None:
            raise ModelError(f"the {program.name} graph cannot be expressed in ONNX: {node.target} has no translation")
        args, kwargs = map_aggregate(
            (node.args, dict(node.kwargs)), lambda part: found[part] if isinstance(part, Node) else part
        )
        emit.name = node.name
        found[node] = rule(emit, node.meta["val"], *args, **kwargs)
    outputs = []
    for name, result in zip(program.outputs, node.args[0], strict=True):
        value = found[result]
        if value.producer() is None or value in outputs:
            value = emit.op("Identity", [value], result.meta["val"])
        value.name = name
        outputs.append(value)
    return ir.Model(
        ir.Graph(
            inputs,
            outputs,
            nodes=emit.nodes,
            initializers=list(emit.initializers.values()),
            opset_imports={"": OPSET},
            name="main",
        ),
        ir_version=_IR_VERSION,
    )
