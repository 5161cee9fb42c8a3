"""The manifest of a bundle: every field, every type and every path, checked before anything is used."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from diffloss_engine.errors import BundleError, IntegrityError
from diffloss_engine.strict_json import expect, expect_object, expect_positive
from diffloss_engine.tensors import TensorSpec

FORMAT = "diffloss-bundle"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
PRECISIONS = ("fp32", "fp16", "bf16")

_FIELDS = frozenset({"format", "format_version", "unet", "resolution", "batch_size", "precision", "graphs", "files"})
_GRAPH_FIELDS = frozenset({"file", "sha256", "nodes", "inputs", "outputs", "weights"})
_FILE_FIELDS = frozenset({"sha256", "bytes"})
_SHA256 = re.compile(r"[0-9a-f]{64}")
# Letters that mean the same on every file system. It leaves out "..", absolute paths, drives and backslashes, and
# also the "*" of ONNX Runtime's "*/_ORT_MEM_ADDR_/*", which as a weight file's name reads from a memory address.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")

# Memory is asked for by these numbers before anything else could tell that they are not meant.
LONGEST_SIDE, LARGEST_BATCH = 16_384, 4_096


class FileEntry(NamedTuple):
    """SHA-256 (lower-case hex) and size in bytes of one file of a bundle."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Graph:
    """One ONNX graph of a bundle.

    `file` and `weights` are paths inside the bundle; `weights` are the files that the graph's ONNX external data
    points into. `sha256` is that of `file` alone.
    """

    name: str
    file: str
    sha256: str
    nodes: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weights: tuple[str, ...]

    @classmethod
    def from_json(cls, name: str, value: object) -> Graph:
        """Read what `to_json` wrote. Raises BundleError for anything else."""
        where = f"graph {name!r}"
        _expect_name(name, where)
        fields = expect_object(value, _GRAPH_FIELDS, where)
        weights = expect(fields["weights"], list, f"{where}: weights")
        return cls(
            name=name,
            file=expect_path(fields["file"], f"{where}: file"),
            sha256=_expect_sha256(fields["sha256"], f"{where}: sha256"),
            nodes=expect_positive(fields["nodes"], f"{where}: nodes"),
            inputs=_expect_specs(fields["inputs"], f"{where}: inputs"),
            outputs=_expect_specs(fields["outputs"], f"{where}: outputs"),
            weights=tuple(expect_path(path, f"{where}: weights") for path in weights),
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "file": self.file,
            "sha256": self.sha256,
            "nodes": self.nodes,
            "inputs": [spec.to_json() for spec in self.inputs],
            "outputs": [spec.to_json() for spec in self.outputs],
            "weights": list(self.weights),
        }


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says; see `Bundle` for the meaning of the fields."""

    unet: Mapping[str, Any]
    resolution: tuple[int, int]
    batch_size: int
    precision: str
    graphs: dict[str, Graph]
    files: dict[str, FileEntry]
    format_version: int = FORMAT_VERSION

    @classmethod
    def from_json(cls, value: object) -> Manifest:
        """Read what `to_json` wrote.

        Raises BundleError if it is not a bundle's manifest, is of a newer format version, has a wrong, missing or
        unknown field, or a path that is not plain and relative; IntegrityError if its own parts contradict.
        """
        _check_format(expect(value, dict, MANIFEST))
        fields = expect_object(value, _FIELDS, MANIFEST)
        resolution = expect(fields["resolution"], list, "resolution")
        if len(resolution) != 2:
            raise BundleError(f"resolution has {len(resolution)} numbers, expected height and width")
        precision = expect(fields["precision"], str, "precision")
        if precision not in PRECISIONS:
            raise BundleError(f"precision is {precision!r}, expected one of {', '.join(PRECISIONS)}")
        manifest = cls(
            unet=_expect_unet(fields["unet"]),
            resolution=(
                _expect_up_to(LONGEST_SIDE, resolution[0], "height"),
                _expect_up_to(LONGEST_SIDE, resolution[1], "width"),
            ),
            batch_size=_expect_up_to(LARGEST_BATCH, fields["batch_size"], "batch_size"),
            precision=precision,
            graphs={
                name: Graph.from_json(name, graph)
                for name, graph in sorted(expect(fields["graphs"], dict, "graphs").items())
            },
            files={
                expect_path(path, "files"): _expect_file(entry, f"file {path!r}")
                for path, entry in sorted(expect(fields["files"], dict, "files").items())
            },
            format_version=fields["format_version"],
        )
        manifest._check_references()
        return manifest

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "format_version": self.format_version,
            "unet": dict(self.unet),
            "resolution": list(self.resolution),
            "batch_size": self.batch_size,
            "precision": self.precision,
            "graphs": {name: graph.to_json() for name, graph in self.graphs.items()},
            "files": {path: entry._asdict() for path, entry in self.files.items()},
        }

    def to_text(self) -> str:
        """Return the file's content, equal for equal fields. Raises BundleError for what `from_json` would refuse."""
        try:
            text = json.dumps(self.to_json(), indent=2, sort_keys=True, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise BundleError(f"{MANIFEST} cannot be written: {error}") from error
        # What the reader would refuse is refused while there is still somebody to tell.
        Manifest.from_json(json.loads(text))
        return text + "\n"

    def _check_references(self) -> None:
        for graph in self.graphs.values():
            for path in (graph.file, *graph.weights):
                if path not in self.files:
                    raise BundleError(f"graph {graph.name!r} refers to {path!r}, which is not among the files")
            if graph.sha256 != self.files[graph.file].sha256:
                raise IntegrityError(f"graph {graph.name!r} and file {graph.file!r} have different sha256 values")


def expect_path(value: object, where: str) -> str:
    """Return `value` if it is a plain relative path ("a/b.c") of portable letters, else raise BundleError."""
    path = expect(value, str, where)
    if path == MANIFEST or not all(_NAME.fullmatch(part) for part in path.split("/")):
        raise BundleError(
            f"{where}: {path!r} is not a path inside a bundle: relative, without '..', of letters, digits, "
            "'_', '-' and '.', no part beginning with '.' or '-'"
        )
    return path


def _expect_name(name: str, where: str) -> None:
    # Names are printed to terminals, where others can be commands.
    if not _NAME.fullmatch(name):
        raise BundleError(
            f"{where}: the name may hold letters, digits and '_', '-', '.', and not begin with '.' or '-'"
        )


def _expect_up_to(most: int, value: object, where: str) -> int:
    number = expect_positive(value, where)
    if number > most:
        raise BundleError(f"{where} is {number}, expected at most {most}")
    return number


def _check_format(fields: dict[str, Any]) -> None:
    if fields.get("format") != FORMAT:
        raise BundleError(f"{MANIFEST}: format is {fields.get('format')!r}, expected {FORMAT!r}")
    version = expect_positive(fields.get("format_version"), "format_version")
    if version > FORMAT_VERSION:
        raise BundleError(
            f"the bundle has format version {version}, and this diffloss-trt reads up to {FORMAT_VERSION}: "
            f"upgrade to a diffloss-trt that reads format version {version}"
        )


def _expect_unet(value: object) -> dict[str, Any]:
    unet = expect(value, dict, "unet")
    name = expect(unet.get("class"), str, "unet: class")
    _expect_name(name, f"unet: class {name!r}")
    expect_positive(unet.get("parameters"), "unet: parameters")
    _expect_sha256(unet.get("sha256"), "unet: sha256")
    return unet


def _expect_specs(value: object, where: str) -> tuple[TensorSpec, ...]:
    specs = tuple(TensorSpec.from_json(spec, where) for spec in expect(value, list, where))
    names = [spec.name for spec in specs]
    if len(set(names)) != len(names):
        raise BundleError(f"{where}: a name occurs twice in {names}")
    for name in names:
        _expect_name(name, f"{where}: tensor {name!r}")
    return specs


def _expect_file(value: object, where: str) -> FileEntry:
    fields = expect_object(value, _FILE_FIELDS, where)
    size = expect(fields["bytes"], int, f"{where}: bytes")
    if size < 0:
        raise BundleError(f"{where}: bytes is {size}, expected at least 0")
    return FileEntry(_expect_sha256(fields["sha256"], f"{where}: sha256"), size)


def _expect_sha256(value: object, where: str) -> str:
    digest = expect(value, str, where)
    if not _SHA256.fullmatch(digest):
        raise BundleError(f"{where} is {digest!r}, expected 64 lower-case hex digits")
    return digest
