"""Telling the user of a wait of minutes: a line in the log, and on a terminal a line with the time that goes away."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

logger = logging.getLogger(__name__)


@functools.cache
def stderr_console() -> Console:
    """Return the one console on which progress is shown: lines of the same one are shown below each other."""
    from rich.console import Console

    return Console(stderr=True)


def spinner() -> Progress:
    """Return a display of what runs and for how long, which goes away when it is done."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    return Progress(*columns, console=stderr_console(), transient=True)


@contextmanager
def long_wait(what: str) -> Iterator[None]:
    """Say `what` is going on while the block runs."""
    logger.info("%s, which takes minutes the first time", what)
    if not stderr_console().is_terminal:
        yield
        return
    with spinner() as progress:
        progress.add_task(what, total=None)
        yield
