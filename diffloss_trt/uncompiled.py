"""What torch.compile leaves alone. Imported only while it traces: what this needs takes a second or two to import."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")


@torch.compiler.disable(  # type: ignore[untyped-decorator]
    reason="a DiffLoss breaks the graph unless its backward is fused and no generator is passed"
)
def uncompiled(function: Callable[..., T], *arguments: Any) -> T:
    """Return `function(*arguments)`, run as in eager mode with all that it calls.

    After a graph break alone, Dynamo goes on and compiles the frozen UNet, of which PyTorch 2.13's inductor computes a
    wrong gradient (see docs/performance.md).
    """
    return function(*arguments)
