"""The UNet as a graph of ATen operations, and its run on pairs of target and difference."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate

from diffloss_engine.errors import ModelError, first_line
from diffloss_engine.exclusive import exclusive
from diffloss_engine.fp32_precision import settings_for_export
from diffloss_trt.difference import RULES, aten, upsampled_conv2d, whole_factors
from diffloss_trt.norms import group_norm
from diffloss_trt.objective import wide
from diffloss_trt.tape import Pair, Tape
from diffloss_trt.unet import TappedUNet


class _Features(nn.Module):
    """What the loss reads of a noisy image: the bottleneck, and the noise unless it is left out."""

    def __init__(self, tapped: TappedUNet, with_noise: bool) -> None:
        super().__init__()
        self.tapped = tapped
        self._with_noise = with_noise

    def forward(self, noisy: Tensor, timesteps: Tensor) -> tuple[Tensor, ...]:
        encoded = self.tapped.encode(noisy, timesteps)
        if not self._with_noise:
            return (encoded.bottleneck,)
        prediction = self.tapped.decode(encoded)
        return encoded.bottleneck, self.tapped.schedule.noise_from(prediction, noisy, timesteps)


class Captured:
    """A module's operations on tensors of fixed shapes, without the parts that can be computed in advance.

    weights: the names in the UNet's state dict of the tensors that `run` wants.
    constants: tensors that depend neither on an input nor on a weight, by names of their own.

    Parameters of `module` are expected below its submodule `tapped`; errors call the graph `name`. Raises ModelError
    for a module whose operations depend on the values of tensors.
    """

    def __init__(self, name: str, module: nn.Module, inputs: Sequence[Tensor]) -> None:
        try:
            with exclusive, torch.no_grad(), settings_for_export():
                exported = torch.export.export(module, tuple(inputs), strict=False)
        # Whatever the module's own code raises, and a dozen classes of the exporter's.
        except Exception as error:
            raise ModelError(f"the {name} graph cannot be traced: {first_line(error)}") from error
        signature = exported.graph_signature
        lifted = {**signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
        tensors = {**exported.constants, **dict(exported.named_buffers())}
        self.graph = exported.graph
        self._weights, self.inputs, known = {}, [], {}
        for node in self.graph.find_nodes(op="placeholder"):
            if node.name in signature.inputs_to_parameters:
                self._weights[node] = signature.inputs_to_parameters[node.name].removeprefix("tapped.unet.")
            elif node.name in lifted:
                known[node] = tensors[lifted[node.name]]
            else:
                self.inputs.append(node)
        for node in self.graph.find_nodes(op="call_function", target=aten._assert_tensor_metadata.default):
            self.graph.erase_node(node)
        folded = self._fold(known)
        self._merge_equals()
        self.graph.eliminate_dead_code()
        self._weights = {node: key for node, key in self._weights.items() if node.users}
        self._constants = {node: node.name for node in folded if node.users}
        self.weights = tuple(self._weights.values())
        self.constants = {node.name: folded[node] for node in self._constants}

    def dependent(self, sources: Iterable[Node]) -> set[Node]:
        """Return `sources` and everything that is computed from them."""
        found = set(sources)
        for node in self.graph.nodes:
            if any(source in found for source in node.all_input_nodes):
                found.add(node)
        return found

    def _fold(self, values: dict[Node, Any]) -> dict[Node, Tensor]:
        """Compute what depends on no input and no weight, given the constants' `values`; leave placeholders for it."""
        unknown = self.dependent([*self.inputs, *self._weights])
        for node in self.graph.nodes:
            if node.op == "call_function" and node not in unknown:
                args, kwargs = _filled(node, values)
                values[node] = node.target(*args, **kwargs)
        folded = {}
        for node, value in reversed(values.items()):
            if node.users:
                with self.graph.inserting_before(node):
                    place = self.graph.placeholder(f"constant_{node.name}")
                node.replace_all_uses_with(place)
                folded[place] = value
            self.graph.erase_node(node)
        return folded

    def _merge_equals(self) -> None:
        """Compute once what several blocks compute alike, such as the activation of the time embedding."""
        first: dict[str, Node] = {}
        for node in self.graph.nodes:
            if node.op == "call_function":
                same = first.setdefault(f"{node.target} {node.args} {node.kwargs}", node)
                if same is not node:
                    node.replace_all_uses_with(same)
                    self.graph.erase_node(node)

    def run(
        self,
        inputs: Sequence[Any],
        weights: Mapping[str, Tensor],
        constants: Mapping[str, Tensor],
        execute: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any],
    ) -> tuple[Any, ...]:
        """Return the module's results; `execute` is given each operation with its arguments."""
        found: dict[Node, Any] = dict(zip(self.inputs, inputs, strict=True))
        found |= {node: weights[key] for node, key in self._weights.items()}
        found |= {node: constants[name] for node, name in self._constants.items()}
        for node in self.graph.nodes:
            if node.op == "call_function":
                found[node] = execute(node.target, *_filled(node, found))
        results, _ = _filled(self.graph.output_node(), found)
        return tuple(results[0])


class CapturedUNet(Captured):
    """The operations between a noisy image of one size and the taps, in a form that can be run on pairs."""

    def __init__(self, tapped: TappedUNet, batch_size: int, resolution: tuple[int, int], *, with_noise: bool) -> None:
        device = tapped.device
        # Fills the schedule's cache of tables with tensors; what the exporter would fill it with is its own.
        tapped.schedule.tables(device, torch.promote_types(tapped.dtype, torch.float32))
        noisy = torch.zeros(batch_size, tapped.channels, *resolution, device=device)
        super().__init__("gradient", _Features(tapped, with_noise), (noisy, torch.zeros(batch_size, device=device)))
        _join_upsamplings(self.graph)
        _join_norms(self.graph, self.dependent(self.inputs[:1]))
        self.graph.eliminate_dead_code()

    def run_pair(
        self, tape: Tape, noisy: Pair, timesteps: Tensor, weights: Mapping[str, Tensor], constants: Mapping[str, Tensor]
    ) -> tuple[Pair, ...]:
        """Return the bottleneck's pair, and the noise's if it was captured.

        timesteps: [B]; weights: the UNet's state dict, in the tape's dtype; constants: as in `self.constants`.
        Raises ModelError, naming it, for an operation that has no difference form.
        """

        def execute(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if not _holds_pair(args):
                return _run_plain(target, args, kwargs)
            if target not in RULES:
                raise ModelError(f"{target} has no difference form, so no gradient graph can be made")
            return RULES[target](tape, *args, **kwargs)

        return self.run((noisy, timesteps), weights, constants, execute)


def _filled(node: Node, values: Mapping[Node, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    filled: tuple[tuple[Any, ...], dict[str, Any]] = map_aggregate(
        (node.args, dict(node.kwargs)), lambda part: values[part] if isinstance(part, Node) else part
    )
    return filled


def _holds_pair(args: Iterable[Any]) -> bool:
    return any(isinstance(arg, Pair) or (isinstance(arg, list | tuple) and _holds_pair(arg)) for arg in args)


def _run_plain(target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run what depends on the timestep alone, in float32 at least: it is little work, and everything is built on it."""

    def widen(part: Any) -> Any:
        return wide(part) if isinstance(part, Tensor) and part.is_floating_point() else part

    args, kwargs = map_aggregate((args, kwargs), widen)
    if target is aten.to.dtype and args[0].is_floating_point() and args[1].is_floating_point:
        return args[0].to(torch.promote_types(args[1], torch.float32))
    return target(*args, **kwargs)


def _join_norms(graph: Graph, dependent: set[Node]) -> None:
    """Make one operation of each group norm, the scale and shift that depend on the timestep, and the silu behind."""
    for norm in graph.find_nodes(op="call_function", target=aten.group_norm.default):
        x, groups, gain, offset, eps = norm.args[:5]
        last, time_scale, time_shift = norm, None, None
        product = _only_user(last, aten.mul.Tensor, dependent)
        total = product and _only_user(product, aten.add.Tensor, dependent)
        if product and total and isinstance(product.args[1], Node) and isinstance(total.args[1], Node):
            last, time_scale, time_shift = total, product.args[1], total.args[1]
        activation = _only_user(last, aten.silu.default, dependent)
        with graph.inserting_before(activation or last):
            joined = graph.call_function(
                group_norm,
                (x, groups, gain, offset, eps, time_scale, time_shift),
                {"activate": activation is not None},
            )
        (activation or last).replace_all_uses_with(joined)


def _join_upsamplings(graph: Graph) -> None:
    """Make one operation of each upsampling and convolution behind it that keeps the enlarged size."""
    for upsampling in graph.find_nodes(op="call_function", target=aten.upsample_nearest2d.vec):
        x, *to = upsampling.args
        for conv in [user for user in upsampling.users if user.target is aten.conv2d.default]:
            args: tuple[Any, ...] = conv.args
            defaults: tuple[Any, ...] = (None, None, None, [1], [0], [1], 1)
            _, weight, bias, stride, padding, dilation, groups = (*args, *defaults[len(args) :])
            if {*stride, *dilation, groups} != {1} or conv.meta["val"].shape[2:] != upsampling.meta["val"].shape[2:]:
                continue
            factors = whole_factors(x.meta["val"].shape[2:], *to)
            with graph.inserting_before(conv):
                joined = graph.call_function(upsampled_conv2d, (x, factors, weight, bias, (padding[0], padding[-1])))
            conv.replace_all_uses_with(joined)


def _only_user(node: Node, target: Any, dependent: set[Node]) -> Node | None:
    """Return the only user of `node` if it is this operation, with `node` first and nothing else of the image."""
    users = list(node.users)
    if len(users) != 1 or users[0].target is not target or users[0].args[0] is not node or users[0].kwargs:
        return None
    rest = users[0].all_input_nodes[1:]
    return None if any(other in dependent for other in rest) else users[0]
