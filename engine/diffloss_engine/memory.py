"""What to do when an engine runs out of memory, for which its library has no error of its own."""

from __future__ import annotations

from collections.abc import Sequence

from diffloss_engine.tensors import TensorSpec

_SIGNS = ("allocate memory", "out of memory", "outofmemory", "bad_alloc")


def memory_advice(error: Exception | str, inputs: Sequence[TensorSpec]) -> str:
    """Return more words for an engine's error, if it is that memory ran out. Of `inputs` the first has the batch."""
    if not any(sign in str(error).lower() for sign in _SIGNS):
        return ""
    batch = inputs[0].shape[0]
    return (
        f"; there was too little memory for the engine's batch of {batch}, whatever the batch that it is called with: "
        "free some, or export the graph for a smaller batch (--batch-size)"
    )
