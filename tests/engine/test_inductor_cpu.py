"""What is rewritten before inductor compiles a program for CPUs: results stay what they were, but for rounding."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from diffloss_engine.inductor_cpu import prepare


class Centred(nn.Module):
    """Differences from a group's mean, by a factor for each channel that is a view of another layout, and tanh."""

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        of_channels = image.mean((2, 3))
        of_groups = of_channels.reshape(2, 3, 4).mean(2, keepdim=True)
        centred = image - of_groups.expand(-1, -1, 4).reshape(2, 12, 1, 1)
        factors = (of_channels * 3).reshape(2, 4, 3).transpose(1, 2).reshape(2, 12, 1, 1)
        transposed = (of_channels.T.abs() + 1).T[:, :, None, None]
        return (torch.tanh(centred * factors) / transposed,)


def program_and_image() -> tuple[Centred, Tensor]:
    return Centred(), torch.randn(2, 12, 8, 8, generator=torch.Generator().manual_seed(0))


def prepared(program: nn.Module, argument: Tensor) -> ExportedProgram:
    exported = torch.export.export(program, (argument,))
    prepare(exported.graph)
    exported.graph_module.recompile()
    return exported


def error(found: Tensor, image: Tensor) -> float:
    (expected,) = Centred()(image.double())
    return float((found.double() - expected).norm() / expected.norm())


def test_a_prepared_program_computes_the_same() -> None:
    program, image = program_and_image()
    exported = prepared(program, image)
    stored = exported.graph.find_nodes(op="call_function", target=torch.ops.aten.as_strided.default)
    assert [tuple(node.args[1]) for node in stored] == [(2, 12, 1, 1)] * 3
    assert not exported.graph.find_nodes(op="call_function", target=torch.ops.aten.tanh.default)
    (found,) = exported.module()(image)
    assert error(found, image) < 1e-6


def test_small_values_keep_their_digits() -> None:
    class Tanh(nn.Module):
        def forward(self, values: Tensor) -> tuple[Tensor, ...]:
            return (torch.tanh(values),)

    values = torch.cat([torch.logspace(-30, 2, 6001), torch.tensor([0.0, torch.inf, torch.nan])])
    values = torch.cat([values, -values])
    (found,) = prepared(Tanh(), values).module()(values)
    expected = torch.tanh(values.double())
    assert torch.equal(found.isnan(), expected.isnan())
    numbers = ~expected.isnan()
    torch.testing.assert_close(found[numbers].double(), expected[numbers], rtol=1e-6, atol=0)
