"""DiffLoss as a trainer sees it: a module that maps restored and target images to a loss."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from diffloss_engine.errors import BackendError, DiffLossError, InputError, InputTypeError
from diffloss_engine.forking import ProcessLock
from diffloss_trt.autograd import attach
from diffloss_trt.compiled import compiled_terms, register
from diffloss_trt.draws import Draws
from diffloss_trt.evaluators import EagerEvaluator, Evaluator, FusedEvaluator, Images
from diffloss_trt.inputs import (
    DEFAULT_NATURALNESS_WEIGHT,
    DEFAULT_SEMANTIC_WEIGHT,
    SETTINGS,
    Backward,
    Nonfinite,
    Reduction,
    check_images,
    check_noise,
    check_settings,
    check_timesteps,
    choose_device,
)
from diffloss_trt.nonfinite import nonfinite_images, nonfinite_results
from diffloss_trt.objective import Terms, wide
from diffloss_trt.opening import open_evaluator
from diffloss_trt.schedule import NoiseSchedule
from diffloss_trt.unet import TappedUNet

logger = logging.getLogger(__name__)

# What a loss warns of once.
RANGE = "images that may be in another range"
BATCH = "batches that do not fit the bundle's"
# One for all losses, for a few instructions: a lock of its own could not be pickled with a loss.
_counting = ProcessLock()


class Call(NamedTuple):
    """One call of a loss.

    number: counted from 1.
    images: what `Evaluator.evaluate` takes first.
    looked_at: whether values may be looked at, which in the capture of a CUDA graph they may not.
    usable: whether `restored` is finite and anywhere near its range, as far as was looked.
    """

    number: int
    images: Images
    looked_at: bool
    usable: bool


class DiffLoss(nn.Module):
    """A frozen diffusion UNet as a loss for image restoration (Tan et al., ACCV 2024).

    Restored and target are mixed with the same noise at the same timestep, and the UNet's predicted
    noise (naturalness) and bottleneck features (semantic) of both are compared by mean squared difference.
    Make one with `load` (from an exported bundle) or `from_unet` (from a diffusers UNet, on eager PyTorch).

    The frozen weights are in neither `parameters()` nor `state_dict()`. Copies of a module share them. With a `seed`,
    `state_dict()` holds the state of the random draws, and nothing else. Without one it is empty: the draws then come
    from PyTorch's global generators, which are the trainer's to save.
    """

    draws: Draws | None
    value_range: tuple[float, float]

    def __init__(
        self,
        evaluator: Evaluator,
        *,
        naturalness_weight: float = DEFAULT_NATURALNESS_WEIGHT,
        semantic_weight: float = DEFAULT_SEMANTIC_WEIGHT,
        reduction: Reduction = "mean",
        value_range: Sequence[float] = (0.0, 1.0),
        seed: int | None = None,
        nonfinite: Nonfinite = "error",
        check_every: int | None = None,
    ) -> None:
        super().__init__()
        if not hasattr(evaluator, "schedule"):
            raise InputTypeError(
                f"evaluator is a {type(evaluator).__name__}; make a loss with DiffLoss.load(bundle) "
                "or DiffLoss.from_unet(unet, scheduler)"
            )
        self.evaluator = evaluator
        self.naturalness_weight = naturalness_weight
        self.semantic_weight = semantic_weight
        self.reduction = reduction
        self.value_range = value_range  # type: ignore[assignment]  # `__setattr__` makes it a tuple
        self.seed = seed
        self.nonfinite = nonfinite
        self.check_every = check_every
        self.calls = 0
        self.warned: set[str] = set()
        self.fitted = True
        self._handle = register(self)

    def __setattr__(self, name: str, value: Any) -> None:
        # Trainers assign settings in the middle of a training too.
        if name in SETTINGS:
            value = SETTINGS[name](name, value)
            if name == "check_every" and value is not None and self.evaluator.check is None:
                raise InputError("check_every needs a bundle and backward='fused': nothing else is held to a tolerance")
            if name == "check_every" and value is None and isinstance(self.evaluator, FusedEvaluator):
                self.evaluator.references.clear()
        super().__setattr__(name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # To compiled graphs a copy, or what was pickled, is a loss of its own, which has settings of its own.
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._handle = register(self)

    def __copy__(self) -> Self:
        # A module's own shares its submodules, and with them the draws.
        return copy.deepcopy(self)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *more: Any) -> None:
        # The checkpoint of a training with a seed is to be taken without one.
        if self.draws is None and state_dict.pop(f"{prefix}draws._extra_state", None) is not None:
            logger.warning(
                "the state holds the draws of a DiffLoss with a seed, but this one has no seed: they are ignored"
            )
        super()._load_from_state_dict(state_dict, prefix, *more)

    @classmethod
    def from_unet(
        cls,
        unet: Any,
        scheduler: Any,
        *,
        naturalness_weight: float = DEFAULT_NATURALNESS_WEIGHT,
        semantic_weight: float = DEFAULT_SEMANTIC_WEIGHT,
        reduction: Reduction = "mean",
        value_range: Sequence[float] = (0.0, 1.0),
        seed: int | None = None,
        nonfinite: Nonfinite = "error",
    ) -> Self:
        """Return the loss on eager PyTorch: the reference for every other backend.

        `unet` is an unconditional `diffusers.UNet2DModel`; it is frozen and put into eval mode in place,
        and stays on its device. `scheduler` is a diffusers scheduler with a table of betas, or a `NoiseSchedule`.
        Images may have any size that the UNet can take.

        Raises `ModelError` for a UNet or scheduler that cannot be used, `InputError` and `InputTypeError` for bad
        settings; see `load` for those.
        """
        settings: dict[str, Any] = {
            "naturalness_weight": naturalness_weight,
            "semantic_weight": semantic_weight,
            "reduction": reduction,
            "value_range": value_range,
            "seed": seed,
            "nonfinite": nonfinite,
        }
        check_settings(settings)
        schedule = scheduler if isinstance(scheduler, NoiseSchedule) else NoiseSchedule.from_scheduler(scheduler)
        return cls(EagerEvaluator(TappedUNet(unet, schedule)), **settings)

    @classmethod
    def load(
        cls,
        bundle: str | PathLike[str],
        backend: str = "auto",
        device: str | torch.device | None = None,
        naturalness_weight: float = DEFAULT_NATURALNESS_WEIGHT,
        semantic_weight: float = DEFAULT_SEMANTIC_WEIGHT,
        backward: Backward | None = None,
        reduction: Reduction = "mean",
        value_range: Sequence[float] = (0.0, 1.0),
        cuda_graph: bool = False,
        seed: int | None = None,
        nonfinite: Nonfinite = "error",
        check_every: int | None = None,
    ) -> Self:
        """Return the loss on a bundle that `diffloss-export onnx` wrote.

        Args:
            bundle: the bundle's folder.
            backend: "tensorrt", "tensorrt-rtx" or "inductor", which take minutes to build what they need, the first
                time; "onnxruntime"; "torch"; "onnxruntime-tensorrt", ONNX Runtime's own TensorRT, which rebuilds at
                every load; or "auto", which tries several in a fixed order and takes the first that works here.
            device: where images will be; by default the GPU if there is one.
            naturalness_weight: weight of the difference in predicted noise, >= 0; at zero the term is not computed.
            semantic_weight: weight of the difference in bottleneck features, >= 0.
            backward: "fused": value and gradient come from the engine, in difference form, which stays accurate however
                close restored and target are; "recompute": the engine runs forward, and PyTorch re-runs the UNet for
                the gradient. By default fused, or recompute if the bundle has no gradient graph.
            reduction: "mean" over the batch, or "none" for a loss of each sample.
            value_range: the range of the images passed in, (low, high).
            cuda_graph: whether to record the engine's work as a CUDA graph when it is loaded. That is faster where
                launching its kernels takes longer than running them: for small images or batches.
            seed: seed of the random draws, >= 0. The rank is mixed in, so the processes of `torch.distributed` draw
                differently from one seed. `state_dict()` holds the position in the draws, so a resumed training run
                continues with the same ones. By default they come from PyTorch's global generator.
            nonfinite: what a call does with NaN, infinity or values far outside `value_range` in `restored`, or with
                NaN or infinity in its results. "error" raises; "skip" logs a warning and returns NaN, with a gradient
                of NaN, on which `torch.amp.GradScaler` skips the optimizer's step.
            check_every: every so many calls, compare the results for the first image with eager PyTorch in fp32, which
                takes the memory of a second UNet in fp32. By default never.

        Raises:
            BundleError: the folder is not a bundle, or was written by a newer version.
            IntegrityError: a file of the bundle is missing, was altered, or does not belong to it.
            BackendUnavailableError: the backend cannot run here.
            BackendError: the backend starts but fails, in a build for example, or for lack of memory.
            ParityError: on the images that the bundle carries, the backend's results are wrong.
            InputError, InputTypeError: a setting cannot be used.
        """
        settings: dict[str, Any] = {
            "naturalness_weight": naturalness_weight,
            "semantic_weight": semantic_weight,
            "reduction": reduction,
            "value_range": value_range,
            "seed": seed,
            "nonfinite": nonfinite,
            "check_every": check_every,
        }
        check_settings(settings)
        return cls(
            open_evaluator(
                bundle, backend, device, backward, cuda_graph=cuda_graph, weights=(naturalness_weight, semantic_weight)
            ),
            **settings,
        )

    @property
    def device(self) -> torch.device:
        """Where images are expected."""
        return self.evaluator.device

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule that timesteps refer to."""
        return self.evaluator.schedule

    @property
    def backend(self) -> str:
        """What computes the loss: one of the values that `load` accepts, but never "auto"."""
        return self.evaluator.backend

    @property
    def backward(self) -> Backward:
        """Where the gradient comes from, see `load`; "recompute" for the loss of `from_unet`."""
        return self.evaluator.backward

    @property
    def resolution(self) -> tuple[int, int] | None:
        """Height and width that images must have, or None if any multiple of the UNet's stride will do."""
        return self.evaluator.resolution

    def forward(
        self,
        restored: Tensor,
        target: Tensor,
        *,
        timesteps: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return the weighted loss: a scalar, or [B] with reduction "none". For the arguments see `terms`."""
        total = self.terms(restored, target, timesteps=timesteps, noise=noise, generator=generator).total
        return total.mean() if self.reduction == "mean" else total

    if TYPE_CHECKING:
        __call__ = forward

    def terms(
        self,
        restored: Tensor,
        target: Tensor,
        *,
        timesteps: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Terms:
        """Return (total, naturalness, semantic) of each sample, [B] each.

        Only `total` is weighted, and only it carries the gradient. A term of weight zero is not computed and is zero.

        Under `torch.compile` a loss with backward "fused" is one operation of the graph, which does all that is said
        here as in eager mode; images are checked when it runs. Any other loss breaks the graph and runs in eager mode,
        and so does one with a `generator`: neither can be used with `fullgraph=True`.

        Args:
            restored: the network's output, [B, C, H, W], floating point, in `value_range`.
            target: the ground truth, like `restored`, without gradient.
            timesteps: integers [B] in [0, T); by default uniform over the schedule.
            noise: standard normal noise like `restored`; drawn by default. Both branches share it.
            generator: source of the random draws, on any device; by default the loss's own, if it has a seed, or else
                PyTorch's global one.

        Raises:
            InputError: wrong rank, channels, size, value range, NaN or infinity, timesteps outside the schedule,
                or a target that requires grad. On a GPU, checking values waits for the GPU; so while a CUDA graph is
                captured, neither images nor results are checked, and `check_every` does nothing.
            InputTypeError: wrong type, dtype or device.
            BackendError: the terms, or the gradient of backward "fused", are not finite although the images are; or a
                loss with a seed has to repeat a draw and cannot, see `Draws`, or to draw in a CUDA graph's capture.
            ParityError: `check_every` has found wrong results.

            With nonfinite "skip", bad values in `restored` or in the results do not raise; see `load`.
        """
        # Not `is_compiling`, which is true in all threads while one of them traces.
        if torch.compiler.is_dynamo_compiling():
            if self.backward == "fused" and generator is None:
                return compiled_terms(self, self._handle, restored, target, timesteps, noise)
            from diffloss_trt.uncompiled import uncompiled

            terms: Terms = uncompiled(self._terms, restored, target, timesteps, noise, generator)
            return terms
        return self._terms(restored, target, timesteps, noise, generator)

    @property
    def seed(self) -> int | None:
        """The seed of the random draws. Assigning it restarts them."""
        return None if self.draws is None else self.draws.seed

    @seed.setter
    def seed(self, seed: int | None) -> None:
        self.draws = None if seed is None else Draws(seed)

    @property
    def weights(self) -> tuple[float, float]:
        """The weights of naturalness and semantic."""
        return self.naturalness_weight, self.semantic_weight

    def centred(self, image: Tensor) -> Tensor:
        """Return `image` mapped to [-1, 1], and widened if it is in half precision.

        Mixed with noise in half precision, it would lose the digits that the loss depends on.
        """
        low, high = self.value_range
        # In this form nothing is rounded if the range is [-1, 1] already: near images differ by little more than that.
        return wide(image) * (2 / (high - low)) - (high + low) / (high - low)

    def _terms(
        self,
        restored: Tensor,
        target: Tensor,
        timesteps: Tensor | None,
        noise: Tensor | None,
        generator: torch.Generator | None,
    ) -> Terms:
        call = self.prepare(restored, target, timesteps, noise, generator)
        terms, gradient = self.evaluate(call)
        return terms if gradient is None else attach(terms, call.images[0], gradient)

    def prepare(
        self,
        restored: Tensor,
        target: Tensor,
        timesteps: Tensor | None,
        noise: Tensor | None,
        generator: torch.Generator | None = None,
    ) -> Call:
        """Check what a trainer passes in, draw what it does not, and count the call."""
        evaluator = self.evaluator
        if generator is not None and not isinstance(generator, torch.Generator):
            raise InputTypeError(f"generator is a {type(generator).__name__}; expected a torch.Generator")
        if not evaluator.on_tape and _is_traced():
            raise InputTypeError(
                "this loss cannot be traced by torch.jit.trace or make_fx, which do not see how it is computed"
            )
        if not evaluator.on_tape and _is_transformed(restored):
            raise InputTypeError(
                "restored is traced by torch.func or forward-mode differentiation, which this loss does not support; "
                "use backward() or torch.autograd.grad, and reduction='none' for per-sample gradients"
            )
        given = {"restored": restored, "target": target, "timesteps": timesteps, "noise": noise}
        for name, tensor in given.items():
            if _is_vmapped(tensor):
                raise InputTypeError(
                    f"{name} is inside torch.func.vmap or functionalize, which no DiffLoss supports; "
                    "pass the whole batch, with reduction='none' for per-sample losses and gradients"
                )
        with _counting.lock:
            self.calls += 1
            number = self.calls
        values = not _is_capturing(self.device)
        diverged, narrow = check_images(
            restored,
            target,
            channels=evaluator.channels,
            resolution=evaluator.resolution,
            multiple=evaluator.resolution_multiple,
            device=self.device,
            value_range=self.value_range,
            values=values,
        )
        if diverged:
            self._report(number, InputError, diverged)
        elif narrow:
            self._warn_once(RANGE, narrow)
        batch, count = len(restored), len(evaluator.schedule)
        if generator is None and self.draws is not None and (timesteps is None or noise is None):
            if not values:  # the graph would repeat one draw for ever
                raise BackendError(
                    "a DiffLoss with a seed cannot draw while a CUDA graph is captured: pass timesteps and noise"
                )
            generator = self.draws.generator(self.device)
        drawn_on = generator.device if generator is not None else self.device
        if timesteps is None:
            timesteps = torch.randint(count, (batch,), generator=generator, device=drawn_on).to(self.device)
        else:
            check_timesteps(timesteps, batch, count, self.device, values=values)
        if noise is None:
            noise = torch.randn(restored.shape, generator=generator, device=drawn_on, dtype=torch.float32)
            noise = noise.to(self.device)
        else:
            check_noise(noise, restored)
        dtype = torch.promote_types(restored.dtype, torch.float32)
        # A call that is skipped has drawn like any other: the ranks of a training stay in step.
        images = self.centred(restored), self.centred(target.to(dtype)), noise.to(dtype), timesteps
        return Call(number, images, values, usable=not diverged)

    def evaluate(self, call: Call) -> tuple[Terms, Tensor | None]:
        """Return the terms of a call, and the gradient of `total` with respect to `restored` in [-1, 1].

        Both are as in `Evaluator.evaluate`, but where nothing was computed there is a gradient too.
        """
        if not call.usable:
            return _constant(call, math.nan)
        if self.weights == (0.0, 0.0):
            return _constant(call, 0.0)
        evaluator = self.evaluator
        count, at_once = len(call.images[0]), evaluator.batch_size
        computed = math.ceil(count / at_once) * at_once
        fits, before = 3 * (computed - count) < computed, self.fitted
        self.fitted = fits
        if not (fits or before):  # not of one alone, such as the last of an epoch
            self._warn_once(
                BATCH,
                f"this bundle computes {at_once} images at a time, so a batch of {count} takes as long as one of "
                f"{computed}; for batches of {count}, export it with --batch-size {count}",
            )
        terms, gradient = evaluator.evaluate(*call.images, self.weights)
        if not call.looked_at:
            return terms, gradient
        if found := nonfinite_results(terms, gradient):
            self._report(call.number, BackendError, self._cause(call, found))
            return _constant(call, math.nan)
        if self.check_every is not None and call.number % self.check_every == 0:
            assert evaluator.check is not None  # see `__setattr__`
            assert gradient is not None
            evaluator.check(call.number, call.images, self.weights, terms, gradient)
        return terms, gradient

    def _cause(self, call: Call, found: str) -> str:
        """Return what is to be said of results that are not finite. Raises InputError if the caller's noise is not."""
        noise = call.images[2]
        if not bool(noise.isfinite().all()):
            where = nonfinite_images(noise)
            raise InputError(f"call {call.number:,} of this loss: noise holds NaN or infinite values {where}")
        evaluator = self.evaluator
        what = f"{evaluator.backend} on {evaluator.device} returned NaN or infinity for finite images: {found}"
        if evaluator.backward == "fused" and evaluator.precision == "fp16":
            what += "; fp16 ends at 65504, so export this model with --precision bf16 or fp32"
        return what

    def _report(self, number: int, error: type[DiffLossError], what: str) -> None:
        if self.nonfinite == "error":
            raise error(f"call {number:,} of this loss: {what}")
        logger.warning("call %s of this loss is skipped: %s", f"{number:,}", what)

    def _warn_once(self, of: str, message: str) -> None:
        with _counting.lock:
            said = of in self.warned
            self.warned.add(of)
        if not said:
            logger.warning("%s", message)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Called by .to(), .cuda() and the like. The module holds no tensors itself: ask where `fn` would put one.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # A loss that was pickled beside a GPU may be read where there is none.
        there = self.device.type != "cuda" or (self.device.index or 0) < torch.cuda.device_count()
        device = fn(torch.empty(0, device=self.device if there else "cpu")).device
        if device != self.device:
            self.evaluator = self.evaluator.to(choose_device(device))
        return self

    def extra_repr(self) -> str:
        seeded = "" if self.seed is None else f", seed={self.seed}"
        return (
            f"naturalness_weight={self.naturalness_weight:g}, semantic_weight={self.semantic_weight:g}, "
            f"backend={self.backend}, backward={self.backward}, device={self.device}, "
            f"reduction={self.reduction}, value_range={self.value_range}{seeded}"
        )


def _is_capturing(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):  # each has a current stream of its own
        return torch.cuda.is_current_stream_capturing()


def _is_traced() -> bool:
    return torch.jit.is_tracing() or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


def _is_transformed(image: Any) -> bool:
    if not isinstance(image, Tensor):
        return False
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(image)
    return wrapped or torch.autograd.forward_ad.unpack_dual(image).tangent is not None


def _is_vmapped(tensor: Any) -> bool:
    """Return whether `tensor` belongs to a transform of torch.func that does more than record a tape."""
    functorch = torch._C._functorch
    while isinstance(tensor, Tensor) and functorch.is_gradtrackingtensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return isinstance(tensor, Tensor) and functorch.is_functorch_wrapped_tensor(tensor)


def _constant(call: Call, value: float) -> tuple[Terms, Tensor]:
    """Return terms and a gradient that are `value` throughout."""
    restored = call.images[0].detach()
    return Terms(*(restored.new_full((len(restored),), value) for _ in range(3))), torch.full_like(restored, value)
