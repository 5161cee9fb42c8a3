from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest

from diffloss_engine import InputError
from diffloss_engine.plan_cache import PlanCache, default_folder

KEY = {"graph": "a" * 64, "flavour": "tensorrt-rtx", "options": {"optimization_level": 3}}
PLAN = bytes(range(256)) * 40

posix = pytest.mark.skipif(os.name != "posix", reason="owners and modes are POSIX's")


@pytest.fixture
def cache(tmp_path: Path) -> PlanCache:
    return PlanCache(tmp_path / "plans")


def must_not_build() -> bytes:
    raise AssertionError("built again")


def the_plan(cache: PlanCache) -> Path:
    (path,) = cache.folder.glob("*.plan")
    return path


def test_a_plan_is_built_once(cache: PlanCache) -> None:
    assert cache.get(KEY, lambda: memoryview(PLAN)) == PLAN
    assert cache.get(KEY, must_not_build) == PLAN
    assert PlanCache(cache.folder).get(dict(reversed(KEY.items())), must_not_build) == PLAN


@pytest.mark.parametrize(
    "change",
    [{"graph": "b" * 64}, {"flavour": "tensorrt"}, {"options": {"optimization_level": 4}}, {"more": None}],
    ids=str,
)
def test_another_key_is_another_plan(change: dict[str, Any], cache: PlanCache) -> None:
    cache.get(KEY, lambda: PLAN)
    assert cache.get(KEY | change, lambda: b"other") == b"other"
    assert cache.get(KEY, must_not_build) == PLAN


def test_keys_are_listed_latest_first(cache: PlanCache) -> None:
    assert cache.list_keys() == []
    for number in range(3):
        cache.get(KEY | {"number": number}, lambda: PLAN)
    for number in (0, 2, 1):
        now = time.time_ns()
        (path,) = (
            path for path in cache.folder.glob("*.plan") if f'"number": {number}' in str(path.read_bytes()[:400])
        )
        os.utime(path, ns=(now, now))
    assert [key["number"] for key in cache.list_keys()] == [1, 2, 0]
    for plan in cache.list_plans():
        assert plan.path.read_bytes().endswith(PLAN)
        assert plan.bytes == plan.path.stat().st_size
        assert cache.get(plan.key, must_not_build) == PLAN
    the_first = next(cache.folder.glob("*.plan"))
    the_first.write_bytes(b"nothing")
    assert len(cache.list_keys()) == 2


@posix
def test_nobody_else_can_read_it(cache: PlanCache) -> None:
    before = os.umask(0)
    try:
        cache.get(KEY, lambda: PLAN)
    finally:
        os.umask(before)
    assert cache.folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in cache.folder.iterdir()} == {0o600}


def test_a_failing_build_leaves_nothing(cache: PlanCache) -> None:
    def fail() -> bytes:
        raise RuntimeError("no kernel")

    with pytest.raises(RuntimeError, match="no kernel"):
        cache.get(KEY, fail)
    assert {path.suffix for path in cache.folder.iterdir()} <= {".lock"}
    assert cache.get(KEY, lambda: PLAN) == PLAN


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"!")


def edit_header(**changes: Any) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        header, plan = path.read_bytes().split(b"\n", 1)
        path.write_bytes(json.dumps(json.loads(header) | changes).encode() + b"\n" + plan)

    return edit


def open_to_all(path: Path) -> None:
    path.chmod(0o622)


def give_away(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    os.chown(path, 65534, 65534)


def link(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


ALTERATIONS = {
    "flip": (flip, "its content is not what was written"),
    "cut": (cut, "its content is not what was written"),
    "append": (append, "its content is not what was written"),
    "empty": (empty, "its header is not valid JSON"),
    "newer format": (edit_header(format=2), "its format is 2, expected 1"),
    "another key": (edit_header(key={}), "it was made for something else"),
    "hash": (edit_header(sha256=hashlib.sha256(b"other").hexdigest()), "its content is not what was written"),
    "size": (edit_header(bytes="7"), "its size is a string"),
    "field": (edit_header(more=1), "its header"),
    "mode": (open_to_all, "others may write to it"),
    "owner": (give_away, "it belongs to user 65534"),
    "link": (link, "it cannot be opened"),
}


@posix
@pytest.mark.parametrize("name", ALTERATIONS)
def test_what_is_damaged_or_foreign_is_set_aside(name: str, cache: PlanCache, caplog: pytest.LogCaptureFixture) -> None:
    alter, reason = ALTERATIONS[name]
    cache.get(KEY, lambda: PLAN)
    alter(the_plan(cache))
    with caplog.at_level(logging.WARNING):
        assert cache.get(KEY, lambda: b"new") == b"new"
    (record,) = caplog.records
    assert reason in record.getMessage()
    assert "\n" not in record.getMessage()
    assert cache.get(KEY, must_not_build) == b"new"
    assert len(list(cache.folder.glob("*.rejected"))) == 1


def test_what_the_runtime_refuses_is_built_anew(cache: PlanCache, caplog: pytest.LogCaptureFixture) -> None:
    cache.get(KEY, lambda: PLAN)
    with caplog.at_level(logging.WARNING):
        cache.reject(KEY, PLAN, "the driver is another one")
    assert "the driver is another one" in caplog.text
    assert cache.get(KEY, lambda: b"new") == b"new"
    cache.reject(KEY | {"more": 1}, PLAN, "never built")
    # Another process has built it since this one loaded what it refuses.
    cache.reject(KEY, PLAN, "the driver is another one")
    assert cache.get(KEY, must_not_build) == b"new"


def test_finding_builds_nothing(cache: PlanCache) -> None:
    assert cache.find(KEY) is None
    cache.get(KEY, lambda: PLAN)
    assert cache.find(KEY) == PLAN
    the_plan(cache).write_bytes(b"damaged")
    assert cache.find(KEY) is None
    assert not list(cache.folder.glob("*.plan"))


def test_the_rest_of_a_killed_process_is_in_nobodys_way(cache: PlanCache) -> None:
    cache.get(KEY, lambda: PLAN)
    path = the_plan(cache)
    path.rename(path.with_suffix(".partial"))
    assert cache.get(KEY, lambda: b"new") == b"new"
    assert not list(cache.folder.glob("*.partial"))


@posix
@pytest.mark.parametrize("alter", [open_to_all, give_away])
def test_a_folder_of_others_is_refused(alter: Callable[[Path], None], cache: PlanCache) -> None:
    cache.get(KEY, lambda: PLAN)
    alter(cache.folder)
    with pytest.raises(InputError, match=r"plan cache .*plans cannot be trusted: (others may write|it belongs)"):
        cache.get(KEY, must_not_build)


def test_a_file_in_the_folders_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plans").write_text("")
    with pytest.raises(InputError, match=r"plan cache .*plans cannot be made"):
        PlanCache(tmp_path / "plans").get(KEY, must_not_build)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
def test_a_plan_that_cannot_be_kept_is_used(
    cache: PlanCache, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = os.open
    monkeypatch.setattr(
        os,
        "open",
        lambda path, flags, mode=0o777: opened(
            "/dev/full" if str(path).endswith(".partial") else path, flags & ~os.O_EXCL, mode
        ),
    )
    with caplog.at_level(logging.WARNING):
        assert cache.get(KEY, lambda: PLAN) == PLAN
    assert "could not be kept" in caplog.text
    assert "No space left" in caplog.text


def ask(folder: Path, built: Queue[None], waiting: Queue[None], go_on: Event) -> None:
    def build() -> bytes:
        built.put(None)
        assert go_on.wait(120)
        return PLAN

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            assert "waiting for it" in record.getMessage()
            waiting.put(None)

    plan_cache = logging.getLogger("diffloss_engine.plan_cache")
    plan_cache.setLevel(logging.INFO)
    plan_cache.addHandler(Handler())
    assert PlanCache(folder).get(KEY, build) == PLAN


def test_processes_that_want_the_same_plan_build_it_once(cache: PlanCache) -> None:
    context = multiprocessing.get_context("spawn")
    built, waiting, go_on = context.Queue(), context.Queue(), context.Event()
    processes = [context.Process(target=ask, args=(cache.folder, built, waiting, go_on)) for _ in range(2)]
    for process in processes:
        process.start()
    # One builds, and is not done before the other has found the lock taken.
    for queue in (built, waiting):
        queue.get(timeout=120)
    go_on.set()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert built.empty()


def test_the_folder_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DIFFLOSS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    assert default_folder() == Path("/home/someone/.cache/diffloss-trt")
    monkeypatch.setenv("XDG_CACHE_HOME", "/scratch/cache")
    assert default_folder() == Path("/scratch/cache/diffloss-trt")
    monkeypatch.setenv("DIFFLOSS_CACHE", "/plans")
    assert default_folder() == Path("/plans")
    monkeypatch.setenv("DIFFLOSS_CACHE", "~/plans")
    assert default_folder() == Path("/home/someone/plans")


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DIFFLOSS_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    # As in a container that runs as a user of no passwd entry.
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 5)
    with pytest.raises(InputError, match="no home directory to keep plans in: set DIFFLOSS_CACHE"):
        default_folder()
