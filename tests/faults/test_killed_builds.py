"""Builds of plans that are killed: what is in the cache is whole, and the next build goes on from there."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from diffloss_engine.plan_cache import PlanCache
from diffloss_export.pipeline import export_bundle
from exports import make_model

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")

GRAPHS = ("encoder", "noise_head")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a bundle of two small graphs."""
    folder = tmp_path_factory.mktemp("faults") / "bundle"
    export_bundle(make_model(), folder, batch_size=1, gradient=False)
    return folder


def build(bundle: Path, cache: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "diffloss_export", "build", str(bundle), "--backend", "tensorrt-rtx"]
    return subprocess.Popen(
        [*command, "--compute-capability", "8.9"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"DIFFLOSS_CACHE": str(cache)},
    )


def finished(process: subprocess.Popen[str]) -> str:
    """Return what a build that nothing happens to says."""
    said, errors = process.communicate()
    assert process.returncode == 0, errors
    return said


def plans(cache: Path) -> set[str]:
    """Return the names of the plans that are there, which follow from their keys."""
    return {path.name for path in cache.glob("*.plan")}


def refuse() -> bytes:
    raise AssertionError("it is not whole")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kills", [1, 100])
def test_killed_builds_leave_whole_plans_or_none(bundle: Path, tmp_path: Path, kills: int, seed: int) -> None:
    folder, rng, left = tmp_path / "plans", random.Random(seed), []
    for _ in range(kills):
        process = build(bundle, folder)
        assert process.stderr is not None
        # At any moment of the first graph's or the second's; before there are Python's imports.
        graph = rng.choice(GRAPHS)
        assert any(f"building the {graph} graph" in line for line in process.stderr)
        time.sleep(rng.uniform(0, 2.5))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        left.append(plans(folder))
        keys = PlanCache(folder).list_keys()
        assert len(keys) == len(left[-1])
        for key in keys:
            PlanCache(folder).get(key, refuse)
        for name in left[-1]:
            (folder / name).unlink()
    assert kills < 100 or len({len(names) for names in left}) > 1
    # What the killed have left behind is in nobody's way. (Two builds of one graph differ, but not in their key.)
    assert finished(build(bundle, folder)).count("built in") == len(GRAPHS)
    expected = plans(folder)
    assert len(expected) == len(GRAPHS)
    assert all(names <= expected for names in left)
    assert {path.suffix for path in folder.iterdir()} == {".plan", ".lock"}
    # Negative control.
    path = folder / next(iter(expected))
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(AssertionError, match="it is not whole"):
        for key in PlanCache(folder).list_keys():
            PlanCache(folder).get(key, refuse)
