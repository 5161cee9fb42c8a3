"""Telling the user of a wait of minutes: a line in the log, and on a terminal a line with the time that goes away."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

logger = logging.getLogger(__name__)

Show = Callable[[str], AbstractContextManager[None]]
_shows: list[Show] = []


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
    with line(what):
        yield


@contextmanager
def line(what: str) -> Iterator[None]:
    """Show `what` on the terminal, and for how long, while the block runs."""
    with spinner() as progress:
        progress.add_task(what, total=None)
        yield


@contextmanager
def waits_shown_by(show: Show) -> Iterator[None]:
    """While the block runs, a command's, let `show` show to its user what `shown` is called with."""
    _shows.append(show)
    try:
        yield
    finally:
        _shows.remove(show)


@contextmanager
def shown(what: str) -> Iterator[None]:
    """Show what the block waits for, if a command runs. In a training it is usual: all ranks but one do."""
    with ExitStack() as shows:
        for show in _shows:
            shows.enter_context(show(what))
        yield
