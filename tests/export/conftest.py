"""Bundles that are exported once for all tests, and copies of them to alter."""

from __future__ import annotations

import functools
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler

from diffloss_engine.bundle import Bundle
from exports import Exported, Once, edit_json
from unets import make_unet


@pytest.fixture(scope="session")
def exported(once: Once) -> Callable[..., Exported]:
    """(kind="one_level", precision="fp32", prediction_type="epsilon", resolution=None) -> Exported, batch size 2."""
    return functools.cache(functools.partial(Exported.of, once))


@pytest.fixture
def copied(exported: Callable[..., Exported], tmp_path: Path) -> Callable[..., Path]:
    """(the arguments of `exported`) -> the folder of a copy of that bundle, which may be altered."""

    def copied(*args: str, **settings: str) -> Path:
        return Path(shutil.copytree(exported(*args, **settings).bundle.path, tmp_path / "copied"))

    return copied


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a diffusers pipeline's folder with UNet and schedule of `exported`."""
    folder = tmp_path_factory.mktemp("model") / "pipeline"
    unet = make_unet("one_level", dtype=torch.float32)
    DDPMPipeline(unet=unet, scheduler=DDPMScheduler()).save_pretrained(folder)
    # The one thing that tells it from a UNet that never was in a file.
    edit_json(folder / "unet" / "config.json", lambda config: config.pop("_diffusers_version"))
    return folder


@pytest.fixture
def bundle(exported: Callable[..., Exported]) -> Bundle:
    """Return the fp32 bundle of the smallest UNet."""
    return exported().bundle


@pytest.fixture(scope="session")
def command() -> list[str]:
    """Return the command line of a child process, up to the name of the subcommand."""
    return [sys.executable, "-m", "diffloss_export"]
