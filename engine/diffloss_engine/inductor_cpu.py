"""What a program needs before inductor (torch 2.13) makes right and fast code for CPUs of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx

aten = torch.ops.aten

# An operand is small if it is read this many times: about as often as a vector register has lanes.
_READS = 16


def prepare(graph: Graph) -> None:
    """Rewrite an exported program's graph in place: what it computes stays the same, but for rounding."""
    _store_what_is_broadcast(graph)
    _write_out_tanh(graph)
    _keep_sums_out_of_place(graph)


def _store_what_is_broadcast(graph: Graph) -> None:
    """Have a small operand that is broadcast over a large one computed once, and read from memory.

    Inductor computes it anew for each element; and of one value for each group of channels, as group norm has, it
    collects a vector lane by lane, with a division of integers for each.
    """
    stored: dict[Node, Node] = {}
    for node in [node for node in graph.nodes if torch.Tag.pointwise in getattr(node.target, "tags", ())]:
        large = node.meta["val"].numel()
        for small in node.all_input_nodes:
            if small.op != "call_function" or not 1 < small.meta["val"].numel() <= large // _READS:
                continue
            if small not in stored:
                plain = small.meta["val"].contiguous()
                with graph.inserting_after(small):
                    copy = graph.call_function(aten.clone.default, (small,), {"memory_format": torch.contiguous_format})
                # Changes nothing, but needs an operand that lies in memory; other copies inductor computes on the way.
                with graph.inserting_after(copy):
                    arguments = copy, list(plain.shape), list(plain.stride())
                    stored[small] = graph.call_function(aten.as_strided.default, arguments)
            node.replace_input_with(small, stored[small])


def _write_out_tanh(graph: Graph) -> None:
    """Compute tanh by `_tanh`, which takes less time than the library function that inductor calls."""
    written_out = make_fx(_tanh)(torch.zeros(1)).graph
    (argument,) = written_out.find_nodes(op="placeholder")
    for node in graph.find_nodes(op="call_function", target=aten.tanh.default):
        with graph.inserting_before(node):
            result: Any = graph.graph_copy(written_out, {argument: node.args[0]})
        node.replace_all_uses_with(result)
        graph.erase_node(node)


def _tanh(x: Tensor) -> Tensor:
    """Return tanh from exp, and near zero, where that cancels, from its series: to 1e-6 of the result everywhere."""
    square = x * x
    near_zero = x * (1 - square * (1 / 3 - square * (2 / 15)))
    return torch.where(square < 1 / 64, near_zero, 2 / (1 + torch.exp(-2 * x)) - 1)


def _keep_sums_out_of_place(graph: Graph) -> None:
    """Write each sum of a convolution and another tensor as a difference, which has the same value to the last bit.

    Inductor lets such a convolution add to the other tensor in place, also where something that was computed from that
    tensor, and is computed again where it is used, is still to be used: it then reads the sum.
    """
    convolutions = {*graph.find_nodes(op="call_function", target=aten.convolution.default)}
    for node in graph.find_nodes(op="call_function", target=aten.add.Tensor):
        if node.kwargs or not all(isinstance(term, Node) for term in node.args):
            continue
        first, second = node.args
        if first in convolutions:
            first, second = second, first
        if second in convolutions:
            with graph.inserting_before(node):
                node.args = (first, graph.call_function(aten.neg.default, (second,)))
            node.target = aten.sub.Tensor


@contextmanager
def loops_split_evenly() -> Iterator[None]:
    """Have inductor split a loop into rows only where it has as many steps as whole rows.

    Inductor splits the loop over channels at the size of a group, to read one value per group, and leaves out the last
    steps where the loop is over the first 64 of 96 channels, say, and a group has 12. What other threads compile
    meanwhile is split likewise.
    """
    from torch._inductor.codegen.cpp import CppScheduling
    from torch._inductor.ir import ComputedBuffer
    from torch.utils._sympy.functions import FloorDiv

    split = CppScheduling.try_loop_split

    def split_evenly(scheduling: CppScheduling, nodes: list[Any]) -> list[Any]:
        for node in (node for node in nodes if isinstance(node.node, ComputedBuffer)):
            (sizes, _), body, (variables, _) = node.node.get_default_sizes_body()
            steps = dict(zip(variables, sizes, strict=True))
            indices = [index for index in body.indexing_exprs.values() if hasattr(index, "find")]  # not a plain number
            divisions = {division.args for index in indices for division in index.find(FloorDiv)}
            if any(steps[variable] % divisor for variable, divisor in divisions if variable in steps):
                return nodes
        whole: list[Any] = split(scheduling, nodes)
        return whole

    CppScheduling.try_loop_split = split_evenly  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        CppScheduling.try_loop_split = split  # type: ignore[method-assign]
