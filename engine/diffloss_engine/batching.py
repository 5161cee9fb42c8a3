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
    count = len(inputs[session.inputs[0].name])
    if count == size:
        return session(inputs)
    parts = []
    for start in range(0, count, size):
        used = min(size, count - start)
        rows = torch.arange(start, start + size).clamp(max=count - 1)
        part = session({name: tensor[rows.to(tensor.device)] for name, tensor in inputs.items()})
        parts.append({name: tensor[:used] for name, tensor in part.items()})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
