"""Disks that are small, or can no longer be written."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """(options) -> the folder of a new file system in memory."""
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("no file system can be mounted here")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", str(place)], check=True)


@pytest.fixture(params=["disk", "folder"])
def read_only(
    request: pytest.FixtureRequest, tmp_path: Path, small_disk: Callable[[str], Path]
) -> Iterator[Callable[[Callable[[Path], object]], Path]]:
    """(fill) -> the folder that was given to `fill`, and cannot be written any more: for its disk, or for its mode."""
    locked: list[Path] = []

    def on_disk(fill: Callable[[Path], object]) -> Path:
        disk = small_disk("size=64m")
        folder = disk / "folder"
        folder.mkdir(mode=0o700)
        fill(folder)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        return folder

    def by_mode(fill: Callable[[Path], object]) -> Path:
        folder = tmp_path / f"folder{len(locked)}"
        folder.mkdir(mode=0o700)
        fill(folder)
        folder.chmod(0o500)
        locked.append(folder)
        return folder

    if request.param == "folder" and os.geteuid() == 0:
        pytest.skip("root may write to every folder")
    yield on_disk if request.param == "disk" else by_mode
    for folder in locked:
        folder.chmod(0o700)
