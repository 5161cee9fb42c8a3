from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from diffloss_engine import BackendError, InputError, InputTypeError, Session, TensorSpec, TorchSession

CPU = torch.device("cpu")
X, Y = TensorSpec("x", "float32", (2, 3)), TensorSpec("y", "float32", (3,))
TOTAL = TensorSpec("total", "float32", (2, 3))


def add(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return (x + y,)


def open_program(program: Callable[..., Any]) -> TorchSession:
    return TorchSession(program, [X, Y], [TOTAL], CPU)


def test_program_gets_its_tensors_in_the_order_of_the_specs() -> None:
    session: Session = TorchSession(lambda x, y: (x - y,), [X, Y], [TOTAL], CPU)
    outputs = session({"y": torch.ones(3), "x": torch.zeros(2, 3)})
    assert outputs.keys() == {"total"}
    assert torch.equal(outputs["total"], -torch.ones(2, 3))
    assert (session.backend, session.inputs, session.outputs, session.device) == ("torch", (X, Y), (TOTAL,), CPU)


def test_compiled_program_reports_its_own_backend() -> None:
    assert TorchSession(add, [X, Y], [TOTAL], CPU, backend="inductor").backend == "inductor"


def test_no_gradient_flows_through() -> None:
    outputs = open_program(add)({"x": torch.zeros(2, 3, requires_grad=True), "y": torch.ones(3)})
    assert not outputs["total"].requires_grad


def test_inputs_are_checked() -> None:
    session = open_program(add)
    with pytest.raises(InputError, match="named"):
        session({"x": torch.zeros(2, 3)})
    with pytest.raises(InputTypeError, match="float64"):
        session({"x": torch.zeros(2, 3).double(), "y": torch.ones(3)})


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (lambda x, y: x + y, "returned a Tensor, expected 1 tensors"),
        (lambda x, y: (x, y), "returned 2 values, expected 1 tensors"),
        (lambda x, y: (y + 1,), r"shape \[3\], expected \[2, 3\]"),
        (lambda x, y: (x.double(),), "float64"),
        (lambda x, y: (None,), "NoneType"),
        (lambda x, y: (x @ y.view(1, 3),), "torch program failed: .*multiplied"),
        (lambda x, y: (torch.empty(2**50),), "torch program failed: .*allocate.*too little memory .* batch of 2"),
    ],
)
def test_program_that_fails_or_returns_something_else_is_a_backend_error(
    program: Callable[..., Any], message: str
) -> None:
    with pytest.raises(BackendError, match=message):
        open_program(program)({"x": torch.zeros(2, 3), "y": torch.ones(3)})


def test_out_of_memory_stays_what_trainers_catch() -> None:
    def greedy(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        open_program(greedy)({"x": torch.zeros(2, 3), "y": torch.ones(3)})


def test_call_after_close_says_so() -> None:
    session = open_program(add)
    session.close()
    session.close()
    with pytest.raises(BackendError, match="closed"):
        session({"x": torch.zeros(2, 3), "y": torch.ones(3)})
