"""How PyTorch multiplies float32: settings of the whole process, changed for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from diffloss_engine.exclusive import exclusive

# Those that others follow come first. An operation without a setting of its own follows its library's, and that one
# PyTorch's. (By their inner names: `torch.backends.mkldnn.fp32_precision` writes, in torch 2.13, what all follow.)
_SETTINGS = (
    ("generic", "all"),
    *((library, operation) for operation in ("all", "matmul", "conv", "rnn") for library in ("cuda", "mkldnn")),
)
_C: Any = torch._C  # typed in parts only


@contextlib.contextmanager
def fp32_precision(precision: str) -> Iterator[None]:
    """Let products and convolutions of float32 be computed as "ieee" (in full) or "tf32" says, whatever was set.

    One thread at a time can be in here. Afterwards every setting is what it was, those of the older names too
    (`allow_tf32`, `set_float32_matmul_precision`). Meanwhile PyTorch (torch 2.13) may answer with an error if it is
    asked for those.
    """
    with exclusive:
        before, own = {setting: _read(setting) for setting in _SETTINGS}, {}
        try:
            for setting in _SETTINGS:
                # A setting reads as the one that it follows, and once written follows no more; and the default of
                # cuDNN's, TF32 unless a general one is set, cannot be written at all. So what follows is not touched.
                if (found := _read(setting)) != precision:
                    own[setting] = found
                    _write(setting, precision)
            yield
        finally:
            for setting, found in own.items():
                _write(setting, found)
            # torch.export (2.13) writes into some what it has read in them: they are to follow again.
            for setting, found in before.items():
                for value in ("none", found):
                    if _read(setting) != found:
                        _write(setting, value)


@contextlib.contextmanager
def settings_for_export() -> Iterator[None]:
    """Let torch.export ask whether cuDNN may use TF32.

    It does (torch 2.13) by the older name of that setting, which fails where one of the newer names says otherwise.
    Nothing may be computed meanwhile.
    """
    with contextlib.ExitStack() as agreed:
        # What the older one says is not told either.
        for precision in ("tf32", "ieee"):
            try:
                _C._get_cudnn_allow_tf32()
                break
            except RuntimeError:
                agreed.close()
                agreed.enter_context(fp32_precision(precision))
        yield


def fp32_settings(library: str) -> dict[str, str]:
    """Return how a library ("cuda" or "mkldnn") multiplies float32 now, by operation."""
    return {operation: _read((of, operation)) for of, operation in _SETTINGS if of == library}


def rounds_convolutions(device: torch.device) -> bool:
    """Whether PyTorch rounds to TF32 now what it convolves in float32 on `device`."""
    return device.type == "cuda" and fp32_settings("cuda")["conv"] == "tf32"


def _read(setting: tuple[str, str]) -> str:
    found: str = _C._get_fp32_precision_getter(*setting)
    return found


def _write(setting: tuple[str, str], precision: str) -> None:
    _C._set_fp32_precision_setter(*setting, precision)
