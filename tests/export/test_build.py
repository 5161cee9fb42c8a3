"""Real builds of whole bundles with TensorRT-RTX, which needs no GPU for them."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from plan_traffic import kernels

from diffloss_engine import BackendError
from diffloss_engine.bundle import Bundle
from diffloss_engine.plan_cache import PlanCache
from diffloss_engine.trt_build import BuildOptions
from diffloss_engine.trt_session import plan_key
from diffloss_export.build import build_bundle
from diffloss_export.cli import main
from diffloss_export.pipeline import write_graphs, write_unet
from diffloss_trt.contract import GRADIENT
from diffloss_trt.unet import TappedUNet
from exports import Exported, edit_json, make_model, rehash, without_gradient

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")

RTX = "tensorrt-rtx"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a plan cache's folder, which is the user's."""
    monkeypatch.setenv("DIFFLOSS_CACHE", str(tmp_path / "plans"))
    return tmp_path / "plans"


@pytest.mark.parametrize(
    "settings",
    [
        # As the tests of the pipeline export them, too.
        ("one_channel", "fp32", "epsilon", (16, 32)),
        ("variance", "fp16", "v_prediction"),
        ("one_level", "bf16"),
        pytest.param(("two_levels", "fp16"), marks=pytest.mark.slow),
        pytest.param(("two_levels", "fp32"), marks=pytest.mark.slow),
        pytest.param(("two_levels", "bf16"), marks=pytest.mark.slow),
        pytest.param(("adm", "fp32"), marks=pytest.mark.slow),
        pytest.param(("four_levels", "bf16"), marks=pytest.mark.slow),
        pytest.param(("adm", "fp16"), marks=pytest.mark.slow),
        pytest.param(("adm", "bf16"), marks=pytest.mark.slow),
        pytest.param(("asymmetric_padding", "fp32"), marks=pytest.mark.slow),
        pytest.param(("asymmetric_padding", "bf16"), marks=pytest.mark.slow),
        pytest.param(("skip_blocks", "fp16"), marks=pytest.mark.slow),
        pytest.param(("learned_time", "fp32"), marks=pytest.mark.slow),
    ],
    ids=lambda settings: "-".join(map(str, settings)),
)
def test_every_graph_becomes_a_plan(settings: tuple[Any, ...], exported: Callable[..., Exported]) -> None:
    bundle = exported(*settings).bundle
    stages: list[str] = []
    plans = build_bundle(bundle, flavour=RTX, on_stage=stages.append)
    assert [plan.graph for plan in plans] == list(bundle.graphs)
    assert all(plan.bytes > 10_000 and plan.seconds is not None and plan.seconds > 0 for plan in plans)
    for name in bundle.graphs:
        assert f"building the {name} graph" in stages
    again = build_bundle(bundle, flavour=RTX)
    assert [(plan.graph, plan.bytes, None) for plan in plans] == [
        (plan.graph, plan.bytes, plan.seconds) for plan in again
    ]


@pytest.mark.slow
def test_a_plan_computes_nothing_from_weights_alone(tmp_path: Path) -> None:
    """Kernels flipped, summed and padded are made when a plan is built, not at every step."""
    blocks: dict[str, Any] = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    model = make_model("two_levels", block_out_channels=(16, 16), add_attention=False, **blocks)
    tapped = TappedUNet(model.unet, model.schedule).to(torch.float16)
    write_unet(tapped, tmp_path)
    write_graphs(tapped, tmp_path, 1, (16, 16))
    found, _ = kernels(tmp_path / f"{GRADIENT}.onnx")
    assert len(found) > 50
    assert [kernel["Name"] for kernel in found if not kernel["Inputs"]] == []


@pytest.fixture(scope="module")
def bundle(exported: Callable[..., Exported], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Return a bundle without the gradient graphs, which take a builder most of its time."""
    return Bundle.open(without_gradient(exported().bundle.path, tmp_path_factory.mktemp("build") / "bundle"))


def test_other_options_are_another_plan(bundle: Bundle) -> None:
    cache = PlanCache()
    for options in (BuildOptions(), BuildOptions(compute_capabilities=("8.9",))):
        assert all(plan.seconds for plan in build_bundle(bundle, flavour=RTX, options=options, cache=cache))
    assert len(cache.list_keys()) == 2 * len(bundle.graphs)


def test_a_bundle_that_claims_another_precision_is_not_built(copied: Callable[..., Path], folder: Path) -> None:
    path = copied()
    edit_json(path / "manifest.json", lambda manifest: manifest.update(precision="fp16"))
    with pytest.raises(BackendError, match="not HALF, as expected in fp16"):
        build_bundle(Bundle.open(path), flavour=RTX)
    assert not list(folder.glob("*.plan"))


def test_another_weight_is_another_plan(bundle: Bundle, tmp_path: Path) -> None:
    path = Path(shutil.copytree(bundle.path, tmp_path / "copied"))
    build_bundle(Bundle.open(path), flavour=RTX)
    weights = path / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    rehash(path)
    assert all(plan.seconds for plan in build_bundle(Bundle.open(path), flavour=RTX))


# The command


def test_command(bundle: Bundle, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    assert main(["build", str(bundle.path), "--backend", RTX, "--compute-capability", "8.9"]) == 0
    out = capsys.readouterr().out
    for name in bundle.graphs:
        assert f"{name}: " in out
    assert "built in" in out
    assert str(folder) in out
    assert main(["build", str(bundle.path), "--backend", RTX, "--compute-capability", "8.9"]) == 0
    assert "built in" not in capsys.readouterr().out

    assert main(["inspect", str(bundle.path)]) == 0
    assert capsys.readouterr().out.count("plan of tensorrt-rtx") == len(bundle.graphs)
    assert main(["inspect", str(bundle.path), "--json"]) == 0
    plans = json.loads(capsys.readouterr().out)["plans"]
    assert plans.keys() == bundle.graphs.keys()
    for (plan,) in plans.values():
        assert plan["options"]["compute_capabilities"] == ["8.9"]
        assert plan["bytes"] == Path(plan["path"]).stat().st_size > 10_000
        assert not plan["outdated"]


def test_plans_that_other_code_made_are_marked(
    bundle: Bundle, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    """No load uses them, and they can be deleted."""
    name = "encoder"
    key = plan_key(
        RTX, bundle.graph_digest(name), bundle.precision, bundle.graphs[name].inputs, BuildOptions(), device=None
    )
    for kept in (key, key | {"builder": "0" * 64}):
        PlanCache().get(kept, lambda: bytes(2**20))
    assert main(["inspect", str(bundle.path), "--json"]) == 0
    plans = json.loads(capsys.readouterr().out)["plans"][name]
    assert sorted(plan["outdated"] for plan in plans) == [False, True]
    assert {Path(plan["path"]) for plan in plans} == set(folder.glob("*.plan"))
    assert main(["inspect", str(bundle.path)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "plan of" in line]
    for line, plan in zip(lines, plans, strict=True):
        assert line.endswith(f": {plan['path']}")
        assert ", 1.0 MiB" in line
        assert (", made by another version of this package and not used: " in line) is plan["outdated"]


def test_waiting_for_another_process_is_said(bundle: Bundle, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    """It may take as long as a build."""
    arguments = ["build", str(bundle.path), "--backend", RTX, "--compute-capability", "8.9"]
    assert main(arguments) == 0
    assert "waiting" not in capsys.readouterr().err
    held = threading.Event()

    def build() -> None:
        with ExitStack() as locks:
            for path in folder.glob("*.lock"):
                locks.enter_context(FileLock(path))
            held.set()
            time.sleep(0.5)

    another = threading.Thread(target=build)
    another.start()
    assert held.wait(60)
    assert main(arguments) == 0
    another.join()
    assert "] another process is at work on the same plan: waiting for it\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--workspace", "0"], "--workspace is 0 MiB; expected 1 to 8796093022207"),
        (["--optimization-level", "9"], "level is 9; expected 0 to 5"),
        (["--compute-capability", "1.0"], "does not build for compute capability '1.0'"),
        (["--timing-cache", "t"], "tensorrt-rtx times no kernels"),
    ],
)
def test_wrong_options_are_one_line(
    arguments: list[str], said: str, bundle: Bundle, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", str(bundle.path), "--backend", RTX, *arguments]) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("diffloss-export: ")
    assert said in last


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="is for machines without TensorRT")
def test_tensorrt_without_tensorrt(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", str(bundle.path)]) == 2
    assert "docs/gpu.md says how to install it" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="signals are sent as POSIX has them")
def test_interrupted_leaves_no_plan(exported: Callable[..., Exported], folder: Path) -> None:
    bundle = exported().bundle
    program = (
        "import os, signal, sys\n"
        "from diffloss_export import build, cli\n"
        "def teller(what, on_stage):\n"
        "    on_stage(what)\n"
        "    return lambda phase, done: os.kill(os.getpid(), signal.SIGINT) if done > 0 else None\n"
        "build._teller = teller\n"
        # A shell starts jobs in the background with SIGINT ignored, and children inherit that.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", program, "build", str(bundle.path), "--backend", RTX],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 130, process.stderr
    # What was finished before is kept, so that nothing is said of it.
    assert process.stderr.splitlines()[-1] == "diffloss-export: interrupted"
    assert "Traceback" not in process.stderr
    assert not list(folder.glob("*.plan"))
