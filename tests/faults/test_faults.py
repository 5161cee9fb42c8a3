"""Processes that are killed, disks that are full, two at once: what is there afterwards is whole, or is not there."""

from __future__ import annotations

import os
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
from diffloss_export.models import LoadedModel
from diffloss_export.pipeline import export_bundle
from diffloss_trt import NoiseSchedule
from exports import Exported, Once
from unets import make_unet

SCHEDULE = NoiseSchedule.from_scheduler(DDPMScheduler())
Popen = Callable[..., "subprocess.Popen[str]"]

# Writes plans, each of 1 MiB of one byte, until it is killed.
WRITER = """
import sys
from pathlib import Path
from diffloss_engine.plan_cache import PlanCache
cache = PlanCache(Path(sys.argv[1]))
print("ready", flush=True)
for turn in range(10**9):
    key = {"number": turn % 5}
    plan = cache.get(key, lambda: bytes([turn % 5]) * 2**20)
    cache.reject(key, plan, "to be built again")
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults") / "pipeline"
    DDPMPipeline(unet=make_unet("one_level", dtype=torch.float32), scheduler=DDPMScheduler()).save_pretrained(folder)
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


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kills", [1, 100])
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


@pytest.mark.parametrize("kills", [1, pytest.param(100, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
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


def test_full_disk_while_a_bundle_is_replaced(export: Popen, once: Once, tmp_path: Path) -> None:
    """The older one stays, and nothing else is left."""
    destination = Path(shutil.copytree(Exported.of(once).bundle.path, tmp_path / "bundle"))
    before = content(destination)
    process = export(destination, "--overwrite", file_size=50_000)
    _, errors = process.communicate()
    assert process.returncode == 2
    assert "Traceback" not in errors
    assert "File too large" in errors.splitlines()[-1]
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


@pytest.mark.slow
def test_two_exports_into_one_place(export: Popen, tmp_path: Path) -> None:
    destination = tmp_path / "bundle"
    both = [export(destination) for _ in range(2)]
    ends = {process.communicate()[1].splitlines()[-1]: process.returncode for process in both}
    assert sorted(ends.values()) == [0, 2]
    refused = next(line for line, status in ends.items() if status == 2)
    assert refused.endswith("overwriting was not asked for (--overwrite)")
    Bundle.open(destination).verify_hashes()
    assert list(tmp_path.iterdir()) == [destination]


# Runs a loss with little memory, and then with enough.
STARVED = """
import resource, sys
from pathlib import Path
import diffusers, onnxruntime, torch
from diffloss_engine.errors import BackendError
from diffloss_trt import DiffLoss
torch.set_num_threads(1)
pages = int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 150 * 2**20, -1))
try:
    DiffLoss.load(sys.argv[1], "onnxruntime", "cpu")
except BackendError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
loss = DiffLoss.load(sys.argv[1], "onnxruntime", "cpu")
print(bool(loss(*torch.rand(2, 3, 3, 64, 64)) > 0))
"""


def test_an_engine_that_runs_out_of_memory(builtin_bundle: Path) -> None:
    """It says what to do, and the process can go on."""
    command = [sys.executable, "-c", STARVED, str(builtin_bundle)]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    advice, works = run.stdout.splitlines()
    assert "too little memory for the engine's batch of 4" in advice
    assert works == "True"


# Trains for 12 steps, from its last checkpoint on if there is one, and leaves the weights.
TRAINER = """
import os, sys
from pathlib import Path
import torch
import torch.nn.functional as F
from diffloss_trt import DiffLoss
torch.set_num_threads(1)
bundle, folder = map(Path, sys.argv[1:])
loss_fn = DiffLoss.load(bundle, "onnxruntime", "cpu", 1.0, 0.5, seed=7)
torch.manual_seed(0)
network = torch.nn.Conv2d(3, 3, 3, padding=1)
optimizer = torch.optim.Adam(network.parameters(), 1e-2)
first = 0
if (folder / "last.pt").exists():
    state = torch.load(folder / "last.pt", weights_only=True)
    first = state["step"]
    for name, part in (("network", network), ("optimizer", optimizer), ("loss", loss_fn)):
        part.load_state_dict(state[name])
for step in range(first, 12):
    generator = torch.Generator().manual_seed(step)
    target = torch.rand(4, 3, 16, 16, generator=generator)
    restored = network(target + 0.1 * torch.randn(target.shape, generator=generator))
    loss = F.mse_loss(restored, target) + loss_fn(restored, target)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    state = {"step": step + 1, "network": network.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state | {"loss": loss_fn.state_dict()}, folder / "new.pt")
    os.replace(folder / "new.pt", folder / "last.pt")
    print(step, flush=True)
"""


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kills", [1, 100])
def test_killed_trainings_go_on_as_if_nothing_had_been(kills: int, tmp_path: Path, seed: int) -> None:
    bundle = tmp_path / "bundle"
    export_bundle(LoadedModel(make_unet("one_level", dtype=torch.float32), SCHEDULE, "test", ()), bundle, batch_size=4)

    def start(folder: Path) -> subprocess.Popen[str]:
        folder.mkdir(exist_ok=True)
        command = [sys.executable, "-c", TRAINER, str(bundle), str(folder)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def weights(folder: Path) -> dict[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = torch.load(folder / "last.pt", weights_only=True)["network"]
        return state

    start(tmp_path / "undisturbed").communicate()
    expected, rng, turn = weights(tmp_path / "undisturbed"), random.Random(seed), 0
    while kills:
        folder, turn = tmp_path / f"killed{turn}", turn + 1
        while (process := start(folder)).stdout is not None:
            # After that step, and at any moment of the next ones.
            line = next((line for line in process.stdout if rng.random() < 0.3 and kills), None)
            if line is not None:
                time.sleep(rng.uniform(0, 0.05))
                process.kill()
                kills -= 1
            process.communicate()
            if process.returncode == 0:
                break
        found = weights(folder)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert turn > 0


def test_a_cache_of_tomorrow(tmp_path: Path) -> None:
    """Where the clock was set back: nothing asks how old a plan or a lock is."""
    cache, key = PlanCache(tmp_path / "plans"), {"number": 1}
    assert bytes(cache.get(key, lambda: b"plan")) == b"plan"
    tomorrow = time.time() + 86400
    for path in (cache.folder, *cache.folder.iterdir()):
        os.utime(path, (tomorrow, tomorrow))
    assert bytes(cache.get(key, lambda: pytest.fail("it was built again"))) == b"plan"
    cache.reject(key, b"plan", "to be built again")
    assert bytes(cache.get(key, lambda: b"another")) == b"another"


def test_small_disk(export: Popen, small_disk: Callable[[str], Path]) -> None:
    """A whole bundle does not fit, and nothing is left of it; nor does a plan, and it is used all the same."""
    disk = small_disk("size=300k")
    _, errors = (process := export(disk / "bundle")).communicate()
    assert process.returncode == 2
    assert "Traceback" not in errors
    assert "No space left on device" in errors.splitlines()[-1]
    assert list(disk.iterdir()) == []
    cache = PlanCache(disk / "plans")
    assert bytes(cache.get({"number": 1}, lambda: bytes(2**20))) == bytes(2**20)
    assert not list(cache.folder.glob("*.plan"))


def test_read_only_disk(export: Popen, small_disk: Callable[[str], Path]) -> None:
    disk = small_disk("ro")
    _, errors = (process := export(disk / "bundle")).communicate()
    assert process.returncode == 2
    assert "Traceback" not in errors
    assert errors.splitlines()[-1].endswith(f"the folder {disk} is not writable")
