"""What diffusers' configuration of a UNet cannot say, written down and read again."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor

from diffloss_trt.unet_config import build_unet, describe_unet
from unets import KINDS, make_unet


def output(unet: Any) -> Tensor:
    size = unet.config.sample_size
    noisy = torch.randn(2, unet.config.in_channels, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        result: Tensor = unet(noisy, torch.tensor([3, 700])).sample
    return result


def again(unet: Any) -> Any:
    """Return the UNet that is made from the description of another one, with its weights."""
    made = build_unet(json.loads(json.dumps(describe_unet(unet))))
    made.load_state_dict(unet.state_dict(), assign=True)
    return made.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_usual_unets_need_nothing_more(kind: str) -> None:
    unet = make_unet(kind, dtype=torch.float32)
    assert "diffloss" not in describe_unet(unet)
    assert torch.equal(output(again(unet)), output(unet))


def test_heads_that_were_set_on_the_unet() -> None:
    unet = make_unet(dtype=torch.float32)
    usual = output(unet)
    attention = unet.down_blocks[1].attentions[0]
    attention.heads, attention.scale = 2, (attention.inner_dim // 2) ** -0.5
    assert not torch.allclose(output(unet), usual, rtol=1e-3)
    assert describe_unet(unet)["diffloss"] == {"attention_heads": {"down_blocks.1.attentions.0": 2}}
    assert torch.equal(output(again(unet)), output(unet))
    # What comes back says the same of itself, and so do copies.
    for same in (again(unet), copy.deepcopy(unet)):
        assert json.dumps(describe_unet(same), sort_keys=True) == json.dumps(describe_unet(unet), sort_keys=True)


def test_sinusoid_of_another_width() -> None:
    unet = make_unet(dtype=torch.float32)
    unet.time_proj, unet.time_embedding = Timesteps(48, True, 0), TimestepEmbedding(48, 64)
    assert describe_unet(unet)["diffloss"] == {"timestep_channels": 48}
    assert torch.equal(output(again(unet)), output(unet))


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ([], "must be an object"),
        ({"heads": 3}, "must be an object with 'attention_heads'"),
        ({"attention_heads": [2]}, r"must be an object with 'attention_heads' \(an object\)"),
        ({"attention_heads": {"conv_in": 2}}, "no attention 'conv_in'"),
        ({"attention_heads": {"mid_block.attentions.0": 3}}, "3 of 'mid_block.attentions.0' does not divide its 32"),
        ({"attention_heads": {"mid_block.attentions.0": 0}}, "0 of"),
        ({"attention_heads": {"mid_block.attentions.0": "2"}}, "'2' of"),
        ({"attention_heads": {"mid_block.attentions.0": True}}, "True of"),
        ({"timestep_channels": 1}, "timestep_channels: 1"),
        ({"timestep_channels": 8.0}, "timestep_channels: 8.0"),
    ],
    ids=str,
)
def test_what_cannot_be_meant(own: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_unet(describe_unet(make_unet()) | {"diffloss": own})


def test_sinusoid_of_a_unet_that_has_none() -> None:
    config = describe_unet(make_unet("learned_time"))
    with pytest.raises(ValueError, match="positional time embedding"):
        build_unet(config | {"diffloss": {"timestep_channels": 48}})
