"""A program as a list of ATen operations on static shapes: what every backend is made from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from diffloss_engine.exclusive import exclusive

aten = torch.ops.aten

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class TracedProgram:
    """A traced function of tensors.

    module: called with three mappings, of inputs, weights and constants, returns a tuple of tensors.
    inputs: an example of each input, by name.
    weights: the names of weights in the UNet's state dict.
    constants: tensors by name.
    outputs: names.
    """

    name: str
    module: GraphModule
    inputs: Tensors
    weights: tuple[str, ...]
    constants: Tensors
    outputs: tuple[str, ...]

    @classmethod
    def trace(
        cls,
        name: str,
        function: Callable[[Tensors, Tensors, Tensors], tuple[Tensor, ...]],
        inputs: Tensors,
        weights: Tensors,
        constants: Tensors,
        outputs: tuple[str, ...],
    ) -> Self:
        """Trace `function` on tensors that look like these; nothing is computed."""
        with exclusive:
            module = make_fx(function, tracing_mode="fake")(inputs, weights, constants)
        # In which layout a convolution's result lies is decided anew wherever the program runs: torch.export, for one,
        # expects another from a GPU than cuDNN gives. A view would be an error where the layout does not allow it.
        for view in (aten.view.default, aten._unsafe_view.default):
            for node in module.graph.find_nodes(op="call_function", target=view):
                node.target = aten.reshape.default
        module.graph.eliminate_dead_code()
        module.recompile()
        return cls(name, module, inputs, tuple(weights), constants, outputs)

    @property
    def results(self) -> Tensors:
        """What the outputs look like: tensors without data, by name."""
        # Not `all_input_nodes`, which names a tensor once that is two of the outputs.
        nodes: Any = self.module.graph.output_node().args[0]
        return {name: node.meta["val"] for name, node in zip(self.outputs, nodes, strict=True)}

    def bind(self, weights: Mapping[str, Tensor]) -> nn.Module:
        """Return the program as a function of the input tensors alone, in the order of `inputs`, to a tuple."""
        return _Bound(self, {name: weights[name] for name in self.weights})


class _Bound(nn.Module):
    """A program with its weights and constants as buffers, which is where a compiler looks for them."""

    def __init__(self, program: TracedProgram, weights: Tensors) -> None:
        super().__init__()
        self._run = program.module
        self._inputs = tuple(program.inputs)
        # A buffer's name may hold no dots.
        self._weights = {name: f"weight_{index}" for index, name in enumerate(weights)}
        self._constants = {name: f"constant_{index}" for index, name in enumerate(program.constants)}
        for places, tensors in ((self._weights, weights), (self._constants, program.constants)):
            for name, place in places.items():
                self.register_buffer(place, tensors[name].detach())

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs = dict(zip(self._inputs, tensors, strict=True))
        weights, constants = (
            {name: getattr(self, place) for name, place in places.items()}
            for places in (self._weights, self._constants)
        )
        return tuple(self._run(inputs, weights, constants))
