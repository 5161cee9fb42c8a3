"""A PyTorch program under the same contract as the inference engines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from diffloss_engine.errors import BackendError, InputError, InputTypeError
from diffloss_engine.forking import unforked
from diffloss_engine.memory import memory_advice
from diffloss_engine.tensors import TensorSpec, addressable, check_tensors, concrete_device, on_device


class TorchSession:
    """Calls `program` with the input tensors in the order of `inputs`; see `Session` for the contract.

    `program` returns a tuple with the tensors that `outputs` describes, newly allocated at each call. `backend` is the
    name by which the session is reported: "torch", or "inductor" for a compiled program.
    """

    def __init__(
        self,
        program: Callable[..., tuple[Tensor, ...]],
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        device: torch.device,
        *,
        backend: str = "torch",
    ) -> None:
        self.backend = backend
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        self.device = concrete_device(device)
        self._program: Callable[..., tuple[Tensor, ...]] | None = program

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        program = self._program
        if program is None:
            raise BackendError("the session was closed")
        check_tensors(self.inputs, inputs, self.device)
        try:
            # A caller's autocast would reach into the program, whose dtypes are its own business. A compiled program is
            # taken by a run, which in a process forked meanwhile would never give it back.
            with (
                unforked(),
                on_device(self.device),  # on whose current stream a compiled program runs
                torch.no_grad(),
                torch.autocast(self.device.type, enabled=False),
            ):
                # Traced or compiled for dense tensors, a program does not look whether it is given such.
                results = program(*(addressable(inputs[spec.name].detach()) for spec in self.inputs))
        except torch.OutOfMemoryError:
            # Trainers catch this one to try again with a smaller batch.
            raise
        except RuntimeError as error:
            advice = memory_advice(error, self.inputs)
            raise BackendError(f"the {self.backend} program failed: {error}{advice}") from error
        return self._named(results)

    def close(self) -> None:
        self._program = None

    def _named(self, results: tuple[Tensor, ...]) -> dict[str, Tensor]:
        if not isinstance(results, tuple) or len(results) != len(self.outputs):
            came = f"{len(results)} values" if isinstance(results, tuple) else f"a {type(results).__name__}"
            raise BackendError(f"the {self.backend} program returned {came}, expected {len(self.outputs)} tensors")
        named = {spec.name: result for spec, result in zip(self.outputs, results, strict=True)}
        try:
            check_tensors(self.outputs, named, self.device)
        except (InputError, InputTypeError) as error:
            raise BackendError(f"the {self.backend} program returned a wrong output: {error}") from error
        return named
