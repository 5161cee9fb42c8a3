"""Processes that are killed, disks that are full, two at once: what is there afterwards is whole, or is not there."""

from __future__ import annotations

import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler

from diffloss_engine.bundle import Bundle, file_sha256
from diffloss_engine.plan_cache import PlanCache
from unets import make_unet

Popen = Callable[..., "subprocess.Popen[str]"]

KILLS = [pytest.param(2), pytest.param(100, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
# Writes plans, each of 1 MiB of one byte, until it is killed.
WRITER = """
import sys
from pathlib import Path
from diffloss_engine.plan_cache import PlanCache
cache = PlanCache(Path(sys.argv[1]))
print("ready", flush=True)
for turn in range(10**9):
    key = {"number": turn % 5}
    cache.get(key, lambda: bytes([turn % 5]) * 2**20)
    cache.reject(key, "to be built again")
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults") / "pipeline"
    DDPMPipeline(unet=make_unet(dtype=torch.float32), scheduler=DDPMScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture
def export(model: Path) -> Iterator[Popen]:
    """(destination, file_size=None) -> a running export, which may write files of no more bytes than that."""
    running = []

    def export(destination: Path, *options: str, file_size: int | None = None) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "diffloss_export", "onnx", str(model), "-o", str(destination)]

        def limit() -> None:
            if file_size is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))

        process = subprocess.Popen(
            [*command, "--batch-size", "1", "--no-gradient", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=limit,
        )
        running.append(process)
        return process

    yield export
    for process in running:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """Return what an export writes that nothing happens to, and the seconds that it takes."""
    destination, started = tmp_path_factory.mktemp("undisturbed") / "bundle", time.monotonic()
    command = [sys.executable, "-m", "diffloss_export", "onnx", str(model), "-o", str(destination)]
    subprocess.run([*command, "--batch-size", "1", "--no-gradient"], check=True, capture_output=True)
    return destination, time.monotonic() - started


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): file_sha256(path) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kills", KILLS)
def test_killed_exports_leave_a_whole_bundle_or_none(
    export: Popen, undisturbed: tuple[Path, float], tmp_path: Path, kills: int, seed: int
) -> None:
    whole, seconds = content(undisturbed[0]), undisturbed[1]
    rng, found, destination = random.Random(seed), set(), tmp_path / "killed"
    for turn in range(kills):
        # Writing and moving into place are quick, and at the end: half of the kills are there.
        process = export(destination)
        time.sleep(rng.uniform(0, seconds) if turn % 2 else rng.uniform(0.8, 1.1) * seconds)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        found.add(destination.exists())
        if destination.exists():
            Bundle.open(destination).verify_hashes()
            assert content(destination) == whole
            shutil.rmtree(destination)
    # What is left of the killed ones does not disturb the next.
    _, errors = (last := export(destination)).communicate()
    assert last.returncode == 0, errors
    assert content(destination) == whole
    assert kills < 100 or found == {True, False}


@pytest.mark.parametrize("kills", KILLS)
def test_killed_writers_leave_whole_plans_or_none(tmp_path: Path, kills: int, seed: int) -> None:
    rng, folder = random.Random(seed), tmp_path / "plans"
    for _ in range(kills):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(folder)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0, 0.2))
        process.kill()
        process.communicate()
        cache = PlanCache(folder)
        for number in range(5):
            # Neither is the lock of the dead waited for, nor half a plan read.
            plan = cache.get({"number": number}, lambda number=number: bytes([number]) * 2**20)  # type: ignore[misc]
            assert bytes(plan) == bytes([number]) * 2**20
    assert {path.suffix for path in folder.iterdir()} <= {".plan", ".lock", ".rejected"}


def test_full_disk_during_an_export(export: Popen, tmp_path: Path) -> None:
    destination = tmp_path / "bundle"
    process = export(destination, file_size=50_000)
    _, errors = process.communicate()
    assert process.returncode == 2
    assert "Traceback" not in errors
    assert "File too large" in errors.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_full_disk_while_a_bundle_is_replaced(export: Popen, undisturbed: tuple[Path, float], tmp_path: Path) -> None:
    destination = Path(shutil.copytree(undisturbed[0], tmp_path / "bundle"))
    before = content(destination)
    process = export(destination, "--overwrite", file_size=50_000)
    process.communicate()
    assert process.returncode == 2
    assert content(destination) == before
    assert list(tmp_path.iterdir()) == [destination]


def test_full_disk_costs_the_kept_plan_alone(tmp_path: Path) -> None:
    code = """
import resource, sys
from pathlib import Path
from diffloss_engine.plan_cache import PlanCache
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
plan = PlanCache(Path(sys.argv[1])).get({"number": 0}, lambda: bytes(2**20))
print(len(plan))
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout == f"{2**20}\n"
    assert "a plan could not be kept" in done.stderr
    assert "File too large" in done.stderr
    assert {path.suffix for path in tmp_path.iterdir()} == {".lock"}


def test_two_exports_into_one_place(export: Popen, tmp_path: Path) -> None:
    destination = tmp_path / "bundle"
    both = [export(destination) for _ in range(2)]
    ends = {process.communicate()[1].splitlines()[-1]: process.returncode for process in both}
    assert sorted(ends.values()) == [0, 2]
    assert next(line for line, status in ends.items() if status == 2).endswith("overwriting was not asked for")
    Bundle.open(destination).verify_hashes()
    assert list(tmp_path.iterdir()) == [destination]
