from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from onnx import TensorProto
from torch import Tensor

from diffloss_engine import (
    DTYPES,
    BundleError,
    DiffLossError,
    InputError,
    InputTypeError,
    TensorSpec,
    check_tensors,
)
from diffloss_engine.tensors import addressable

CPU = torch.device("cpu")
SPECS = (TensorSpec("image", "float32", (2, 3)), TensorSpec("timesteps", "int64", (2,)))


def given(**changes: Any) -> dict[str, Any]:
    return {"image": torch.zeros(2, 3), "timesteps": torch.zeros(2, dtype=torch.int64), **changes}


def test_table_agrees_with_onnx() -> None:
    names = {"float32": "FLOAT", "float64": "DOUBLE"}
    for name, dtype in DTYPES.items():
        assert TensorProto.DataType.Name(dtype.onnx) == names.get(name, name.upper())
        assert str(dtype.torch) == f"torch.{name}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (2, 3, 4)])
def test_spec_survives_json_and_describes_its_tensor(dtype: str, shape: tuple[int, ...]) -> None:
    spec = TensorSpec("x", dtype, shape)
    assert TensorSpec.from_json(spec.to_json()) == spec
    tensor = torch.zeros(shape, dtype=spec.torch_dtype)
    assert TensorSpec.of("x", tensor) == spec
    check_tensors([spec], {"x": tensor}, CPU)


@pytest.mark.parametrize(
    ("name", "dtype", "shape", "message"),
    [
        ("", "float32", (1,), "empty"),
        ("x", "float8", (1,), "float8.*float32"),
        ("x", "float32", (2, 0), "below 1"),
        ("x", "float32", (-1,), "below 1"),
    ],
)
def test_impossible_spec_is_refused(name: str, dtype: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TensorSpec(name, dtype, shape)


def test_spec_of_a_dtype_without_an_entry_is_refused() -> None:
    with pytest.raises(InputError, match="complex64"):
        TensorSpec.of("x", torch.zeros(1, dtype=torch.complex64))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "is null, expected an object"),
        ([], "is an array, expected an object"),
        ({"name": "x", "dtype": "float32"}, r"lacks the fields \['shape'\]"),
        ({"name": "x", "dtype": "float32", "shape": [], "strides": []}, r"unknown fields \['strides'\]"),
        ({"name": 1, "dtype": "float32", "shape": []}, "name is an integer"),
        ({"name": "x", "dtype": 1, "shape": []}, "dtype is an integer"),
        ({"name": "x", "dtype": "float8", "shape": []}, "float8"),
        ({"name": "x", "dtype": "float32", "shape": 3}, "shape is an integer"),
        ({"name": "x", "dtype": "float32", "shape": [True]}, "is a boolean"),
        ({"name": "x", "dtype": "float32", "shape": [1.0]}, "is a number"),
        ({"name": "x", "dtype": "float32", "shape": [0]}, "below 1"),
    ],
)
def test_malformed_json_is_a_bundle_error_that_says_where(value: object, message: str) -> None:
    with pytest.raises(BundleError, match=message) as caught:
        TensorSpec.from_json(value, "graph 'g': inputs")
    assert str(caught.value).startswith("graph 'g': inputs")


def test_matching_tensors_pass_whatever_their_order_and_strides() -> None:
    check_tensors(SPECS, given(image=torch.zeros(3, 2).t()), torch.device("cpu:0"))
    check_tensors(SPECS[::-1], given(), CPU)


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        ([torch.zeros(2, 3)], InputTypeError, "got list, expected a mapping"),
        ({"image": torch.zeros(2, 3)}, InputError, r"named \['image'\], expected \['image', 'timesteps'\]"),
        (given(noise=torch.zeros(1)), InputError, "noise"),
        (dict[Any, Any](given()) | {1: 2}, InputError, "1"),
        (given(image=[[0.0]]), InputTypeError, "'image' is a list, expected a torch.Tensor"),
        (given(image=None), InputTypeError, "NoneType"),
        (given(image=torch.zeros(2, 3).half()), InputTypeError, "torch.float16, expected torch.float32"),
        (given(image=torch.zeros(2, 3, device="meta")), InputTypeError, "on device meta, expected cpu"),
        (given(image=torch.zeros(2, 3).to_sparse()), InputTypeError, "layout torch.sparse_coo"),
        (given(image=torch.zeros(2, 4)), InputError, r"shape \[2, 4\], expected \[2, 3\]"),
        (given(timesteps=torch.zeros((), dtype=torch.int64)), InputError, r"shape \[\], expected \[2\]"),
    ],
)
def test_each_difference_is_named_with_both_sides(
    tensors: Mapping[str, Tensor], error: type[DiffLossError], message: str
) -> None:
    with pytest.raises(error, match=message):
        check_tensors(SPECS, tensors, CPU)


def test_names_are_checked_before_values() -> None:
    with pytest.raises(InputError, match="named"):
        check_tensors(SPECS, {"image": torch.zeros(9), "t": torch.zeros(9)}, CPU)


@pytest.mark.gpu
def test_device_without_index_is_the_current_gpu() -> None:
    spec = TensorSpec("x", "float32", (1,))
    check_tensors([spec], {"x": torch.zeros(1, device="cuda")}, torch.device("cuda"))
    with pytest.raises(InputTypeError, match="on device cpu, expected cuda:"):
        check_tensors([spec], {"x": torch.zeros(1)}, torch.device("cuda"))


def test_addressable() -> None:
    whole = torch.randn(4, 64)
    assert addressable(whole) is whole
    for tensor in (whole.T, whole[1:].flatten()[1:], torch.randn(16, dtype=torch.cfloat).conj().imag):
        found = addressable(tensor)
        assert torch.equal(found, tensor)
        assert found.is_contiguous()
        assert not found.is_neg()
        assert found.data_ptr() % 64 == 0
        assert found.data_ptr() != tensor.data_ptr()
