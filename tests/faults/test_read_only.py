"""A cache of plans that cannot be written: what it holds is used, and what it does not is built and not kept."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from diffloss_engine.errors import InputError
from diffloss_engine.plan_cache import PlanCache

ReadOnly = Callable[[Callable[[Path], object]], Path]
KEY, OTHER = {"number": 1}, {"number": 2}
WHY = r"(Read-only file system|Permission denied)"


def keep(folder: Path) -> None:
    assert PlanCache(folder).get(KEY, lambda: b"plan") == b"plan"


def keep_without_lock(folder: Path) -> None:
    """As in a folder that was copied, for example into a container's image."""
    keep(folder)
    next(folder.glob("*.lock")).unlink()


def refuse() -> bytes:
    raise AssertionError("nothing was to be built")


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("fill", [keep, keep_without_lock])
def test_a_plan_that_is_there_is_used(
    read_only: ReadOnly, fill: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    folder = read_only(fill)
    before = sorted(folder.iterdir())
    cache = PlanCache(folder)
    assert cache.get(KEY, refuse) == b"plan"
    assert cache.get(KEY, refuse, must_keep=True) == b"plan"
    assert cache.list_keys() == [KEY]
    assert warnings_in(caplog) == []
    with pytest.raises(OSError, match=WHY):
        (folder / "another").write_bytes(b"")
    assert sorted(folder.iterdir()) == before


def test_one_that_is_not_there_is_built_and_used(read_only: ReadOnly, caplog: pytest.LogCaptureFixture) -> None:
    cache = PlanCache(read_only(keep))
    assert cache.get(OTHER, lambda: b"another") == b"another"
    (said,) = warnings_in(caplog)
    assert said.startswith(f"a plan could not be kept in {cache.folder}: ")
    # Nothing was kept, and where that is what was asked for, nothing is built.
    with pytest.raises(InputError, match=f"a plan could not be kept in .*: {WHY}"):
        cache.get(OTHER, refuse, must_keep=True)
    assert len(warnings_in(caplog)) == 1


def test_a_folder_that_cannot_be_made(read_only: ReadOnly, caplog: pytest.LogCaptureFixture) -> None:
    """As where the home is on a disk that cannot be written."""
    cache = PlanCache(read_only(lambda folder: None) / ".cache" / "plans")
    assert cache.get(KEY, lambda: b"plan") == b"plan"
    (said,) = warnings_in(caplog)
    assert said.startswith(f"a plan could not be kept in {cache.folder}: ")
    with pytest.raises(InputError, match=WHY):
        cache.get(KEY, refuse, must_keep=True)
    cache.reject(KEY, b"plan", "the driver is another one")
    assert cache.list_keys() == []


def test_what_the_runtime_refuses_is_built_anew(read_only: ReadOnly, caplog: pytest.LogCaptureFixture) -> None:
    cache = PlanCache(read_only(keep))
    cache.reject(KEY, b"plan", "the driver is another one")
    assert cache.get(KEY, lambda: b"new") == b"new"
    refused, not_kept = warnings_in(caplog)
    assert refused.endswith(".plan is not used: the driver is another one")
    assert not_kept.startswith("a plan could not be kept")


def damage(folder: Path) -> None:
    keep(folder)
    next(folder.glob("*.plan")).write_bytes(b"nothing")


def open_file_to_all(folder: Path) -> None:
    keep(folder)
    next(folder.glob("*.plan")).chmod(0o622)


def give_file_away(folder: Path) -> None:
    keep(folder)
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    os.chown(next(folder.glob("*.plan")), 65534, 65534)


@pytest.mark.parametrize("fill", [damage, open_file_to_all, give_file_away])
def test_what_is_damaged_or_foreign_is_not_used(
    read_only: ReadOnly, fill: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    cache = PlanCache(read_only(fill))
    assert cache.get(KEY, lambda: b"new") == b"new"
    refused, not_kept = warnings_in(caplog)
    assert re.search(r"\.plan is not used: (its header is not|others may write to it|it belongs to)", refused)
    assert not_kept.startswith("a plan could not be kept")


def give_folder_away(folder: Path) -> None:
    keep(folder)
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    os.chown(folder, 65534, 65534)


def open_folder_to_all(folder: Path) -> None:
    keep(folder)
    folder.chmod(0o722)


@pytest.mark.parametrize("fill", [give_folder_away, open_folder_to_all])
def test_a_folder_of_others_is_refused(small_disk: Callable[[str], Path], fill: Callable[[Path], object]) -> None:
    disk = small_disk("size=1m")
    (disk / "plans").mkdir(mode=0o700)
    fill(disk / "plans")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(InputError, match="cannot be trusted"):
        PlanCache(disk / "plans").get(KEY, refuse)


# Compiles a program and runs it; then again, from the cache, if there is something in it.
COMPILER = """
import sys
import torch
from torch import nn
from diffloss_engine import TensorSpec
from diffloss_engine.inductor import compile_program, open_compiled, package_key
cpu, image = torch.device("cpu"), TensorSpec("image", "float32", (2, 3))
class Doubling(nn.Module):
    def forward(self, image):
        return (image * 2,)
def build():
    print("compiled", flush=True)
    return compile_program(Doubling(), [torch.zeros(2, 3)])
key = package_key("a" * 64, "b" * 64, "float32", [image], cpu)
session = open_compiled(key, build, [image], [image], cpu)
print(session({"image": torch.ones(2, 3)})["image"].sum().item())
"""


def compile_at_home(home: Path) -> subprocess.CompletedProcess[str]:
    """Run `COMPILER` with our cache, and what the compiler may want there on its own account, below a home."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "DIFFLOSS_"))}
    environment["HOME"] = str(home)
    return subprocess.run([sys.executable, "-c", COMPILER], capture_output=True, text=True, check=True, env=environment)


@pytest.mark.slow
def test_programs_of_inductor(read_only: ReadOnly) -> None:
    kept = read_only(compile_at_home)
    done = compile_at_home(kept)
    assert done.stdout == "12.0\n"
    assert "could not be kept" not in done.stderr
    done = compile_at_home(read_only(lambda home: None))
    assert done.stdout == "compiled\n12.0\n"
    assert done.stderr.count("a plan could not be kept") == 1


LOADER = COMPILER.replace(
    "session = open_compiled(key, build, [image], [image], cpu)",
    """
from diffloss_engine import BackendUnavailableError
try:
    open_compiled(key, lambda: b"a program", [image], [image], cpu)
except BackendUnavailableError as error:
    sys.exit(f"unavailable: {error}")
""",
)


def test_inductor_without_a_place_for_its_files(small_disk: Callable[[str], Path]) -> None:
    """It is a backend that cannot run here, so that `auto` takes another one."""
    environment = os.environ | {
        "TORCHINDUCTOR_CACHE_DIR": str(small_disk("ro") / "inductor"),
        "DIFFLOSS_CACHE": str(small_disk("size=1m") / "plans"),
    }
    done = subprocess.run([sys.executable, "-c", LOADER], capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert re.search(r"^unavailable: a program compiled by inductor cannot be loaded: .*Read-only", done.stderr, re.M)
