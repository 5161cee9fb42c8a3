"""The writing of a bundle: what is written appears at its destination whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from diffloss_engine import strict_json
from diffloss_engine.bundle import Bundle
from diffloss_engine.errors import BundleError, InputError
from diffloss_engine.hashed_files import file_sha256, flush_to_disk, list_files
from diffloss_engine.manifest import MANIFEST, FileEntry, Graph, Manifest


class BundleWriter:
    """Collects a bundle's files in a hidden folder beside `destination` and moves it there once it is complete.

        with BundleWriter("bundle") as writer:
            (writer.path / "gradient.onnx").write_bytes(...)
            writer.commit(unet=..., resolution=(256, 256), batch_size=8, precision="fp16", graphs=[...])

    A `with` block that is left without `commit`, or by any exception, leaves nothing behind. A process that is killed
    leaves its hidden folder; the manifest is the last file written into it, so that a part is never taken for a whole.

    Raises InputError, before any work, if the parent folder of `destination` is missing, not writable or in another
    bundle, or if `destination` exists; an empty folder does not count as existing, and with `overwrite` neither does a
    bundle.
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
        for folder in self.destination.parents:
            if _is_bundle(folder):
                raise InputError(
                    f"{self.destination} is not written: it would be in the bundle {folder}, which could not be opened "
                    "any more"
                )
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
        and leaves the destination as it was, if the result would not open, or cannot be written; and what `check` does,
        or InputError if something has come to be at the destination meanwhile.
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
            text = Manifest(unet, resolution, batch_size, precision, by_name, files).to_text()
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
        try:
            if old is not None:
                self.destination.rename(old)
            folder.rename(self.destination)
        except BaseException:
            # Ctrl-C may come with either done.
            if old is not None and old.exists() and not self.destination.exists():
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


def _is_bundle(folder: Path) -> bool:
    """Return whether `folder` has a bundle's manifest; many other programs call a file of theirs so too."""
    try:
        Manifest.from_json(strict_json.read_json(folder / MANIFEST))
    except BundleError:
        return False
    return True
