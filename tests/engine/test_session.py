from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import diffloss_engine
from diffloss_engine import BackendUnavailableError, Graph, InputError, open_session

CPU = torch.device("cpu")


def test_opens_onnxruntime(tmp_path: Path, save_conv: Callable[[Path, str], Graph]) -> None:
    graph = save_conv(tmp_path, "float32")
    session = open_session(tmp_path / graph.file, graph.inputs, graph.outputs, backend="onnxruntime", device=CPU)
    assert session.backend == "onnxruntime"
    assert (session.inputs, session.outputs, session.device) == (graph.inputs, graph.outputs, CPU)
    outputs = session({"image": torch.zeros(2, 3, 8, 8), "gain": torch.ones(1)})
    assert outputs.keys() == {"features", "scaled"}
    session.close()


def test_unknown_backend_is_named() -> None:
    with pytest.raises(BackendUnavailableError, match=r"'openvino'.*onnxruntime, onnxruntime-tensorrt, tensorrt"):
        open_session(Path("conv.onnx"), [], [], backend="openvino", device=CPU)


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_tensorrt_wants_a_gpu(backend: str) -> None:
    with pytest.raises(BackendUnavailableError, match=f"{backend} needs a GPU.*cpu"):
        open_session(Path("g.onnx"), [], [], backend=backend, device=CPU, digest="0" * 64, precision="fp32")
    with pytest.raises(InputError, match=f"{backend} wants the digest"):
        open_session(Path("g.onnx"), [], [], backend=backend, device=CPU)


def python(code: str) -> str:
    """Run `code` in a fresh interpreter that finds the sources, and return what it prints."""
    source = Path(diffloss_engine.__file__).parents[1]
    program = f"import sys\nsys.path.insert(0, {str(source)!r})\n{code}"
    return subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout


def test_importing_everything_imports_no_runtime() -> None:
    code = (
        "import importlib, pkgutil, diffloss_engine\n"
        "for module in pkgutil.iter_modules(diffloss_engine.__path__, 'diffloss_engine.'):\n"
        "    importlib.import_module(module.name)\n"
        "print({'onnx', 'onnxruntime', 'tensorrt', 'tensorrt_rtx'} & sys.modules.keys())"
    )
    assert python(code) == "set()\n"


def test_missing_runtime_says_what_to_install() -> None:
    code = (
        "from pathlib import Path\n"
        "import torch\n"
        "from diffloss_engine import BackendUnavailableError, open_session\n"
        # What Python itself does for a module that is known to be absent.
        "sys.modules['onnxruntime'] = None\n"
        "try:\n"
        "    open_session(Path('g.onnx'), [], [], backend='onnxruntime', device=torch.device('cpu'))\n"
        "except BackendUnavailableError as error:\n"
        "    print(error)\n"
    )
    assert "install 'onnxruntime'" in python(code)
