"""Imports between the packages go one way, and the heavy runtimes are imported only when they are used."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from layout import LATE, ROOT, SOURCES

# What each package may import of this project, beside itself.
ALLOWED: dict[str, set[str]] = {
    "diffloss_engine": set(),
    "diffloss_trt": {"diffloss_engine"},
    "diffloss_export": {"diffloss_engine", "diffloss_trt"},
}
# For the examples and the tests alone.
FOREIGN = {"hypothesis", "pytest", "pywt", "scipy", "skimage", "sklearn"}
MODULES = sorted(path for folder in SOURCES.values() for path in folder.rglob("*.py"))


def imported(node: ast.AST, package: str) -> list[str]:
    """Return the top-level names of what the statement or call `node` imports; `package` is where it stands."""
    match node:
        case ast.Import(names=names):
            return [alias.name.partition(".")[0] for alias in names]
        case ast.ImportFrom(module=str(module), level=0):
            return [module.partition(".")[0]]
        case ast.ImportFrom():
            return [package]
        case ast.Call(
            func=ast.Name(id="__import__" | "import_module") | ast.Attribute(attr="import_module"),
            args=[ast.Constant(value=str(module)), *_],
        ):
            return [module.partition(".")[0] or package]
    return []


def executed_on_import(node: ast.AST) -> Iterator[ast.AST]:
    """Yield `node` and what is below it, without function bodies and without what only type checkers see."""
    yield node
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
            return
        case ast.If(test=ast.Name(id="TYPE_CHECKING") | ast.Attribute(attr="TYPE_CHECKING")):
            below = list[ast.AST](node.orelse)
        case _:
            below = list(ast.iter_child_nodes(node))
    for child in below:
        yield from executed_on_import(child)


def violations(source: str, package: str) -> list[str]:
    """Return one line for each import in `source`, a module of `package`, that should not be there."""
    tree = ast.parse(source)
    found = []
    for node in ast.walk(tree):
        for name in imported(node, package):
            if name in SOURCES and name != package and name not in ALLOWED[package]:
                found.append(f"{package} may not import {name}")
            elif name in FOREIGN:
                found.append(f"{name} is not a dependency of {package}")
    for node in executed_on_import(tree):
        found += [f"{name} must be imported where it is used" for name in imported(node, package) if name in LATE]
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_module_imports_only_what_it_may(path: Path) -> None:
    package = next(name for name, folder in SOURCES.items() if path.is_relative_to(folder))
    assert violations(path.read_text(encoding="utf-8"), package) == []


@pytest.mark.parametrize("package", SOURCES)
def test_package_has_modules_and_type_marker(package: str) -> None:
    assert (SOURCES[package] / "__init__.py").is_file()
    assert (SOURCES[package] / "py.typed").is_file()


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("diffloss_engine", "import diffloss_trt"),
        ("diffloss_engine", "def f():\n    from diffloss_export.cli import main"),
        ("diffloss_engine", "if TYPE_CHECKING:\n    from diffloss_trt.schedule import NoiseSchedule"),
        ("diffloss_engine", "importlib.import_module('diffloss_trt.loss')"),
        ("diffloss_trt", "from diffloss_export import models"),
        ("diffloss_trt", "import os, diffusers.models as m"),
        ("diffloss_trt", "try:\n    import tensorrt\nexcept ImportError:\n    tensorrt = None"),
        ("diffloss_trt", "class A:\n    from onnx import helper"),
        ("diffloss_trt", "if not TYPE_CHECKING:\n    import onnx"),
        ("diffloss_trt", "if TYPE_CHECKING:\n    pass\nelse:\n    import onnx"),
        ("diffloss_export", "ort = __import__('onnxruntime')"),
        ("diffloss_export", "def f():\n    import skimage.data"),
    ],
)
def test_planted_violation_is_found(package: str, source: str) -> None:
    assert len(violations(source, package)) == 1


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("diffloss_engine", "from diffloss_engine.errors import InputError\nfrom . import errors\nimport torch"),
        ("diffloss_engine", "def f():\n    import onnxruntime"),
        ("diffloss_trt", "from diffloss_engine import bundle\nimport safetensors"),
        ("diffloss_trt", "if TYPE_CHECKING:\n    from diffusers import UNet2DModel"),
        ("diffloss_export", "from diffloss_trt import DiffLoss\nfrom diffloss_engine.errors import ModelError"),
        ("diffloss_export", "import onnxruntime_extensions, diffloss_export.onnx_write"),
    ],
)
def test_allowed_import_is_left_alone(package: str, source: str) -> None:
    assert violations(source, package) == []


def test_no_file_is_called_utils() -> None:
    found = []
    for folder, folders, files in os.walk(ROOT):
        # Hidden folders and virtual environments are not part of the project.
        folders[:] = [name for name in folders if name[0] != "." and not Path(folder, name, "pyvenv.cfg").exists()]
        found += [Path(folder, name) for name in files if name == "utils.py"]
    assert found == []
