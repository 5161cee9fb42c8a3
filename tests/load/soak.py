"""A process that calls losses many times, and says what it holds in between.

    python tests/load/soak.py BUNDLE STEPS [--leak]

Prints as JSON what it holds after each twentieth part of the steps, of which the first five are for warming up and are
left out, and whether the first step, repeated at the end, gives the same. With `--leak` it forgets to let go of
something of every kind at each measurement, and of images and gradient at each step.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import json
import logging
import os
import tempfile
import threading
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor

from diffloss_trt import DiffLoss

SETTINGS: dict[str, Any] = {"naturalness_weight": 1.0, "semantic_weight": 0.5}
# How losses are loaded beside the one that goes on, in turn.
OTHERS: tuple[dict[str, Any], ...] = (
    {"naturalness_weight": 0.0},
    {"backward": "recompute"},
    {"reduction": "none", "seed": 3},
)


@dataclasses.dataclass(frozen=True)
class Held:
    """What a process holds: bytes of memory, threads, open files, temporary files, sessions of ONNX Runtime."""

    step: int
    memory: int
    threads: int
    files: int
    temporary: int
    sessions: int

    @classmethod
    def now(cls, step: int) -> Held:
        gc.collect()
        # What was freed and glibc keeps for later is no leak.
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        return cls(
            step,
            int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
            len(os.listdir("/proc/self/task")),
            len(os.listdir("/proc/self/fd")),
            sum(len(files) for _, _, files in os.walk(tempfile.gettempdir())),
            sum(type(found) is onnxruntime.InferenceSession for found in gc.get_objects()),
        )


def load(bundle: str, **settings: Any) -> DiffLoss:
    """Return a loss on ONNX Runtime, whose sessions have threads of their own, which have to end with them."""
    torch.set_num_threads(2)
    loss = DiffLoss.load(bundle, "onnxruntime", "cpu", **SETTINGS | settings)
    torch.set_num_threads(1)
    return loss


def images(number: int) -> tuple[Tensor, Tensor]:
    """Return restored and target images, 1 to 5 of them; of every 90th batch one is NaN."""
    generator = torch.Generator().manual_seed(number)
    target = torch.rand(1 + number % 5, 3, 16, 16, generator=generator)
    restored = (target + 0.1 * torch.randn(target.shape, generator=generator)).clamp(0, 1)
    if number % 90 == 89:
        restored[0] = torch.nan
    return restored.requires_grad_(), target


def step(loss: DiffLoss, number: int) -> tuple[Tensor, Tensor]:
    """Return loss and gradient; both are NaN where an image is."""
    restored, target = images(number)
    draws = torch.Generator().manual_seed(number)
    value = loss(restored, target, generator=draws)
    value.sum().backward()
    assert restored.grad is not None
    assert bool(value.isfinite().all()) == bool(restored.grad.isfinite().all()) == (number % 90 != 89)
    return value, restored.grad


class Leak:
    """Forgets to let go of what is made."""

    def __init__(self) -> None:
        self.kept: list[object] = []

    def keep_one_of_each(self, bundle: str) -> None:
        """Hold on to a loss, an open file, a temporary file and a thread."""
        thread = threading.Thread(target=threading.Event().wait, daemon=True)
        thread.start()
        handle, _ = tempfile.mkstemp()
        self.kept += [load(bundle), handle, thread]


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle")
    parser.add_argument("steps", type=int)
    parser.add_argument("--leak", action="store_true")
    args = parser.parse_args()
    # What is skipped is logged; there is no need to see it.
    logging.disable()
    every = args.steps // 20
    loss = load(args.bundle, nonfinite="skip", check_every=None if args.leak else 3 * every)
    first, leak, measured = step(loss, 0), Leak(), []
    for number in range(1, args.steps + 1):
        result = step(loss, number)
        if args.leak:
            leak.kept.append(result)
        if number % every == 0:
            # Others come and go beside it.
            step(load(args.bundle, nonfinite="skip", **OTHERS[number // every % len(OTHERS)]), number)
            if args.leak:
                leak.keep_one_of_each(args.bundle)
            if number >= 5 * every:
                measured.append(Held.now(number))
    same = all(torch.equal(a, b) for a, b in zip(first, step(loss, 0), strict=True))
    print(json.dumps({"measured": [dataclasses.asdict(held) for held in measured], "same": same}))


if __name__ == "__main__":
    main()
