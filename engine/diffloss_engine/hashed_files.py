"""The files below a folder: their names, sizes and hashes, and getting them onto the disk."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping
from pathlib import Path

from diffloss_engine.errors import BundleError, IntegrityError
from diffloss_engine.manifest import FileEntry


def list_files(folder: Path) -> dict[str, int]:
    """Size in bytes of every file below `folder`, by its path with "/" relative to it.

    Raises BundleError if anything there is neither a folder nor a regular file. Links are not followed but refused:
    one could point at any file of the machine.
    """
    sizes: dict[str, int] = {}
    pending = [(folder, "")]
    try:
        while pending:
            current, prefix = pending.pop()
            with os.scandir(current) as entries:
                for entry in entries:
                    status = entry.stat(follow_symlinks=False)
                    if stat.S_ISDIR(status.st_mode):
                        pending.append((Path(entry.path), f"{prefix}{entry.name}/"))
                    elif stat.S_ISREG(status.st_mode):
                        sizes[prefix + entry.name] = status.st_size
                    else:
                        kind = "a symbolic link" if stat.S_ISLNK(status.st_mode) else "not a regular file"
                        raise BundleError(f"{folder}: {prefix + entry.name!r} is {kind}, which a bundle may not hold")
    except OSError as error:
        raise BundleError(f"{folder} cannot be listed: {error}") from error
    return sizes


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content in lower-case hex. Raises OSError if it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def compare_files(folder: Path, on_disk: Mapping[str, int], listed: Mapping[str, FileEntry]) -> None:
    """Raise IntegrityError if the files in `folder` and their sizes are not those that are listed."""
    for path, entry in listed.items():
        if path not in on_disk:
            raise IntegrityError(f"{folder}: the file {path!r} is missing")
        if on_disk[path] != entry.bytes:
            raise IntegrityError(f"{folder}: {path!r} has {on_disk[path]} bytes, expected {entry.bytes}")
    foreign = sorted(on_disk.keys() - listed.keys())
    if foreign:
        raise IntegrityError(f"{folder}: {foreign[0]!r} does not belong to the bundle; take it out")


def flush_to_disk(path: Path) -> None:
    """Have a file's content, or a folder's entries, written to the disk. Raises OSError if that fails."""
    # Windows can flush neither a folder nor a file that is open for reading.
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
