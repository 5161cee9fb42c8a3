"""Any number of samples through a graph whose batch dimension is fixed; exact, because samples are independent."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from diffloss_engine.session import Session


def run_batched(session: Session, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Run `session` on N >= 1 samples, N being the first axis: cut into the graph's batches, the last one filled up.

    What fills a batch up is its last sample again: values that the network is known to be able to take.
    """
    size = session.inputs[0].shape[0]
    first = inputs[session.inputs[0].name]
    count = len(first)
    if count == size:
        return session(inputs)
    parts = []
    for start in range(0, count, size):
        used = min(size, count - start)
        # Made where it is used: a copy to the GPU waits, and no CUDA graph can capture it.
        rows = torch.arange(start, start + size, device=first.device).clamp(max=count - 1)
        part = session({name: tensor[rows] for name, tensor in inputs.items()})
        parts.append({name: tensor[:used] for name, tensor in part.items()})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
