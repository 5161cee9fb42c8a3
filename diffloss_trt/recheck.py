"""Results in the middle of a training beside eager PyTorch's in full fp32: what it is, and what may differ."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from diffloss_engine.bundle import Bundle
from diffloss_engine.errors import ParityError
from diffloss_engine.fp32_precision import fp32_precision
from diffloss_engine.session import Session
from diffloss_engine.tensors import TensorSpec
from diffloss_engine.torch_session import TorchSession
from diffloss_trt.contract import GRADIENT
from diffloss_trt.gradient import trace_gradient
from diffloss_trt.objective import Terms
from diffloss_trt.probe import Result, check_session, first_beyond
from diffloss_trt.schedule import NoiseSchedule
from diffloss_trt.tolerances import DIFFERENCE, Tolerance
from diffloss_trt.unet import TappedUNet, reload_unet

# A training asks thousands of times, of images that nobody chose, and a false alarm ends it; what this is to find,
# weights or kernels that are not what they were, is off by more.
MARGIN: Final = 4


def expect_alike(what: str, found: tuple[Terms, Tensor], expected: tuple[Terms, Tensor], precision: str) -> None:
    """Raise ParityError if terms or gradient of any image differ by more than MARGIN times what `DIFFERENCE` allows.

    The reference's own error is a hundredth of that, or less: see docs/precision.md.
    """
    strict = DIFFERENCE[precision]
    allowed = Tolerance(
        term=MARGIN * strict.term,
        gradient=MARGIN * strict.gradient,
        cosine=1 - MARGIN * (1 - strict.cosine),
    )
    if beyond := first_beyond(Result.of(*found), Result.of(*expected), allowed):
        raise ParityError(
            f"{what} wrongly: {beyond.quantity} of the first image is off by {beyond.error:.2g} from eager PyTorch in "
            f"fp32, and {beyond.tolerance:.2g} is allowed"
        )


def open_reference(bundle: Bundle, graph: str, device: torch.device, schedule: NoiseSchedule) -> Session:
    """Return a gradient graph for one image in eager PyTorch, in fp32, with weights of its own.

    With what it is to judge it shares the rules of the difference form alone: near the target the plain form in fp32 is
    further off than what is to be found. On the bundle's images the rules are compared with the plain form in float64.

    Raises as `check_session` does, and BundleError for a UNet that cannot be reloaded.
    """
    tapped = TappedUNet(reload_unet(bundle, torch.float32, device), schedule)
    program = trace_gradient(tapped, 1, bundle.resolution, with_noise=graph == GRADIENT)
    inputs, outputs = (
        [TensorSpec.of(name, tensor) for name, tensor in tensors.items()]
        for tensors in (program.inputs, program.results)
    )
    session = TorchSession(program.bind(tapped.unet.state_dict()), inputs, outputs, device)
    with fp32_precision("ieee"):  # neither TF32 on a GPU, nor bf16 on a CPU, whatever a trainer has set
        check_session(session, graph, bundle)
    return session
