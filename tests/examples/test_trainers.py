"""The trainers' examples, each run by its own trainer on the built-in prior and photographs."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import train_basicsr
import train_criteria
import train_pytorch
from diffloss_trt import DiffLoss
from diffloss_trt.conventions import DiffLossCriterion
from restoration_network import RestorationNetwork

EXAMPLES = Path(__file__).parents[2] / "examples"
LOADERS_ADVICE = "ignore:.*does not have many workers:UserWarning"


@pytest.fixture
def loss_fn(builtin_bundle: Path) -> DiffLoss:
    return DiffLoss.load(builtin_bundle, device="cpu", naturalness_weight=0.1, semantic_weight=1e-3)


@pytest.fixture
def run(
    builtin_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """(module, *arguments) -> what `main` of an example prints when it is run on the bundle for two steps."""

    def run(module: Any, *arguments: str) -> str:
        command = [f"{module.__name__}.py", str(builtin_bundle), "--steps", "2", *arguments]
        monkeypatch.setattr(sys, "argv", command)
        assert module.main() == 0
        return capsys.readouterr().out

    return run


def logged(printed: str, name: str) -> list[float]:
    """Return the values of `name` that an example has printed, one for each step."""
    return [float(value) for value in re.findall(rf"\b{name} (\S+?),?(?:\s|$)", printed)]


def test_plain_pytorch(run: Callable[..., str]) -> None:
    printed = run(train_pytorch)
    assert logged(printed, "weight") == [0.1, 0.1]
    assert all(value > 0 for value in logged(printed, "diffloss") + logged(printed, "pixel"))
    assert len(printed.splitlines()) == 2


def test_plain_pytorch_warms_the_weight_up(loss_fn: DiffLoss) -> None:
    history = train_pytorch.train(loss_fn, 4)
    assert [entry["weight"] for entry in history] == pytest.approx([0.05, 0.1, 0.1, 0.1])


@pytest.mark.filterwarnings(LOADERS_ADVICE)
def test_lightning(run: Callable[..., str], tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason="Lightning is not installed")
    import train_lightning

    out = tmp_path / "out"
    run(train_lightning, "--out", str(out))
    rows = list(csv.DictReader((out / "metrics.csv").read_text().splitlines()))
    totals = [float(row["diffloss/total_step"]) for row in rows if row["diffloss/total_step"]]
    (epoch,) = (float(row["diffloss/total_epoch"]) for row in rows if row["diffloss/total_epoch"])
    assert len(totals) == 2
    assert min(totals) > 0
    assert epoch == pytest.approx(sum(totals) / 2, rel=1e-5)
    # The checkpoint holds the network and where the draws are: nothing of the prior is in it.
    state = torch.load(out / "last.ckpt", weights_only=True)["state_dict"]
    assert state.pop("loss_fn.draws._extra_state").tolist() == [0, 2]
    assert state.keys() == {f"network.{name}" for name in RestorationNetwork().state_dict()}


def test_accelerate(run: Callable[..., str]) -> None:
    pytest.importorskip("accelerate", reason="Accelerate is not installed")
    import train_accelerate

    printed = run(train_accelerate)
    total, naturalness, semantic = (logged(printed, name) for name in ("total", "naturalness", "semantic"))
    assert len(total) == 2
    assert total == pytest.approx([0.1 * n + 1e-3 * s for n, s in zip(naturalness, semantic, strict=True)], rel=1e-2)


def test_list_of_criteria(run: Callable[..., str], builtin_bundle: Path) -> None:
    printed = run(train_criteria)
    assert len(logged(printed, "mse")) == len(logged(printed, "diffloss")) == 2
    # From the second step on a criterion has moved the network, and with it the other one.
    mse: dict[str, nn.Module] = {"mse": nn.MSELoss()}
    diffloss = DiffLossCriterion(builtin_bundle, loss_weight=1e4, device="cpu")
    alone, both = (train_criteria.train(criteria, 64, 2) for criteria in (mse, mse | {"diffloss": diffloss}))
    assert alone[0]["mse"] == both[0]["mse"]
    assert alone[1]["mse"] != both[1]["mse"]


def test_basicsr(builtin_bundle: Path) -> None:
    try:
        train_basicsr.import_basicsr()
    except ImportError as error:
        pytest.skip(f"BasicSR cannot be imported: {error}")
    model, history = train_basicsr.train(str(builtin_bundle), 2)
    assert [entry.keys() for entry in history] == [{"l_pix", "l_percep"}] * 2
    assert all(entry["l_percep"] > 0 for entry in history)
    assert any((parameter != 0).any() for parameter in model.net_g.leave.parameters())


def test_without_basicsr_that_is_said_in_one_line(builtin_bundle: Path, tmp_path: Path) -> None:
    # A torchvision that cannot be imported, and so no BasicSR either.
    (tmp_path / "torchvision.py").write_text("raise ImportError('no torchvision here')")
    code = f"import sys; sys.path[:0] = {[str(tmp_path), str(EXAMPLES)]}; import train_basicsr; train_basicsr.main()"
    done = subprocess.run(
        [sys.executable, "-c", code, str(builtin_bundle)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.endswith("error: BasicSR cannot be imported: no torchvision here")


@pytest.mark.parametrize("module", [train_pytorch, train_criteria], ids=lambda module: module.__name__)
def test_no_bundle_is_one_line(
    module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [module.__name__, str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="2"):
        module.main()
    assert len(capsys.readouterr().err.splitlines()) == 1
