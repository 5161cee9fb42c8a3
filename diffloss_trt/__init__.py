"""DiffLoss, a frozen diffusion UNet as a training loss, on inference engines."""

from diffloss_trt.loss import DiffLoss
from diffloss_trt.objective import Terms
from diffloss_trt.schedule import NoiseSchedule

__all__ = ["DiffLoss", "NoiseSchedule", "Terms"]
