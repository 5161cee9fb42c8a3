"""What is imported is declared, what is declared is imported, and what CI installs is pinned."""

from __future__ import annotations

import ast
import os
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from layout import ROOT, SOURCES
from test_imports import imported

PROJECT: Mapping[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS: Mapping[str, list[str]] = PROJECT["project"]["optional-dependencies"]
CONSTRAINTS = ROOT / ".ci" / "constraints.txt"
# Where CI runs, and for which Python the versions are chosen.
CI_MACHINE = {
    "platform_machine": "x86_64",
    "platform_system": "Linux",
    "python_full_version": "3.11.0",
    "python_version": "3.11",
    "sys_platform": "linux",
}
# What provides a module that a machine without a GPU lacks.
PROVIDERS = {"pycuda": "pycuda", "tensorrt": "tensorrt"}
# Both are the module onnxruntime.
EITHER = {"onnxruntime-gpu": "onnxruntime"}
# Imported under names that are looked up, in `diffloss_engine.trt_build`, or read by a compiler.
LOOKED_UP = {"nvidia-cuda-cccl", "tensorrt", "tensorrt-rtx-cu13"}


def requirements(*extras: str) -> Iterator[Requirement]:
    """Yield what the project declares, with these extras and those that they name."""
    lines = [*PROJECT["project"]["dependencies"], *(line for extra in extras for line in EXTRAS[extra])]
    for requirement in map(Requirement, lines):
        if requirement.name == PROJECT["project"]["name"]:
            yield from (found for extra in requirement.extras for found in map(Requirement, EXTRAS[extra]))
        else:
            yield requirement


def third_party(sources: Iterable[str]) -> set[str]:
    """Return the packages on the index that provide what these modules import, late or not."""
    provided, found = packages_distributions(), set()
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            for name in imported(node, "diffloss_engine"):
                if name not in SOURCES and name not in sys.stdlib_module_names:
                    known = [PROVIDERS[name]] if name in PROVIDERS else provided.get(name)
                    found |= {canonicalize_name(distribution) for distribution in known or [f"nobody knows: {name}"]}
    return {EITHER.get(name, name) for name in found}


def differences(sources: Iterable[str]) -> tuple[set[str], set[str]]:
    """Return what is imported and not declared, and what is declared for all users and not imported."""
    for_all, optional = (
        {EITHER.get(name, name) for name in (canonicalize_name(found.name) for found in requirements(*extras))}
        for extras in (("cpu", "gpu", "profile", "rtx"), ("trainers", "examples"))
    )
    found = third_party(sources)
    return found - for_all - optional, for_all - found - LOOKED_UP


PACKAGES = [path.read_text(encoding="utf-8") for folder in SOURCES.values() for path in folder.rglob("*.py")]


def test_imports_and_declarations_agree() -> None:
    assert differences(PACKAGES) == (set(), set())


@pytest.mark.parametrize(
    ("source", "undeclared"),
    [
        ("def f():\n    import hypothesis", {"hypothesis"}),
        ("from no_such_module import this", {"nobody knows: no-such-module"}),
        ("import importlib, torch.fx, PIL.Image", set()),
    ],
)
def test_planted_import_is_found(source: str, undeclared: set[str]) -> None:
    assert differences([*PACKAGES, source])[0] == undeclared


def test_declaration_that_nobody_imports_is_found() -> None:
    without_rich = [source for source in PACKAGES if not re.search(r"(from|import) rich", source)]
    assert "rich" in differences(without_rich)[1]


def pinned(text: str) -> dict[str, Version]:
    """Return the versions of a file of constraints; raises ValueError for a line that is no name with one version.

    A local part, as in 2.13.0+cpu, would exclude the same version as the package index has it.
    """
    found: dict[str, Version] = {}
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        name, _, version = line.partition("==")
        if not re.fullmatch(r"[A-Za-z0-9._-]+", name) or not re.fullmatch(r"[0-9A-Za-z.]+", version):
            raise ValueError(f"not a name and a version: {line!r}")
        if canonicalize_name(name) in found:
            raise ValueError(f"twice: {line!r}")
        found[canonicalize_name(name)] = Version(version)
    return found


def of_ci() -> list[Requirement]:
    """Return what CI asks for: `.[cpu,dev]`, and what builds it."""
    asked = [*requirements("cpu", "dev"), *map(Requirement, PROJECT["build-system"]["requires"])]
    return [found for found in asked if found.marker is None or found.marker.evaluate(CI_MACHINE)]


def unpinned(versions: Mapping[str, Version]) -> list[str]:
    """Return which of what CI asks for has no version here, or one that its bounds exclude."""
    return [
        str(found)
        for found in of_ci()
        if (name := canonicalize_name(found.name)) not in versions or versions[name] not in found.specifier
    ]


def test_everything_declared_is_pinned_within_its_bounds() -> None:
    versions = pinned(CONSTRAINTS.read_text(encoding="utf-8"))
    assert unpinned(versions) == []
    assert "onnxruntime-gpu" not in versions
    assert unpinned({name: version for name, version in versions.items() if name != "torch"}) == ["torch<2.14,>=2.11"]
    assert unpinned(versions | {"filelock": Version("3.29.9")}) == ["filelock>=3.30"]


def test_bounds_that_the_security_page_names() -> None:
    named = re.findall(r"^\| (\S+) >= (\S+) \|", (ROOT / "docs" / "security.md").read_text("utf-8"), re.MULTILINE)
    bounds = {(found.name, part.version) for found in requirements("cpu") for part in found.specifier}
    assert named
    assert set(named) <= bounds


@pytest.mark.parametrize(
    "line",
    ["torch==2.13.0+cpu", "torch @ file:///wheels/torch.whl", "--find-links /wheels", "torch>=2.11", "a==1\nA==1", ""],
)
def test_constraints_are_names_and_versions(line: str) -> None:
    with pytest.raises(ValueError, match=r"not a name|twice"):
        pinned(f"# A comment.\n{line}\n")


def closure(names: Iterable[str]) -> set[str]:
    """Return these packages and all that they ask for on this machine, as far as they are installed."""
    found: set[str] = set()
    waiting = [(canonicalize_name(name), "") for name in names]
    while waiting:
        name, extra = waiting.pop()
        try:
            requires = distribution(name).requires or []
        except PackageNotFoundError:
            continue
        found.add(name)
        for requirement in map(Requirement, requires):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                wanted = canonicalize_name(requirement.name)
                if wanted not in found:
                    waiting += [(wanted, extra) for extra in ("", *requirement.extras)]
    return found


@pytest.mark.skipif(
    os.environ.get("PIP_CONSTRAINT") != str(CONSTRAINTS.relative_to(ROOT)), reason="not installed as CI does"
)
def test_ci_has_installed_what_is_pinned() -> None:
    versions = pinned(CONSTRAINTS.read_text(encoding="utf-8"))
    installed = {name: distribution(name).version for name in closure(found.name for found in of_ci())}
    # What a torch for GPUs asks for has one version, which torch itself says.
    of_gpus = re.compile("nvidia-|cuda-|triton")
    assert {name for name in installed if name not in versions and not of_gpus.match(name)} == set()
    other = {
        name: version
        for name, version in installed.items()
        if name in versions and Version(Version(version).public) != versions[name]
    }
    assert other == {}
