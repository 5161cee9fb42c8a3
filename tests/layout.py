"""Where the sources of the three packages lie, and what they must be importable without."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = {
    "diffloss_engine": ROOT / "engine" / "diffloss_engine",
    "diffloss_trt": ROOT / "diffloss_trt",
    "diffloss_export": ROOT / "export" / "diffloss_export",
}
# Missing from many installations, or slow to import: imported where they are used, never at a module's top level.
LATE = (
    "accelerate",
    "diffusers",
    "lightning",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "pycuda",
    "tensorrt",
    "tensorrt_rtx",
)
