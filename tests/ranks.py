"""Two processes that train together, as `torchrun` would start them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed
import torch.multiprocessing


def train_in_two_processes(function: Callable[..., None], folder: Path, *given: Any, backend: str = "gloo") -> None:
    """Call `function(rank, folder, *given)` in each of two processes, which meet in `folder`; NCCL's each on a GPU."""
    torch.multiprocessing.spawn(_as_rank, (function, folder, given, backend), nprocs=2)


def _as_rank(rank: int, function: Callable[..., None], folder: Path, given: tuple[Any, ...], backend: str) -> None:
    if backend == "nccl":
        torch.cuda.set_device(rank)
    torch.distributed.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=2)
    function(rank, folder, *given)
    torch.distributed.barrier()
    # Nothing is destroyed. In torch 2.13 the work of gloo holds the context of the call to backward() that caused it,
    # which gloo's thread needs the GIL to let go of. Where that comes late, DistributedDataParallel's destructor, which
    # joins the thread and keeps the GIL, waits for ever, or the end of the interpreter aborts the process.
    os._exit(0)
