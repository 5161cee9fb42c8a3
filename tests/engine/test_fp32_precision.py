"""Settings of the whole process, which are changed in processes of their own."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

# What a trainer may have set, by the newer names and by the older ones.
TRAINERS = [
    "pass",
    "cuda.matmul.allow_tf32 = True",
    "cuda.matmul.allow_tf32 = cudnn.allow_tf32 = True",
    "cudnn.allow_tf32 = False",
    "torch.set_float32_matmul_precision('high')",
    "torch.set_float32_matmul_precision('medium')",
    "torch.set_float32_matmul_precision('high'); cudnn.conv.fp32_precision = 'ieee'",
    "backends.fp32_precision = 'ieee'",
    "backends.fp32_precision = 'tf32'",
    "backends.fp32_precision = 'bf16'",
    "backends.fp32_precision = 'tf32'; cudnn.rnn.fp32_precision = 'ieee'",
    "cudnn.fp32_precision = 'ieee'",
    "cudnn.fp32_precision = 'tf32'; mkldnn.matmul.fp32_precision = 'bf16'",
    "cudnn.allow_tf32 = False; backends.fp32_precision = 'tf32'",
    "cuda.matmul.fp32_precision = 'tf32'",
    "cudnn.conv.fp32_precision = 'none'",
    "mkldnn.conv.fp32_precision = 'bf16'",
]
PROGRAM = """
import multiprocessing, sys, threading
import torch
from diffloss_engine.fp32_precision import fp32_precision

backends = torch.backends
cuda, cudnn, mkldnn = backends.cuda, backends.cudnn, backends.mkldnn

def newer():
    settings = (backends, cudnn, cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv)
    return [setting.fp32_precision for setting in settings]

def older():
    names = (torch.get_float32_matmul_precision, lambda: cuda.matmul.allow_tf32, lambda: cudnn.allow_tf32)
    found = []
    for name in names:
        try:
            found.append(name())
        except RuntimeError as error:  # What was set by newer names has none among the older.
            assert "mix of the legacy and new APIs" in str(error)
            found.append("none")
    return found

def everything():
    found = [newer(), older()]
    # What follows the general settings shows when these change.
    for setting in (backends, cudnn):
        for precision in ("ieee", "tf32", "none"):
            setting.fp32_precision = precision
            found += [newer(), older()]
    return found

def undisturbed(trainer):
    exec(trainer)
    return everything()

def disturbed(trainer):
    exec(trainer)
    before = newer(), older()
    for precision in ("ieee", "tf32", "ieee"):
        with CONTEXT(precision):
            assert set(newer()) == {precision}
            with CONTEXT("tf32"):
                assert set(newer()) == {"tf32"}
            assert set(newer()) == {precision}
        assert (newer(), older()) == before
    try:
        with CONTEXT("ieee"):
            raise KeyError
    except KeyError:
        pass
    assert (newer(), older()) == before
    return everything()
"""
COMPARE = """
with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
    for trainer in TRAINERS:
        expected, found = (pool.apply(function, (trainer,)) for function in (undisturbed, disturbed))
        assert found == expected, f"{trainer}: {found} is not {expected}"
"""


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True)


def test_nothing_is_left_of_it_whatever_a_trainer_has_set() -> None:
    """Also not in what the settings follow from then on."""
    done = run(f"{PROGRAM}\nCONTEXT, TRAINERS = fp32_precision, {TRAINERS!r}\n{COMPARE}")
    assert done.returncode == 0, done.stderr


# As one would write it who does not know that a setting follows others until it is set.
SIMPLE = """
import contextlib

@contextlib.contextmanager
def simple(precision):
    settings = (backends, cudnn, cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv)
    before = newer()
    try:
        for setting in settings:
            setting.fp32_precision = precision
        yield
    finally:
        for setting, value in zip(settings, before):
            setting.fp32_precision = value
"""


@pytest.mark.parametrize(
    "trainer",
    [
        pytest.param(
            "pass",
            marks=pytest.mark.skipif(
                torch.__version__.startswith("2.11."), reason="in PyTorch 2.11 cuDNN's settings follow no general one"
            ),
        ),
        "backends.fp32_precision = 'tf32'",
    ],
)
def test_settings_that_follow_no_more_are_noticed(trainer: str) -> None:
    """Negative control."""
    done = run(f"{PROGRAM}\n{SIMPLE}\nCONTEXT, TRAINERS = simple, [{trainer!r}]\n{COMPARE}")
    assert f"AssertionError: {trainer}: " in done.stderr


EXPORT = """
from torch import nn
from diffloss_engine.fp32_precision import settings_for_export

class Product(nn.Module):
    def forward(self, image):
        return image @ image

def export(trainer):
    exec(trainer)
    before = newer(), older()
    with settings_for_export():
        torch.export.export(Product(), (torch.zeros(3, 3),), strict=False)
    return (newer(), older()) == before

# Imported before the processes part.
torch.export.export(Product(), (torch.zeros(3, 3),), strict=False)
with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
    for trainer in TRAINERS:
        assert pool.apply(export, (trainer,)), trainer
"""


@pytest.mark.slow
def test_the_exporter_works_and_leaves_what_it_finds() -> None:
    done = run(f"{PROGRAM}\nTRAINERS = {TRAINERS!r}\n{EXPORT}")
    assert done.returncode == 0, done.stderr
    # Negative control: by itself it does neither.
    done = run(f"{PROGRAM}\nTRAINERS = {TRAINERS!r}\n{EXPORT.replace('with settings_for_export():', 'if True:')}")
    assert "PyTorch is checking whether allow_tf32 is enabled for cuDNN" in done.stderr


THREADS = """
torch.set_float32_matmul_precision("high")
before = newer(), older()
inside, leave, changed = threading.Event(), threading.Event(), threading.Event()

def first():
    with fp32_precision("ieee"):
        inside.set()
        leave.wait()

def second():
    inside.wait()
    with fp32_precision("ieee"):
        changed.set()

threads = [threading.Thread(target=target) for target in (first, second)]
for thread in threads:
    thread.start()
# Were the second one let in, it would take the first one's setting for the trainer's, and leave last.
assert not changed.wait(0.2)
leave.set()
for thread in threads:
    thread.join()
assert changed.is_set()
assert (newer(), older()) == before
"""


def test_one_thread_at_a_time() -> None:
    done = run(PROGRAM + THREADS)
    assert done.returncode == 0, done.stderr
