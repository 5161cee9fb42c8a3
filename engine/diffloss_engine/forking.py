"""Forks of this process, such as those that start data loaders' workers, while other threads are at work.

A forked process has the thread that forked it and no other. A lock that another one held stays locked there, and what
it was about to change, in libraries too, stays as it was at that moment. So a fork waits for what must not be cut off,
and other locks are new in the child.
"""

from __future__ import annotations

# It takes a lock before a fork, which threads that are waited for may want: what is registered first comes last.
import concurrent.futures.thread  # noqa: F401
import os
import threading
from contextlib import AbstractContextManager
from typing import Any
from weakref import WeakSet


class ProcessLock:
    """`lock` is each process's own: in a forked one it is free, whoever held it.

    It is for state that is consistent at any moment, and for waits that a fork need not share.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        _process_locks.add(self)


class _ThreadLock(threading.local):
    def __init__(self) -> None:
        self.lock = threading.RLock()
        with _listing:
            _thread_locks.add(self.lock)


_process_locks: WeakSet[ProcessLock] = WeakSet()
_thread_locks: WeakSet[Any] = WeakSet()
# While it is held no thread gets a lock of its own.
_listing = threading.RLock()
_own = _ThreadLock()
_waited_for: list[Any] = []
# By the thread that is forking, in the order in which they were acquired.
_held: list[Any] = []


def unforked() -> AbstractContextManager[Any]:
    """Return a context that several threads can be in at once; a fork by another thread waits until they have left.

    Inside, a thread may wait for no other one, nor for a lock given to `fork_waits_for` that it does not hold.
    """
    return _own.lock


def fork_waits_for(lock: Any) -> None:
    """Let forks wait until no other thread holds `lock`, a reentrant one that is never freed.

    Threads that want to be `unforked` do not wait meanwhile, so that it may be held for long.
    """
    _waited_for.append(lock)


def _acquire_all() -> None:
    for lock in (*_waited_for, _listing):
        lock.acquire()
        _held.append(lock)
    for lock in list(_thread_locks):
        lock.acquire()
        _held.append(lock)


def _release_all() -> None:
    # Another thread may begin to fork as soon as the last is released.
    held = _held.copy()
    _held.clear()
    for lock in reversed(held):
        lock.release()


def _renew() -> None:
    _release_all()
    for lock in _process_locks:
        lock.lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_acquire_all, after_in_parent=_release_all, after_in_child=_renew)
