"""Graphs, bundles and inference sessions: named tensors in, named tensors out, and nothing of diffusion."""

from diffloss_engine.bundle import FORMAT_VERSION, MANIFEST, Bundle, FileEntry, Graph, file_sha256
from diffloss_engine.bundle_writer import BundleWriter
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
from diffloss_engine.session import Session, open_session
from diffloss_engine.tensors import DTYPES, TensorSpec, check_tensors
from diffloss_engine.torch_session import TorchSession

__all__ = [
    "DTYPES",
    "FORMAT_VERSION",
    "MANIFEST",
    "BackendError",
    "BackendUnavailableError",
    "Bundle",
    "BundleError",
    "BundleWriter",
    "CaptureError",
    "DiffLossError",
    "FileEntry",
    "Graph",
    "InputError",
    "InputTypeError",
    "IntegrityError",
    "MissingPackageError",
    "ModelError",
    "ParityError",
    "Session",
    "TensorSpec",
    "TorchSession",
    "check_tensors",
    "file_sha256",
    "open_session",
]
