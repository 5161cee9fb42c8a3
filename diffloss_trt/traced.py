"""A program as a list of ATen operations on static shapes: what every backend is made from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self

from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

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
        module = make_fx(function, tracing_mode="fake")(inputs, weights, constants)
        module.graph.eliminate_dead_code()
        module.recompile()
        return cls(name, module, inputs, tuple(weights), constants, outputs)

    @property
    def results(self) -> Tensors:
        """What the outputs look like: tensors without data, by name."""
        nodes = self.module.graph.output_node().all_input_nodes
        return {name: node.meta["val"] for name, node in zip(self.outputs, nodes, strict=True)}

    def bind(self, weights: Mapping[str, Tensor]) -> Callable[..., tuple[Tensor, ...]]:
        """Return the program as a function of the input tensors alone, in the order of `inputs`."""
        held = {name: weights[name] for name in self.weights}

        def run(*tensors: Tensor) -> tuple[Tensor, ...]:
            results = self.module(dict(zip(self.inputs, tensors, strict=True)), held, self.constants)
            return tuple(results)

        return run
