"""A C++ compiler finds CUDA's headers, from wheels, and the driver's library. No GPU: both are made here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import cpp_extension

from diffloss_engine.inductor_cuda import toolkit

COMPILE = """
import subprocess, sys
from pathlib import Path
from diffloss_engine.inductor_cuda import toolkit

folder, = map(Path, sys.argv[1:])
with toolkit(folder / "toolkit"):
    compiled = subprocess.run(
        ["g++", "-shared", "-fPIC", "uses.cpp", "-lcuda", "-o", "uses.so"], cwd=folder, text=True, capture_output=True
    )
sys.exit(compiled.stderr)
"""


def put(file: Path, content: str = "") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content)
    return file


@pytest.fixture
def machine(tmp_path: Path) -> dict[str, str]:
    """Return the environment of a machine with a driver and the two wheels; the driver has one function, cuStart."""
    put(tmp_path / "wheels/triton/__init__.py")
    put(tmp_path / "wheels/triton/backends/nvidia/include/cuda.h", "#include <nv/target>\n")
    put(tmp_path / "wheels/nvidia/cu13/include/nv/target", 'extern "C" int cuStart();\n')
    driver = put(tmp_path / "driver.cpp", 'extern "C" int cuStart() { return 7; }\n')
    library = tmp_path / "driver/libcuda.so.1"
    library.parent.mkdir()
    subprocess.run(["g++", "-shared", "-fPIC", driver, "-Wl,-soname,libcuda.so.1", "-o", library], check=True)
    put(tmp_path / "uses.cpp", "#include <cuda.h>\nint use() { return cuStart(); }\n")
    paths = {"PYTHONPATH": str(tmp_path / "wheels"), "LD_LIBRARY_PATH": str(library.parent)}
    return os.environ | {name: os.pathsep.join([path, os.environ.get(name, "")]) for name, path in paths.items()}


def compiled(folder: Path, environment: dict[str, str]) -> str:
    """Return what the compiler says of a library that includes CUDA's header and is linked to the driver."""
    command = [sys.executable, "-c", COMPILE, str(folder)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stderr


def test_headers_and_driver_are_found(machine: dict[str, str], tmp_path: Path) -> None:
    assert compiled(tmp_path, machine) == "\n"
    needed = subprocess.run(["readelf", "-d", tmp_path / "uses.so"], capture_output=True, text=True, check=True).stdout
    assert "[libcuda.so.1]" in needed


def test_what_is_missing_is_named(machine: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "wheels/nvidia/cu13/include/nv/target").unlink()
    assert "nv/target: No such file" in compiled(tmp_path, machine)


@pytest.mark.parametrize("home", [None, "/opt/cuda"])
def test_all_is_as_it_was_afterwards(home: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", home)
    monkeypatch.delenv("CPATH", raising=False)
    monkeypatch.setenv("LIBRARY_PATH", "/opt/libraries")
    before = dict(os.environ)
    with toolkit(tmp_path / "toolkit"):
        assert (home or str(tmp_path / "toolkit")) == cpp_extension.CUDA_HOME
        assert os.environ["LIBRARY_PATH"] == f"/opt/libraries{os.pathsep}{tmp_path / 'toolkit'}"
    assert home == cpp_extension.CUDA_HOME
    assert dict(os.environ) == before
