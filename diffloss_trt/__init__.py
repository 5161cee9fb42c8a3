"""DiffLoss, a frozen diffusion UNet as a training loss, on inference engines."""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from diffloss_engine.errors import (
    BackendError,
    BackendUnavailableError,
    BundleError,
    CaptureError,
    DiffLossError,
    InputError,
    InputTypeError,
    IntegrityError,
    MissingPackageError,
    ModelError,
    ParityError,
)
from diffloss_trt.loss import DiffLoss
from diffloss_trt.objective import Terms
from diffloss_trt.schedule import NoiseSchedule

__all__ = [
    "BackendError",
    "BackendUnavailableError",
    "BundleError",
    "CaptureError",
    "DiffLoss",
    "DiffLossError",
    "InputError",
    "InputTypeError",
    "IntegrityError",
    "MissingPackageError",
    "ModelError",
    "NoiseSchedule",
    "ParityError",
    "Terms",
    "__version__",
]

if TYPE_CHECKING:
    __version__: str
else:

    def __getattr__(name: str) -> str:
        """Return `__version__`, which is looked up when asked for: that searches every folder of `sys.path`."""
        if name != "__version__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            return version("diffloss-trt")
        except PackageNotFoundError:  # sources that were never installed
            return "0+unknown"
