from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator

import pytest

from diffloss_engine import progress

LINE = "compiling, which takes minutes the first time"


def test_without_a_terminal_it_is_a_line_in_the_log(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO), progress.long_wait("compiling"):
        pass
    assert [record.getMessage() for record in caplog.records] == [LINE]
    assert capsys.readouterr().err == ""


def test_waits_are_shown_by_a_command_alone() -> None:
    said: list[str] = []

    @contextlib.contextmanager
    def show(what: str) -> Iterator[None]:
        said.append(what)
        yield
        said.append("over")

    with progress.shown("by nobody"):
        pass
    with progress.waits_shown_by(show), progress.shown("for another process"):
        said.append("waiting")
    with progress.shown("by nobody"):
        pass
    assert said == ["for another process", "waiting", "over"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_on_a_terminal_it_is_shown_and_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside another display of the same console too, as in a command that loads a loss."""
    import os
    import pty

    from rich.console import Console
    from rich.progress import Progress

    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal:
        console = Console(file=terminal, force_terminal=True, width=80)
        monkeypatch.setattr(progress, "stderr_console", lambda: console)
        with Progress(console=console, transient=True) as outer:
            outer.add_task("verifying", total=None)
            with pytest.raises(KeyError), progress.long_wait("compiling [/x]"):
                raise KeyError("what went wrong inside")
    written = b""
    with contextlib.suppress(OSError):  # which is how Linux says that the other end is closed
        while piece := os.read(ours, 4096):
            written += piece
    os.close(ours)
    shown = written.decode()
    assert "compiling [/x]" in shown  # a path is no markup
    assert "verifying" in shown
    assert shown.endswith("\x1b[2K")  # the last thing is that the line is erased
