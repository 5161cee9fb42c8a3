"""What is built: of what is in the wheel, that it imports without much else, and that another build is the same."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from layout import LATE, ROOT, SOURCES

DIST_INFO = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"}
# Arguments: the unpacked wheel, then the modules that shall be missing. Prints every module that it imported.
IMPORT_EVERYTHING = """
import importlib, pkgutil, sys
from importlib.machinery import PathFinder

wheel, *missing = sys.argv[1:]

class WithoutMissing(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in missing else super().find_spec(name, path, target)

sys.meta_path = [WithoutMissing if finder is PathFinder else finder for finder in sys.meta_path]
sys.path.insert(0, wheel)
for name in missing:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        continue
    sys.exit(f"{name} is not missing")
for package in ("diffloss_trt", "diffloss_engine", "diffloss_export"):
    module = importlib.import_module(package)
    print(package)
    if not module.__file__.startswith(wheel):
        sys.exit(f"{package} was imported from {module.__file__}, not from {wheel}")
    for found in pkgutil.walk_packages(module.__path__, package + "."):
        if not found.name.endswith(".__main__"):
            importlib.import_module(found.name)
            print(found.name)
"""


def build(kind: str, source: Path, folder: Path, **environment: str) -> Path:
    """Build the "wheel" or "sdist" of `source` with the hatchling that is installed here, and return its path."""
    command = [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", str(folder), str(source)]
    variables = {name: value for name, value in os.environ.items() if name != "SOURCE_DATE_EPOCH"} | environment
    built = subprocess.run(command, capture_output=True, text=True, check=False, env=variables)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's path."""
    return build("wheel", ROOT, tmp_path_factory.mktemp("dist"))


def copy_sources(folder: Path, changed: float) -> Path:
    """Copy the repository, without what is hidden and what is no part of it, as if all was changed at one time."""

    def left_out(parent: str, names: list[str]) -> set[str]:
        other = {name for name in names if name == "__pycache__" or Path(parent, name, "pyvenv.cfg").exists()}
        return other | {name for name in names if name[0] == "." and name not in (".ci", ".gitignore")}

    shutil.copytree(ROOT, folder, ignore=left_out)
    for path in folder.rglob("*"):
        os.utime(path, (changed, changed))
    return folder


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_another_build_is_the_same(kind: str, tmp_path: Path) -> None:
    """Elsewhere and of files with other times it is the same, to the last byte."""
    sources = copy_sources(tmp_path / "here", 1.6e9), copy_sources(tmp_path / "else" / "where", 1.7e9)
    first, second = (build(kind, source, tmp_path / f"dist{number}") for number, source in enumerate(sources))
    assert first.name == second.name
    assert first.read_bytes() == second.read_bytes()
    # The times in the archive are others where they are asked for, and one byte of a source shows.
    dated = build(kind, sources[0], tmp_path / "dated", SOURCE_DATE_EPOCH="1700000000")
    assert dated.read_bytes() != first.read_bytes()
    with (sources[1] / "diffloss_trt" / "loss.py").open("a") as file:
        file.write("\n")
    assert build(kind, sources[1], tmp_path / "altered").read_bytes() != first.read_bytes()


def test_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    dist_info = "-".join(wheel.name.split("-")[:2]) + ".dist-info"
    expected = {f"{dist_info}/{name}" for name in DIST_INFO}
    for package, folder in SOURCES.items():
        for path in folder.rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                expected.add(f"{package}/{path.relative_to(folder).as_posix()}")
    assert {f"{package}/py.typed" for package in SOURCES} < expected
    assert sorted(names) == sorted(expected)


def test_wheel_imports_without_the_heavy_runtimes(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    # -I: neither the current folder nor the user's site-packages nor PYTHONPATH may stand in for the wheel.
    command = [sys.executable, "-I", "-c", IMPORT_EVERYTHING, str(tmp_path), *LATE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    modules = {
        ".".join((package, *path.relative_to(folder).with_suffix("").parts)).removesuffix(".__init__")
        for package, folder in SOURCES.items()
        for path in folder.rglob("*.py")
        if path.name != "__main__.py"
    }
    assert set(done.stdout.split()) == modules
