"""The wheel holds the three packages and nothing else, and imports where only torch and small things are installed."""

from __future__ import annotations

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


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel with the hatchling that is installed here, and return its path."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = folder.glob("*.whl")
    return path


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
