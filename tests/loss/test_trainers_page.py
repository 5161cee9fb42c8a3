"""docs/trainers.md: every piece of code on the page runs as it stands, and trains the network."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from diffloss_trt import NoiseSchedule
from diffloss_trt.conventions import PerceptualDiffLoss
from layout import ROOT

Batch = tuple[Tensor, Tensor, Tensor, Tensor]
PAGE = (ROOT / "docs" / "trainers.md").read_text(encoding="utf-8")
SECTIONS = {section.partition("\n")[0]: section for section in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]}


def code(section: str, language: str = "python") -> str:
    """Return the one piece of code of a section."""
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", SECTIONS[section], flags=re.MULTILINE | re.DOTALL)
    return str(found)


@pytest.fixture(autouse=True)
def bundle(exported: tuple[Path, Any, NoiseSchedule], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the current folder have a bundle called `bundle`."""
    (tmp_path / "bundle").symlink_to(exported[0])
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def names(make_batch: Callable[..., Batch]) -> dict[str, Any]:
    """Return what the page takes for granted: `network`, `loader`, `optimizer`."""
    degraded, target, *_ = ((tensor + 1) / 2 for tensor in make_batch(dtype=torch.float32))
    pairs = torch.utils.data.TensorDataset(degraded, target)
    network = nn.Conv2d(3, 3, 1)
    return {
        "network": network,
        "loader": torch.utils.data.DataLoader(pairs, batch_size=2),
        "optimizer": torch.optim.SGD(network.parameters(), lr=0.1),
    }


def test_every_piece_of_code_is_run_here() -> None:
    assert PAGE.count("```python\n") == 5
    assert PAGE.count("```yaml\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="the page leaves it to its reader to move images to a GPU")
# Lightning's advice on loaders, on logging in short trainings, and on its default logger, which it can do without.
@pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX` has been removed:UserWarning")
@pytest.mark.filterwarnings("ignore:.*(does not have many workers|smaller than the logging interval):UserWarning")
@pytest.mark.parametrize(
    ("section", "package"),
    [
        ("Plain PyTorch", "torch"),
        ("Lightning", "lightning"),
        ("Hugging Face Accelerate", "accelerate"),
        ("piq and pyiqa", "torch"),
    ],
)
def test_code_trains_the_network(section: str, package: str, names: dict[str, Any]) -> None:
    pytest.importorskip(package, reason=f"{package} is not installed")
    network = names["network"]
    before = copy.deepcopy(network.state_dict())
    exec(compile(code(section), f"docs/trainers.md, {section}", "exec"), names)
    assert any((tensor != before[name]).any() for name, tensor in network.state_dict().items())


def test_basicsr_code_registers_what_the_options_name(monkeypatch: pytest.MonkeyPatch) -> None:
    entries: dict[str, Any] = {}

    class Registry:
        def register(self) -> Callable[[Any], None]:
            return lambda entry: entries.update({entry.__name__: entry})

    # In the place of the package, which does not import beside today's torchvision.
    for name in ("basicsr", "basicsr.utils", "basicsr.utils.registry"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["basicsr.utils.registry"].LOSS_REGISTRY = Registry()  # type: ignore[attr-defined]
    exec(compile(code("BasicSR"), "docs/trainers.md, BasicSR", "exec"), {})
    options = yaml.safe_load(code("BasicSR", "yaml"))["perceptual_opt"]
    loss = entries[options.pop("type")](**options)
    assert isinstance(loss, PerceptualDiffLoss)
    assert (loss.criterion.loss_fn.naturalness_weight, loss.criterion.loss_fn.semantic_weight) == (1e-3, 1e-6)
