"""The random draws of a loss that has a seed of its own."""

from __future__ import annotations

import hashlib
import logging
from collections import deque
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import get_worker_info

from diffloss_engine.errors import BackendError, InputError
from diffloss_engine.forking import ProcessLock

logger = logging.getLogger(__name__)

# How many calls back a draw can be found that activation checkpointing repeats.
_REMEMBERED = 1024
_numbering = ProcessLock()


class Draws(nn.Module):
    """Numbers the calls of a loss, and gives each a generator that follows from seed, rank and number alone.

    The rank is that of the process in torch.distributed's default group. In a data loader's worker, whose copy of the
    loss counts from where the training's was when it started, the worker's own seed is mixed in: it differs by worker
    and by epoch, and follows from PyTorch's global seed. The whole state, two integers, is in
    `state_dict()`: what one rank saves continues the run on every rank, whatever the device.

    Activation checkpointing runs a call again in the backward pass, and must get the same draw. What it restores is the
    state of PyTorch's global generator on the CPU; so each call takes one number from that, as its ticket, and a call
    inside a backward pass has the number of the last call with the same ticket.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.count = 0
        self._tickets: deque[tuple[int, int]] = deque(maxlen=_REMEMBERED)

    def generator(self, device: torch.device) -> torch.Generator:
        """Return a new generator on `device` for this call.

        Raises BackendError inside a backward pass for a call that is not found again.
        """
        number = self._number(int(torch.randint(2**62, (), device="cpu")))
        grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank = torch.distributed.get_rank() if grouped else 0
        worker = get_worker_info()
        numbers = [self.seed, rank, number] if worker is None else [self.seed, rank, number, worker.seed]
        digest = hashlib.sha256(" ".join(map(str, numbers)).encode()).digest()
        return torch.Generator(device).manual_seed(int.from_bytes(digest[:8]) // 2)

    def _number(self, ticket: int) -> int:
        with _numbering.lock:
            # As torch.utils.checkpoint tells that it is in a backward pass.
            if torch._C._current_graph_task_id() != -1:
                for earlier, number in reversed(self._tickets):
                    if earlier == ticket:
                        return number
                raise BackendError(
                    "a DiffLoss with a seed is called again in a backward pass, and the draw is not found: "
                    "checkpoint with preserve_rng_state=True, or pass timesteps and noise"
                )
            number = self.count
            self.count += 1
            self._tickets.append((ticket, number))
            return number

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *more: Any) -> None:
        # A checkpoint without it, of the restoration network for one, is to be taken, strictly or not.
        if f"{prefix}_extra_state" in state_dict:
            super()._load_from_state_dict(state_dict, prefix, *more)
        else:
            logger.warning("the state holds no draws for this DiffLoss, which has a seed: they are not resumed")

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.seed, self.count], device="cpu")

    def set_extra_state(self, state: object) -> None:
        if (
            not isinstance(state, Tensor)
            or state.shape != (2,)
            or state.dtype != torch.int64
            or bool((state < 0).any())
        ):
            raise InputError(f"the state of a loss's draws is {state!r}; expected int64 [seed, count], both >= 0")
        self.seed, self.count = state.tolist()
