"""Command-line arguments of the examples: checked before any work, refused in one clear line."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from typing import NoReturn


class OneLineParser(argparse.ArgumentParser):
    """A parser that reports wrong usage in one line on stderr and exits with status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def positive_integer(text: str) -> int:
    """Read an integer of at least 1; raise `argparse.ArgumentTypeError` for anything else."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def weight(text: str) -> float:
    """Read a finite number of at least 0; raise `argparse.ArgumentTypeError` for anything else."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number of at least 0")
    return number


def output_folder(text: str) -> Path:
    """Read the path of a folder that is there and writable, or whose parent is.

    Nothing is made yet. Raises `argparse.ArgumentTypeError` for any other path.
    """
    folder = Path(text)
    if folder.exists() and not folder.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a file, not a folder")
    needed = folder if folder.exists() else folder.absolute().parent
    if not needed.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {str(needed)!r} to make {folder.name!r} in")
    if not os.access(needed, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"no permission to write to {str(needed)!r}")
    return folder
