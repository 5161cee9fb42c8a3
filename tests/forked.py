"""Work in a forked process, which has to end."""

from __future__ import annotations

import faulthandler
import multiprocessing
from collections.abc import Callable
from typing import TypeVar

import pytest

# Longer than anything here takes, where nothing hangs.
SECONDS = 20

Test = TypeVar("Test", bound=Callable[..., None])


def forks(test: Test) -> Test:
    """Mark a test that forks."""
    here = "fork" in multiprocessing.get_all_start_methods()
    pytest.mark.skipif(not here, reason="processes cannot be forked here")(test)
    # Python 3.12 and later warn of what is tested here.
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")(test)
    return test


def run_forked(work: Callable[[], object]) -> None:
    """Fork a process that does `work`; fail if that raises, or hangs: then stderr says where."""

    def watched() -> None:
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        work()

    child = multiprocessing.get_context("fork").Process(target=watched)
    child.start()
    child.join(2 * SECONDS)
    child.kill()
    assert child.exitcode == 0
