"""Every error the project raises on purpose: one root, each also the builtin a caller would expect."""

from __future__ import annotations

# Characters that are kept at either end of a message: what it names, or a library says in it, may be of any length.
_KEPT = 2000


class DiffLossError(Exception):
    """Root of all errors of this project; catching it catches nothing else. Its message is one line."""

    def __init__(self, message: str) -> None:
        line = " ".join(part.strip() for part in message.splitlines() if part.strip())
        super().__init__(line if len(line) <= 2 * _KEPT else f"{line[:_KEPT]} [...] {line[-_KEPT:]}")


class InputError(DiffLossError, ValueError):
    """An argument, image or setting has a value, shape or range that cannot be used."""


class InputTypeError(DiffLossError, TypeError):
    """An argument or tensor has a type, dtype or device that cannot be used."""


class ModelError(DiffLossError, ValueError):
    """A model source cannot be read, or its architecture is not one that can be exported."""


class BundleError(DiffLossError, ValueError):
    """A bundle is missing, malformed, written by a newer version, or points outside its folder."""


class IntegrityError(BundleError):
    """A file of a bundle is missing, was altered, or does not belong to it."""


class ParityError(DiffLossError, ArithmeticError):
    """A graph's values or gradients differ from eager PyTorch by more than the tolerance."""


class MissingPackageError(DiffLossError, ImportError):
    """A package that is installed only for what was asked for, such as a picture, cannot be imported."""


class BackendUnavailableError(DiffLossError, RuntimeError):
    """The backend asked for cannot run here: package, device, kernel or graph is missing."""


class BackendError(DiffLossError, RuntimeError):
    """A backend that was running failed."""


class CaptureError(BackendError):
    """The recording of a CUDA graph failed, after which PyTorch may be of no use in this process any more."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
