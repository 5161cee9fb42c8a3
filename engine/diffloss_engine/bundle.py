"""The folder that an export writes: a manifest, and exactly the files that the manifest lists, by hash.

Nothing that is read from a bundle is trusted: paths are checked before they are followed, sizes when the bundle is
opened, and the hash of a file when it is first used. What is written appears at its destination whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from diffloss_engine import strict_json
from diffloss_engine.errors import BundleError, InputError, InputTypeError, IntegrityError
from diffloss_engine.external_data import read_external_data
from diffloss_engine.hashed_files import compare_files, file_sha256, flush_to_disk, list_files
from diffloss_engine.manifest import FORMAT_VERSION, MANIFEST, FileEntry, Graph, Manifest

__all__ = ["FORMAT_VERSION", "MANIFEST", "Bundle", "BundleWriter", "FileEntry", "Graph", "file_sha256"]

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
        return _reopen, (self.path, _manifest_text(self._manifest))

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
        # Of a home that is not known, or a path that is too long.
        except (OSError, RuntimeError) as error:
            raise BundleError(f"{path} cannot be opened: {getattr(error, 'strerror', None) or error}") from error
        on_disk = list_files(folder)
        if on_disk.pop(MANIFEST, None) is None:
            raise BundleError(f"{folder} is not a bundle: it has no {MANIFEST}; {_MADE}")
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
        such graph or it refers to data outside its weights, IntegrityError if a file is missing or was altered.
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
    if _manifest_text(bundle._manifest) != manifest:
        raise IntegrityError(f"{path} holds another bundle than it did when this was pickled: load that anew")
    return bundle


class BundleWriter:
    """Collects a bundle's files in a hidden folder beside `destination` and moves it there once it is complete.

        with BundleWriter("bundle") as writer:
            (writer.path / "gradient.onnx").write_bytes(...)
            writer.commit(unet=..., resolution=(256, 256), batch_size=8, precision="fp16", graphs=[...])

    A `with` block that is left without `commit`, or by any exception, leaves nothing behind. A process that is killed
    leaves its hidden folder; the manifest is the last file written into it, so that a part is never taken for a whole.

    Raises InputError, before any work, if the parent folder of `destination` is missing or not writable, or if
    `destination` exists; an empty folder does not count as existing, and with `overwrite` neither does a bundle.
    """

    def __init__(self, destination: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        try:
            # Links are followed here, so that what is replaced is the folder and not the link to it.
            self.destination = Path(destination).expanduser().resolve()
        except (OSError, RuntimeError) as error:
            raise InputError(f"{destination} cannot be written to: {error}") from error
        if self.destination.is_symlink():  # from Python 3.13 on a loop is no error
            raise InputError(f"{destination} cannot be written to: it is in a loop of links")
        self._overwrite = overwrite
        self._folder: Path | None = None
        parent = self.destination.parent
        if not parent.is_dir():
            raise InputError(f"{self.destination} cannot be written: the folder {parent} does not exist")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise InputError(f"{self.destination} cannot be written: the folder {parent} is not writable")
        if os.path.ismount(self.destination):
            raise InputError(
                f"{self.destination} cannot be replaced: a file system is mounted there; name a folder inside it"
            )
        self._check_destination()

    def __enter__(self) -> Self:
        folder = self._sibling("partial")
        try:
            folder.mkdir()
        except OSError as error:
            raise InputError(f"{self.destination} cannot be written: {error}") from error
        self._folder = folder
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    @property
    def path(self) -> Path:
        """The folder that takes the bundle's files, from the beginning of the `with` block until `commit`."""
        if self._folder is None:
            raise BundleError("a bundle is written inside the writer's with block, and before commit")
        return self._folder

    def commit(
        self,
        *,
        unet: Mapping[str, Any],
        resolution: tuple[int, int],
        batch_size: int,
        precision: str,
        graphs: Iterable[Graph],
        check: Callable[[Bundle], None] = lambda _: None,
    ) -> Bundle:
        """Write the manifest over everything in `path`, move the folder to the destination, and open it there.

        The fields are those of `Bundle`. Equal files and fields give a byte-identical manifest. Raises BundleError,
        and leaves the destination as it was, if the result would not open, or cannot be written.
        """
        folder = self.path
        by_name: dict[str, Graph] = {}
        for graph in graphs:
            if graph.name in by_name:
                raise BundleError(f"two graphs are named {graph.name!r}")
            by_name[graph.name] = graph
        try:
            files = {
                path: FileEntry(file_sha256(folder / path), size)
                for path, size in list_files(folder).items()
                if path != MANIFEST
            }
            text = _manifest_text(Manifest(unet, resolution, batch_size, precision, by_name, files))
            (folder / MANIFEST).write_text(text, encoding="utf-8", newline="\n")
            for path in files:
                # safetensors lets nobody but its user read what it writes; a bundle is for whoever may read a new file.
                shutil.copymode(folder / MANIFEST, folder / path)
                flush_to_disk(folder / path)
            flush_to_disk(folder / MANIFEST)
            for parent in {(folder / path).parent for path in files} | {folder}:
                flush_to_disk(parent)
            check(Bundle.open(folder))
            self._move_into_place(folder)
        except OSError as error:
            raise BundleError(f"{self.destination} cannot be written: {error}") from error
        self._folder = None
        return Bundle.open(self.destination)

    def _move_into_place(self, folder: Path) -> None:
        # Minutes may have passed since the constructor looked.
        self._check_destination()
        old: Path | None = None
        if self.destination.exists():
            old = self._sibling("replaced")
            self.destination.rename(old)
        try:
            folder.rename(self.destination)
        except BaseException:
            if old is not None:
                old.rename(self.destination)
            raise
        flush_to_disk(self.destination.parent)
        if old is not None:
            # The new bundle is in place: a remnant of the old one is a nuisance, not a failure.
            shutil.rmtree(old, ignore_errors=True)

    def _check_destination(self) -> None:
        """Raise InputError unless nothing that matters would be lost by writing to the destination."""
        if not self.destination.exists():
            return
        if self.destination.is_dir() and not any(self.destination.iterdir()):
            return
        if not self._overwrite:
            raise InputError(f"{self.destination} exists already, and overwriting was not asked for (--overwrite)")
        try:
            # Also refuses a bundle that somebody keeps other files in, which would be lost.
            Bundle.open(self.destination)
        except BundleError as error:
            raise InputError(f"{self.destination} is not overwritten, because it is not a bundle: {error}") from error

    def _sibling(self, purpose: str) -> Path:
        """A fresh hidden name beside the destination, hence on the same file system: renaming is atomic there."""
        return self.destination.with_name(f".{self.destination.name}.{purpose}-{secrets.token_hex(4)}")


def _manifest_text(manifest: Manifest) -> str:
    try:
        text = json.dumps(manifest.to_json(), indent=2, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise BundleError(f"{MANIFEST} cannot be written: {error}") from error
    # What the reader would refuse is refused while there is still somebody to tell.
    Manifest.from_json(json.loads(text))
    return text + "\n"
