"""Picture files that a command writes: refused before the work, and written whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path

from diffloss_engine.bundle import Bundle
from diffloss_engine.errors import InputError


def check_place(path: Path, bundle: Bundle | None) -> None:
    """Raise InputError if no file can be made there, or if it is in the bundle, which knows all of its files."""
    if not path.absolute().parent.is_dir():
        raise InputError(f"{path} cannot be written: there is no folder {path.parent}")
    if path.is_dir():
        raise InputError(f"{path} cannot be written: it is a folder")
    if not os.access(path.resolve().parent, os.W_OK | os.X_OK):
        raise InputError(f"{path} cannot be written: the folder {path.resolve().parent} is not writable")
    if bundle is not None and path.resolve().is_relative_to(bundle.path.resolve()):
        raise InputError(f"{path} is not written: it would be in the bundle, which could not be opened any more")


def write_picture(path: Path, save: Callable[[Path], object]) -> None:
    """Have `save` write what takes the place of `path`; raise InputError, and leave `path` as it was, if that fails."""
    place = path.resolve()  # a link stays one
    part = place.with_name(f".{place.stem}.partial-{secrets.token_hex(4)}{place.suffix}")
    try:
        save(part)
        os.replace(part, place)
    # Also what a format does not take, such as too many pixels.
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}") from error
    finally:
        part.unlink(missing_ok=True)
