"""What a graph's tensors are called and look like, and the one check that given tensors match."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffloss_engine.errors import BundleError, InputError, InputTypeError
from diffloss_engine.strict_json import expect, expect_object


class Dtype(NamedTuple):
    """One element type in PyTorch and as the integer of ONNX's `TensorProto.DataType`."""

    torch: torch.dtype
    onnx: int


DTYPES: dict[str, Dtype] = {
    "float32": Dtype(torch.float32, 1),
    "float16": Dtype(torch.float16, 10),
    "bfloat16": Dtype(torch.bfloat16, 16),
    "float64": Dtype(torch.float64, 11),
    "int64": Dtype(torch.int64, 7),
    "int32": Dtype(torch.int32, 6),
    "bool": Dtype(torch.bool, 9),
}

# Tensors of as few channels are taken for images: a graph's first convolution, which reads one, may be more precise.
IMAGE_CHANNELS = 4
# What TensorRT, and vector instructions, ask of a tensor's address. Torch's allocations meet it; a view may not.
_GPU_ALIGNMENT, _CPU_ALIGNMENT = 256, 64

_FIELDS = frozenset({"name", "dtype", "shape"})


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype (a key of `DTYPES`) and static shape of one graph input or output.

    Every dimension is at least 1; a scalar has the shape (). Raises InputError for anything else.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.name:
            raise InputError("a tensor's name is empty")
        if self.dtype not in DTYPES:
            raise InputError(f"tensor {self.name!r}: dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")
        if any(size < 1 for size in self.shape):
            raise InputError(f"tensor {self.name!r}: shape {list(self.shape)} has a dimension below 1")

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> TensorSpec:
        """The spec that `tensor` meets under the given name. Raises InputError if its dtype is not in `DTYPES`."""
        dtype = next((key for key, entry in DTYPES.items() if entry.torch is tensor.dtype), str(tensor.dtype))
        return cls(name, dtype, tuple(tensor.shape))

    @classmethod
    def from_json(cls, value: object, where: str = "tensor") -> TensorSpec:
        """Read what `to_json` wrote. Raises BundleError, beginning with `where`, for anything else."""
        fields = expect_object(value, _FIELDS, where)
        shape = expect(fields["shape"], list, f"{where}: shape")
        try:
            return cls(
                name=expect(fields["name"], str, f"{where}: name"),
                dtype=expect(fields["dtype"], str, f"{where}: dtype"),
                shape=tuple(expect(size, int, f"{where}: dimension of the shape") for size in shape),
            )
        except InputError as error:
            raise BundleError(f"{where}: {error}") from error

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype].torch


def concrete_device(device: torch.device) -> torch.device:
    """`device` as tensors report it: "cuda" gets the index of the current GPU, "cpu:0" loses its own."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu") if device.type == "cpu" else device


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which a CUDA device is the current one; for other devices it changes nothing."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def check_tensors(specs: Sequence[TensorSpec], tensors: Mapping[str, Tensor], device: torch.device) -> None:
    """Check that `tensors` holds exactly the tensors that `specs` describe, dense and on `device`.

    Raises InputError for wrong names or a wrong shape, InputTypeError for a wrong type, dtype, device or layout.
    """
    if not isinstance(tensors, Mapping):
        raise InputTypeError(f"got {type(tensors).__name__}, expected a mapping from names to tensors")
    expected = {spec.name for spec in specs}
    if tensors.keys() != expected:
        raise InputError(f"got tensors named {sorted(map(str, tensors))}, expected {sorted(expected)}")
    device = concrete_device(device)
    for spec in specs:
        _check_tensor(spec, tensors[spec.name], device)


def _check_tensor(spec: TensorSpec, tensor: object, device: torch.device) -> None:
    if not isinstance(tensor, Tensor):
        raise InputTypeError(f"{spec.name!r} is a {type(tensor).__name__}, expected a torch.Tensor")
    if tensor.dtype != spec.torch_dtype:
        raise InputTypeError(f"{spec.name!r} has dtype {tensor.dtype}, expected {spec.torch_dtype}")
    if tensor.device != device:
        raise InputTypeError(f"{spec.name!r} is on device {tensor.device}, expected {device}")
    if tensor.layout != torch.strided:
        raise InputTypeError(f"{spec.name!r} has layout {tensor.layout}, expected {torch.strided}")
    if tuple(tensor.shape) != spec.shape:
        raise InputError(f"{spec.name!r} has shape {list(tensor.shape)}, expected {list(spec.shape)}")


def addressable(tensor: Tensor) -> Tensor:
    """Return `tensor` itself, or a copy if it is not dense or begins where machine code expects no tensor to begin."""
    # A lazily negated tensor (the imaginary part of a conjugate) would be read with the wrong sign.
    dense = tensor.resolve_neg().contiguous()
    return dense if dense.data_ptr() % (_GPU_ALIGNMENT if dense.is_cuda else _CPU_ALIGNMENT) == 0 else dense.clone()
