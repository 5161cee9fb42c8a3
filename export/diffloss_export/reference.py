"""What a UNet's graphs should return: eager PyTorch in float64, which is exact enough, and slow."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Self

import torch

from diffloss_engine.bundle import Bundle
from diffloss_export.programs import Program, feature_programs
from diffloss_trt.contract import read_schedule
from diffloss_trt.evaluators import EagerEvaluator
from diffloss_trt.probe import CHECK_WEIGHTS, Probe, Result, run_evaluator
from diffloss_trt.tolerances import PLAIN_DB, timestep_at
from diffloss_trt.unet import TappedUNet, reload_unet

# Where the loss is compared: timesteps as fractions of the last one, and the restored image's PSNR in dB.
_PLACES = ((0.0, 35.0), (0.01, 20.0), (0.1, 50.0), (0.5, 20.0), (1.0, 35.0))
# Of a network whose parameters times pixels are more than this, a step in float64 takes minutes.
_LARGE = 1e12
_ONE_PLACE = ((0.1, 20.0),)


class Reference:
    """A UNet in float64, and the images to compare on.

    tapped: with the stored weights, widened; it is taken over. Its memory goes with `release`.
    places: where images are compared: timesteps as fractions of the last one, and decibels.
    expected: what each gradient graph should return on `probe`, once it has been computed.
    """

    def __init__(self, tapped: TappedUNet, resolution: tuple[int, int]) -> None:
        parameters = sum(parameter.numel() for parameter in tapped.unet.parameters())
        self.places = _PLACES if parameters * math.prod(resolution) < _LARGE else _ONE_PLACE
        self.probe = self._probe(tapped, resolution, [decibels for _, decibels in self.places])
        self._noisier = self._probe(tapped, resolution, [PLAIN_DB] * len(self.places))
        self.expected: dict[str, Result] = {}
        # The tape of a large UNet in float64 fills a machine.
        tapped.unet.enable_gradient_checkpointing()
        self._tapped: TappedUNet | None = tapped

    @classmethod
    def of_bundle(cls, bundle: Bundle) -> Self:
        """Return the reference for a bundle's graphs: its own UNet."""
        schedule = read_schedule(bundle)
        return cls(TappedUNet(reload_unet(bundle, torch.float64, torch.device("cpu")), schedule), bundle.resolution)

    @classmethod
    def of_unet(cls, tapped: TappedUNet, resolution: tuple[int, int]) -> Self:
        """Return the reference for graphs to be made of a UNet, which is left as it is."""
        return cls(TappedUNet(copy.deepcopy(tapped.unet).double(), tapped.schedule), resolution)

    def _probe(self, tapped: TappedUNet, resolution: tuple[int, int], decibels: Sequence[float]) -> Probe:
        timesteps = torch.tensor([timestep_at(place, len(tapped.schedule)) for place, _ in self.places])
        return Probe.make(tapped.channels, resolution, timesteps, decibels)

    def programs(self) -> tuple[Program, Program]:
        """Return encoder and noise head, and what they are fed."""
        tapped, probe = self._there(), self._noisier
        noisy = tapped.schedule.add_noise(probe.restored, probe.noise, probe.timesteps)
        return feature_programs(tapped, noisy, probe.timesteps.double())

    def compute(self, on_stage: Callable[[str], None]) -> None:
        """Compute, once, what each gradient graph should return on `probe` with the weights to check it with."""
        for graph in (graph for graph in CHECK_WEIGHTS if graph not in self.expected):
            on_stage(f"computing what the {graph} graph should return")
            tapped = self._there()
            evaluator = EagerEvaluator(tapped)
            # One sample at a time, for the sake of memory.
            samples = [
                run_evaluator(evaluator, self.probe.part([row]), CHECK_WEIGHTS[graph], torch.float64)
                for row in range(len(self.places))
            ]
            terms = [sample.naturalness for sample in samples if sample.naturalness is not None]
            self.expected[graph] = Result(
                torch.cat(terms) if terms else None,
                torch.cat([sample.semantic for sample in samples]),
                torch.cat([sample.gradient for sample in samples]),
            )

    def release(self) -> None:
        """Forget the UNet; what has been computed is kept."""
        self._tapped = None

    def _there(self) -> TappedUNet:
        assert self._tapped is not None, "asked for more after its release"
        return self._tapped
