"""The restoration network: any size, identity at first, and every weight of it learns."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from restoration_network import ChannelNorm, RestorationNetwork


@pytest.fixture
def trained() -> RestorationNetwork:
    """A network whose last layer is not zero any more."""
    network = RestorationNetwork()
    nn.init.normal_(network.leave.weight, std=0.02)
    return network


def test_it_is_compact() -> None:
    assert 300_000 <= sum(parameter.numel() for parameter in RestorationNetwork().parameters()) <= 600_000


@pytest.mark.parametrize("size", [(1, 1), (2, 7), (16, 16), (33, 50)])
def test_a_new_network_returns_its_input(size: tuple[int, int]) -> None:
    degraded = torch.rand(2, 3, *size)
    assert torch.equal(RestorationNetwork()(degraded), degraded)


def test_padding_is_inside(trained: RestorationNetwork) -> None:
    degraded = torch.rand(1, 3, 30, 41)
    padded = F.pad(degraded, (0, 3, 0, 2), mode="replicate")
    torch.testing.assert_close(trained(degraded), trained(padded)[..., :30, :41], rtol=0, atol=1e-6)
    assert not torch.equal(trained(degraded), degraded)


def test_images_of_a_batch_do_not_influence_each_other(trained: RestorationNetwork) -> None:
    degraded = torch.rand(3, 3, 16, 16)
    alone = torch.cat([trained(image[None]) for image in degraded])
    torch.testing.assert_close(trained(degraded), alone, rtol=0, atol=1e-5)


def test_every_parameter_gets_a_gradient(trained: RestorationNetwork) -> None:
    trained(torch.rand(2, 3, 16, 16)).square().mean().backward()
    idle = [name for name, p in trained.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert idle == []


def test_it_learns() -> None:
    network = RestorationNetwork()
    target = torch.rand(2, 3, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    degraded = 0.3 * target + 0.05 * torch.randn(target.shape)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    before = F.mse_loss(degraded, target).item()
    for _ in range(40):
        loss = F.mse_loss(network(degraded), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert F.mse_loss(network(degraded), target).item() < 0.1 * before


def test_weights_round_trip(trained: RestorationNetwork) -> None:
    degraded = torch.rand(1, 3, 16, 16)
    other = RestorationNetwork()
    other.load_state_dict(trained.state_dict())
    assert torch.equal(other(degraded), trained(degraded))


def test_channel_norm_normalises_each_pixel_by_itself() -> None:
    features = 3 * torch.randn(2, 16, 5, 6) + 1
    normed = ChannelNorm(16)(features)
    expected = F.layer_norm(features.permute(0, 2, 3, 1), (16,), eps=1e-5).permute(0, 3, 1, 2)
    torch.testing.assert_close(normed, expected, rtol=1e-5, atol=1e-6)
