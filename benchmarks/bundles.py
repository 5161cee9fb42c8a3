"""Bundles of the public architectures, exported for a benchmark, and the place for what is compiled of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from configurations import CONFIGURATIONS, make_model, make_schedule

from diffloss_engine.bundle import Bundle
from diffloss_engine.bundle_writer import BundleWriter
from diffloss_export.pipeline import write_graphs, write_unet
from diffloss_trt.contract import PRECISIONS
from diffloss_trt.unet import TappedUNet


@contextmanager
def workplace(folder: Path | None) -> Iterator[Path]:
    """Yield a folder for bundles, plans, compiled code and rows: `folder`, which is kept, or one that is thrown away.

    With a folder that is kept, a command that ran out of time goes on from there when it is given again.
    """
    with ExitStack() as stack:
        path = (folder or Path(stack.enter_context(TemporaryDirectory()))).resolve()
        for variable, name in (("DIFFLOSS_CACHE", "plans"), ("TORCHINDUCTOR_CACHE_DIR", "inductor")):
            os.environ[variable] = str(path / name)
        yield path


def make_bundle(folder: Path, configuration: str, precision: str, batch_size: int, side: int | None = None) -> Bundle:
    """Return the bundle of an architecture for images of `side` (by default its own), written unless it is there.

    Nothing is replayed, which takes minutes of a large UNet: what is measured is compared with float64 anyway.
    """
    side = side or int(CONFIGURATIONS[configuration]["sample_size"])
    path = folder / f"{configuration}-{precision}-{batch_size}-{side}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)

        def tell(stage: str) -> None:
            print(f"{path.name}: {stage}", flush=True)

        tapped = TappedUNet(make_model(configuration).unet, make_schedule()).to(PRECISIONS[precision])
        with BundleWriter(path) as writer:
            unet = write_unet(tapped, writer.path)
            graphs = write_graphs(tapped, writer.path, batch_size, (side, side), on_stage=tell)
            writer.commit(
                unet=unet,
                resolution=(side, side),
                batch_size=batch_size,
                precision=precision,
                graphs=graphs,
                check=lambda _: None,
            )
    return Bundle.open(path)


def load_tapped(folder: Path, configuration: str, dtype: torch.dtype, device: torch.device) -> TappedUNet:
    """Return the UNet that `make_model` makes; its weights, which take a while to draw, are kept in `folder`."""
    from diffusers import UNet2DModel

    path = folder / f"{configuration}.pt"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(make_model(configuration).unet.state_dict(), path)
    weights = torch.load(path, mmap=True, weights_only=True)
    with torch.device("meta"):
        unet = UNet2DModel(**CONFIGURATIONS[configuration])
    unet.load_state_dict({name: weight.to(device, dtype, copy=True) for name, weight in weights.items()}, assign=True)
    return TappedUNet(unet, make_schedule())
