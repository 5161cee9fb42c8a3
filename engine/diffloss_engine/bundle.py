"""The folder that an export writes: a manifest, and exactly the files that the manifest lists, by hash.

Nothing that is read from a bundle is trusted: paths are checked before they are followed, sizes when the bundle is
opened, and the hash of a file when it is first used.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
from pathlib import Path
from typing import Any

from diffloss_engine import strict_json
from diffloss_engine.errors import BundleError, InputTypeError, IntegrityError
from diffloss_engine.external_data import read_external_data
from diffloss_engine.hashed_files import compare_files, file_sha256, list_files
from diffloss_engine.manifest import FORMAT_VERSION, MANIFEST, FileEntry, Graph, Manifest

__all__ = ["FORMAT_VERSION", "MANIFEST", "Bundle", "FileEntry", "Graph", "file_sha256"]

_MADE = "'diffloss-export onnx MODEL -o BUNDLE' makes a bundle"


class Bundle:
    """A bundle on disk, opened for reading.

    Attributes:
        path: the folder, absolute: files are read from it later, wherever the process has gone by then.
        unet: what the bundle says of the diffusion model: `class`, `parameters`, `sha256` and more.
        resolution: height and width of the images, in pixels.
        batch_size: how many images the graphs take at once.
        precision: "fp32", "fp16" or "bf16".
        graphs: the graphs by name.
        files: SHA-256 and size of every file but the manifest, by path inside the bundle.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.format_version = manifest.format_version
        self.unet = manifest.unet
        self.resolution = manifest.resolution
        self.batch_size = manifest.batch_size
        self.precision = manifest.precision
        self.graphs = manifest.graphs
        self.files = manifest.files
        self._manifest = manifest
        self._verified: set[str] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.path, self._manifest.to_text())

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Bundle:
        """Open the bundle in the folder `path`: its manifest and the list and sizes of its files, not yet their hashes.

        Raises BundleError if there is no folder, if it is not a bundle or one of a newer format version, if the
        manifest is malformed, or if anything in the folder is neither a folder nor a regular file (links included);
        IntegrityError if a file is missing, has another size, or does not belong to the bundle; InputTypeError for what
        is no path.
        """
        if not isinstance(path, str | os.PathLike):
            raise InputTypeError(f"the bundle is {path!r}, a {type(path).__name__}; expected the path of a folder")
        try:
            folder = Path(path).expanduser()  # nobody does it for a path in a file of options
            if not folder.is_dir():
                raise BundleError(
                    f"{folder} is not a folder" if folder.exists() else f"{folder} does not exist; {_MADE}"
                )
            # Before anything is listed: it may be somebody's whole project, or home.
            (folder / MANIFEST).lstat()
        except FileNotFoundError as error:
            raise BundleError(f"{folder} is not a bundle: it has no {MANIFEST}; {_MADE}") from error
        # Of a home that is not known, or a path that is too long.
        except (OSError, RuntimeError) as error:
            raise BundleError(f"{path} cannot be opened: {getattr(error, 'strerror', None) or error}") from error
        on_disk = list_files(folder)
        on_disk.pop(MANIFEST, None)
        try:
            manifest = Manifest.from_json(strict_json.read_json(folder / MANIFEST))
        except IntegrityError as error:
            raise IntegrityError(f"{folder}: {error}") from error
        except BundleError as error:
            raise BundleError(f"{folder}: {error}") from error
        compare_files(folder, on_disk, manifest.files)
        return cls(folder.absolute(), manifest)

    def description(self) -> dict[str, Any]:
        """What the manifest says, as JSON values."""
        return self._manifest.to_json()

    def file(self, relative: str) -> Path:
        """The path of a file of the bundle, its hash verified the first time that it is asked for.

        Raises BundleError if the bundle has no such file, IntegrityError if the file is missing or was altered.
        """
        entry = self.files.get(relative)
        if entry is None:
            raise BundleError(f"{self.path}: the bundle has no file {relative!r}")
        path = self.path / relative
        if relative not in self._verified:
            try:
                digest = file_sha256(path)
            except OSError as error:
                raise IntegrityError(f"{path} cannot be read: {error.strerror}") from error
            if digest != entry.sha256:
                raise IntegrityError(f"{path} was altered: its sha256 is {digest}, expected {entry.sha256}")
            self._verified.add(relative)
        return path

    def verify_hashes(self) -> None:
        """Verify the hash of every file. Raises IntegrityError naming the first that is missing or was altered."""
        for relative in self.files:
            self.file(relative)

    def read_json(self, relative: str) -> Any:
        """The content of a JSON file of the bundle. Raises as `file` does, and BundleError if it is not valid JSON."""
        return strict_json.read_json(self.file(relative))

    def graph_file(self, name: str) -> Path:
        """The path of a graph's ONNX file, once everything that a runtime would read for it has been verified.

        That is the file itself, its weights, and where its external data points. Raises BundleError if there is no
        such graph, it refers to data outside its weights, or it has operations that are not ONNX's own; IntegrityError
        if a file is missing or was altered.
        """
        graph = self.graphs.get(name)
        if graph is None:
            raise BundleError(f"{self.path}: the bundle has no graph {name!r}; it has {sorted(self.graphs)}")
        path = self.file(graph.file)
        for weights in graph.weights:
            self.file(weights)
        for data in read_external_data(path):
            location = posixpath.join(posixpath.dirname(graph.file), data.location)
            if location not in graph.weights:
                raise BundleError(
                    f"{path}: tensor {data.tensor!r} has its data in {data.location!r}, "
                    f"which is not one of the graph's weights {list(graph.weights)}"
                )
            size, end = self.files[location].bytes, data.offset + (data.length or 0)
            if end > size:
                raise BundleError(
                    f"{path}: the data of tensor {data.tensor!r} ends at byte {end} of {data.location!r}, "
                    f"which has {size} bytes"
                )
        return path

    def graph_digest(self, name: str) -> str:
        """What identifies a graph and its weights by content: the key under which plans of it are kept."""
        graph = self.graphs[name]
        hashes = [graph.sha256, *(self.files[path].sha256 for path in graph.weights)]
        return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def _reopen(path: Path, manifest: str) -> Bundle:
    """Open a bundle that was pickled; hashes are checked anew. Raises IntegrityError if it is another one by now."""
    bundle = Bundle.open(path)
    if bundle._manifest.to_text() != manifest:
        raise IntegrityError(f"{path} holds another bundle than when this was pickled: load the loss again")
    return bundle
