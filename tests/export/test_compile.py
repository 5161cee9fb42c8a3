"""`diffloss-export build --backend inductor`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from torch._inductor import config

from diffloss_export.cli import main
from diffloss_trt.evaluators import FusedEvaluator
from exports import Exported, without_gradient


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a plan cache's folder, which is the user's."""
    monkeypatch.setenv("DIFFLOSS_CACHE", str(tmp_path / "plans"))
    return tmp_path / "plans"


@pytest.mark.slow
def test_command(exported: Callable[..., Exported], capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    path = str(exported("one_level", "bf16").bundle.path)
    arguments = ["build", path, "--backend", "inductor", "--device", "cpu"]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.out.count("built in") == 2
    assert "compiling the gradient graph" in captured.err
    assert main(arguments) == 0
    assert capsys.readouterr().out.count("in the cache") == 2
    assert len(list(folder.glob("*.plan"))) == 2

    assert main(["inspect", path]) == 0
    assert capsys.readouterr().out.count("plan of inductor") == 2
    assert main(["inspect", path, "--json"]) == 0
    plans = json.loads(capsys.readouterr().out)["plans"]
    assert plans.keys() == {"gradient", "semantic_gradient"}
    assert not any(plan["outdated"] for found in plans.values() for plan in found)

    assert main(["verify", path, "--backend", "inductor", "--device", "cpu"]) == 0
    assert "gradient, run by inductor" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--backend", "inductor", "--workspace", "10"], "inductor takes none of the options of TensorRT's builder"),
        (["--backend", "inductor", "--timing-cache", "t"], "inductor takes none of the options"),
        (["--backend", "inductor", "--device", "tpu"], "expected 'cpu', 'cuda' or 'cuda:N'"),
        (["--backend", "tensorrt-rtx", "--device", "cpu"], "--device is for inductor"),
    ],
)
def test_options_that_do_not_belong_together(
    arguments: list[str], said: str, exported: Callable[..., Exported], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", str(exported().bundle.path), *arguments]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("diffloss-export: ")
    assert said in last


def test_a_missing_compiler_is_told_of_before_anything_is_traced(
    exported: Callable[..., Exported], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FusedEvaluator, "trace", lambda *_: pytest.fail("it was traced"))
    with config.patch({"cpp.cxx": ("no-such-compiler",)}):
        assert main(["build", str(exported().bundle.path), "--backend", "inductor", "--device", "cpu"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("diffloss-export: inductor cannot compile here: No working C++ compiler found")


def test_a_bundle_without_gradient_graphs(
    exported: Callable[..., Exported], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = without_gradient(exported().bundle.path, tmp_path / "bundle")
    for command in ("build", "verify"):
        assert main([command, str(folder), "--backend", "inductor", "--device", "cpu"]) == 2
        assert "has no gradient graph, and inductor compiles only those" in capsys.readouterr().err
