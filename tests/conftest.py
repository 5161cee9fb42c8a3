"""What every test gets: few threads, a fixed seed, no network, and a skip where a GPU is needed and missing."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from filelock import FileLock

from diffloss_engine.errors import BackendUnavailableError
from diffloss_engine.trt_build import FLAVOURS, import_flavour

# No test may depend on a network: huggingface_hub reads this when it is first imported, and then refuses at once.
os.environ["HF_HUB_OFFLINE"] = "1"
# Nor may one report anything: ONNX Runtime reads this when it is first imported, which some tests do themselves.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

# Each process of a parallel run has its share of the cores, and so have the commands that it starts. The tensors here
# are small: beyond a few threads, handing out the work costs more than the work.
_PROCESSES = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(max(1, min(4, torch.get_num_threads() // _PROCESSES)))
if _PROCESSES > 1:
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())

# No deadline: a first call traces or compiles. Derandomised: a failure is seen by everybody or by nobody.
hypothesis.settings.register_profile("diffloss", deadline=None, derandomize=True)
hypothesis.settings.load_profile("diffloss")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return how many processes `-n auto` means: a GPU's memory is measured by one alone."""
    with_gpu = torch.cuda.is_available() and "not gpu" not in config.option.markexpr
    return 0 if with_gpu else min(4, os.cpu_count() or 1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(1500))  # the first test of a backend builds a plan, or compiles


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seed torch's global generators before each test and return the seed."""
    value = 20240629
    torch.manual_seed(value)
    return value


@pytest.fixture(params=FLAVOURS)
def flavour(request: pytest.FixtureRequest) -> str:
    """Each flavour of TensorRT that is installed, and that knows the GPU, if there is one."""
    name = str(request.param)
    try:
        trt = import_flavour(name)
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    if name == "tensorrt-rtx" and torch.cuda.is_available():
        capability = "SM{}{}".format(*torch.cuda.get_device_capability())
        if capability not in trt.ComputeCapability.__members__:
            pytest.skip(f"{name} builds no plans for {capability}")
    return name


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """(name, make) -> what `make` returns of a new folder; it is called once for all processes of a run."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if _PROCESSES > 1 else base

    def once(name: str, make: Callable[[Path], Any]) -> Any:
        folder, kept = shared / name, shared / f"{name}.pickle"
        with FileLock(shared / f"{name}.lock"):
            if not kept.exists():
                folder.mkdir()
                kept.write_bytes(pickle.dumps(make(folder)))
        return pickle.loads(kept.read_bytes())

    return once


@pytest.fixture(scope="session")
def builtin_bundle(once: Callable[..., Path]) -> Path:
    """Return the built-in prior's bundle of batch 4, exported as a user would."""

    def make(folder: Path) -> Path:
        from diffloss_export.cli import main

        assert main(["onnx", "builtin", "-o", str(folder / "bundle"), "--batch-size", "4"]) == 0
        return folder / "bundle"

    return once("builtin", make)
