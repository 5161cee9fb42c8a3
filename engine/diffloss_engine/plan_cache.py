"""The user's own folder of plans: built once for each key, whoever asks, and read back only if unaltered.

A plan is machine code that TensorRT runs without a check. So it is never taken from a bundle or from anywhere else, but
only from a folder and a file that belong to the user, into which nobody else can write, and only with the hash that was
noted when it was written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import BaseFileLock, FileLock, Timeout

from diffloss_engine.errors import BundleError, InputError
from diffloss_engine.hashed_files import flush_to_disk
from diffloss_engine.progress import shown
from diffloss_engine.strict_json import expect, expect_object, expect_positive, parse_json

logger = logging.getLogger(__name__)

_FORMAT = 1
_FIELDS = frozenset({"format", "key", "sha256", "bytes"})
# A file begins with a line of JSON, of at most so many bytes; the plan follows.
_LONGEST_HEADER = 64 * 1024

Key = Mapping[str, Any]
Plan = bytes | memoryview


class KeptPlan(NamedTuple):
    """A plan in the cache: its key, its file, and that file's size in bytes."""

    key: dict[str, Any]
    path: Path
    bytes: int


def default_folder() -> Path:
    """Return $DIFFLOSS_CACHE, or else diffloss-trt in the user's cache folder. Raises InputError if there is none."""
    chosen = os.environ.get("DIFFLOSS_CACHE")
    try:
        if chosen:
            return Path(chosen).expanduser()  # no shell does it for what is in quotes, or in a file of settings
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffloss-trt"
    except RuntimeError as error:
        raise InputError("no home directory to keep plans in: set DIFFLOSS_CACHE to a folder") from error


class PlanCache:
    """Plans by key, a JSON object that says everything that a plan depends on.

    The folder, by default `default_folder()`, is made when it is needed. One that cannot be written, or made, is read
    all the same, and what it does not hold is built and not kept. Methods that read or write plans raise InputError if
    it is not the user's own, or no folder.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or default_folder()
        # What should have been set aside, but is where nothing can be moved.
        self._passed_over: set[Path] = set()

    def get(self, key: Key, build: Callable[[], Plan], *, must_keep: bool = False) -> Plan:
        """Return the plan of `key`; build it, and keep it, if there is none that is whole.

        Of several processes that ask for the same plan one builds it, and the others wait. One that is damaged or
        somebody else's is set aside, with a line in the log. Where the plan cannot be kept that is a warning; with
        `must_keep` it is an InputError, and one before anything is built if the folder cannot be written at all.
        """
        obstacle = self._make_folder()
        if obstacle is not None:
            return self._build(key, build, obstacle, must_keep)
        with self._locked(key) as obstacle:
            plan = self._read(key)
            return self._build(key, build, obstacle, must_keep) if plan is None else plan

    def find(self, key: Key) -> Plan | None:
        """Return the plan of `key`, or None; one that is damaged or somebody else's is set aside as `get` does."""
        if self._make_folder() is not None:
            return None
        with self._locked(key):
            return self._read(key)

    def reject(self, key: Key, plan: Plan, reason: str) -> None:
        """Set aside a plan that the runtime refuses, so that the next `get` builds it anew.

        What another process has put in its place meanwhile stays.
        """
        if self._make_folder() is None:
            with self._locked(key):
                kept = self._read(key)
                if kept is not None and hashlib.sha256(kept).digest() == hashlib.sha256(plan).digest():
                    self._set_aside(key, reason)

    def list_plans(self) -> list[KeptPlan]:
        """Return what is there, the latest first; the plans themselves are not read."""
        found = []
        for path in self.folder.glob("*.plan"):
            with contextlib.suppress(BundleError, OSError), path.open("rb") as file:
                status, key = os.fstat(file.fileno()), _read_header(file.readline(_LONGEST_HEADER))["key"]
                found.append((status.st_mtime_ns, KeptPlan(key, path, status.st_size)))
        return [plan for _, plan in sorted(found, key=lambda entry: entry[0], reverse=True)]

    def list_keys(self) -> list[dict[str, Any]]:
        """Return the keys of `list_plans`."""
        return [plan.key for plan in self.list_plans()]

    def _path(self, key: Key, suffix: str) -> Path:
        text = json.dumps(key, sort_keys=True, allow_nan=False)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:40]}{suffix}"

    def _make_folder(self) -> OSError | None:
        """Make the folder, unless it is there, and return why it cannot be made, or None."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _expect_ours(self.folder.stat())
        except (FileExistsError, NotADirectoryError) as error:
            raise InputError(f"the plan cache {self.folder} cannot be made: {error.strerror}") from error
        except OSError as error:
            return error
        except BundleError as error:
            raise InputError(f"the plan cache {self.folder} cannot be trusted: {error}") from error
        return None

    @contextlib.contextmanager
    def _locked(self, key: Key) -> Iterator[OSError | None]:
        """Hold the lock of a key; yield None, or why it cannot be had.

        Without it plans can be read, which appear whole, but not written: an unfinished one has one name.
        """
        # Where a disk has no locks, not a file in the place of one: a process that is killed would leave it behind.
        lock: BaseFileLock = FileLock(self._path(key, ".lock"), mode=0o600, fallback_to_soft=False)
        obstacle = None
        try:
            try:
                lock.acquire(timeout=0)
            except Timeout:
                what = "another process is at work on the same plan: waiting for it"
                logger.info(what)
                with shown(what):
                    lock.acquire()
        except OSError as error:
            # Of a disk that is full or cannot be written, or that has no locks.
            obstacle = error
        try:
            yield obstacle
        finally:
            lock.release()

    def _build(self, key: Key, build: Callable[[], Plan], obstacle: OSError | None, must_keep: bool) -> Plan:
        """Build a plan, and keep it unless there is an `obstacle`; see `get`."""

        def cannot_keep(error: OSError) -> str:
            return f"a plan could not be kept in {self.folder}: {error.strerror}"

        if obstacle is not None and must_keep:
            raise InputError(cannot_keep(obstacle)) from obstacle
        plan = build()
        obstacle = obstacle or self._write(key, plan)
        if obstacle is not None:
            if must_keep:
                raise InputError(cannot_keep(obstacle)) from obstacle
            # The plan is there, though not for the next time.
            logger.warning(cannot_keep(obstacle))
        return plan

    def _read(self, key: Key) -> memoryview | None:
        path = self._path(key, ".plan")
        if path in self._passed_over:
            return None
        try:
            # A link could name a file that somebody else can write.
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
        except FileNotFoundError:
            return None
        except OSError as error:
            self._set_aside(key, f"it cannot be opened: {error.strerror}")
            return None
        with os.fdopen(descriptor, "rb") as file:
            try:
                _expect_ours(os.fstat(descriptor))
                header = _read_header(file.readline(_LONGEST_HEADER))
                if header["key"] != json.loads(json.dumps(key)):
                    raise BundleError("it was made for something else")
                plan = file.read()
                if len(plan) != header["bytes"] or hashlib.sha256(plan).hexdigest() != header["sha256"]:
                    raise BundleError("its content is not what was written")
                return memoryview(plan)
            except BundleError as error:
                self._set_aside(key, str(error))
                return None

    def _write(self, key: Key, plan: Plan) -> OSError | None:
        """Write a plan, and return why that failed, or None."""
        header = {"format": _FORMAT, "key": key, "sha256": hashlib.sha256(plan).hexdigest(), "bytes": len(plan)}
        path, partial = self._path(key, ".plan"), self._path(key, ".partial")
        try:
            # The lock makes this name ours alone; what a killed process left under it is overwritten.
            partial.unlink(missing_ok=True)
            with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(json.dumps(header, sort_keys=True, allow_nan=False).encode() + b"\n")
                file.write(plan)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
            self._passed_over.discard(path)
            flush_to_disk(self.folder)
        except OSError as error:
            return error
        finally:
            with contextlib.suppress(OSError):
                partial.unlink()
        return None

    def _set_aside(self, key: Key, reason: str) -> None:
        path, aside = self._path(key, ".plan"), self._path(key, ".rejected")
        try:
            path.replace(aside)
        except FileNotFoundError:
            return
        except OSError:
            self._passed_over.add(path)
            logger.warning("the plan %s is not used: %s", path, reason)
        else:
            logger.warning("the plan %s is not used and set aside as %s: %s", path, aside.name, reason)


def gpu_identity(device: torch.device) -> dict[str, str]:
    """Return what a key says of a GPU."""
    properties = torch.cuda.get_device_properties(device)
    return {"name": properties.name, "compute_capability": f"{properties.major}.{properties.minor}"}


def _read_header(line: bytes) -> dict[str, Any]:
    header = expect_object(parse_json(line, "its header"), _FIELDS, "its header")
    if header["format"] != _FORMAT:
        raise BundleError(f"its format is {header['format']!r}, expected {_FORMAT}")
    expect(header["key"], dict, "its key")
    expect(header["sha256"], str, "its sha256")
    expect_positive(header["bytes"], "its size")
    return header


def _expect_ours(status: os.stat_result) -> None:
    """Raise BundleError unless a file or folder is the user's own, and writable by nobody else."""
    if os.name != "posix":  # Windows keeps what is in a user's profile to the user.
        return
    if status.st_uid != os.geteuid():
        raise BundleError(f"it belongs to user {status.st_uid}, not to {os.geteuid()}, who is using it")
    if stat.S_IMODE(status.st_mode) & (stat.S_IWGRP | stat.S_IWOTH):
        raise BundleError(f"others may write to it (mode {stat.S_IMODE(status.st_mode):o}); expected 700 or 600")
