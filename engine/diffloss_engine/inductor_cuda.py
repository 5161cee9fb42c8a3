"""What inductor (torch 2.13) needs besides a C++ compiler to compile a program for a GPU."""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def toolkit(folder: Path) -> Iterator[None]:
    """Let inductor's compiler find CUDA's headers and the driver without a CUDA toolkit; `folder` does not exist yet.

    It needs no more of one, and looks for it in one place, if it is installed at all. The headers are in wheels too:
    Triton's, which comes with PyTorch, and nvidia-cuda-cccl. The driver is where a GPU is, but only a toolkit is sure
    to have a file libcuda.so, which a linker looks for.
    """
    from torch.utils import cpp_extension

    folder.mkdir()
    if driver := _driver():
        (folder / "libcuda.so").symlink_to(driver)
    home, before = cpp_extension.CUDA_HOME, dict(os.environ)
    # GCC and Clang look there last. Without a CUDA_HOME inductor gives up.
    searched = {"CPATH": _headers(), "LIBRARY_PATH": [folder]}
    try:
        cpp_extension.CUDA_HOME = home or str(folder)
        for name, places in searched.items():
            os.environ[name] = os.pathsep.join(filter(None, [before.get(name), *map(str, places)]))
        yield
    finally:
        cpp_extension.CUDA_HOME = home
        for name in searched:
            del os.environ[name]
        os.environ.update({name: before[name] for name in searched if name in before})


def _driver() -> Path | None:
    """Return the file of CUDA's driver that the dynamic linker finds."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    mapped = (line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines())
    return next((Path(line[5]) for line in mapped if len(line) == 6 and "/libcuda.so" in line[5]), None)


def _headers() -> list[Path]:
    """Return the folders of CUDA's headers in wheels: Triton's, which is complete but for nv/target, first."""
    folders = []
    for package, pattern in (("triton", "backends/nvidia/include"), ("nvidia", "*/include")):
        spec = importlib.util.find_spec(package)
        for place in spec.submodule_search_locations or () if spec else ():
            folders += sorted(Path(place).glob(pattern))
    return folders
