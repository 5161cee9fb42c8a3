"""safetensors files, with this project's errors: the library has one of its own, which derives from Exception alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from diffloss_engine.errors import BundleError


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors by name, in whatever layout they are. Raises BundleError, naming the file, if that fails."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    except (SafetensorError, OSError) as error:
        raise BundleError(f"{path} cannot be written: {error}") from error


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a file. Raises BundleError, naming it, if it is no safetensors file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise BundleError(f"{path} is not a safetensors file: {error}") from error
    return tensors
