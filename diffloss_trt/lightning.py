"""A Lightning callback; Lightning itself is imported only when the callback is made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffloss_engine.errors import InputError, MissingPackageError
from diffloss_trt.objective import Terms

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import Callback


def log_terms(key: str = "diffloss") -> Callback:
    """Return a callback that logs the terms of each training step, as means over the batch and over the epoch.

    The module's `training_step` must return, with its loss, the terms that `DiffLoss.terms` returned:
    `{"loss": loss, "diffloss": terms}`. They are logged as `diffloss/total`, `diffloss/naturalness` and
    `diffloss/semantic`.

    Raises MissingPackageError without Lightning, and InputError during training if `key` does not hold the terms.
    """
    try:
        from lightning.pytorch.callbacks import Callback
    except ImportError as error:
        raise MissingPackageError(
            f"the callback needs Lightning, which cannot be imported ({error}): install 'lightning'"
        ) from error

    class LogTerms(Callback):
        def __reduce__(self) -> tuple[Any, ...]:
            return log_terms, (key,)  # a class that is made here cannot be pickled by its name

        def on_train_batch_end(
            self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            if pl_module.automatic_optimization and not outputs:
                return  # a training_step that returns None leaves its step out
            terms = outputs.get(key) if isinstance(outputs, dict) else None
            if not isinstance(terms, Terms):
                raise InputError(f"training_step did not return the terms: expected {{'loss': loss, {key!r}: terms}}")
            pl_module.log_dict(
                {f"{key}/{name}": term.mean() for name, term in terms._asdict().items()},
                on_step=True,
                on_epoch=True,
                batch_size=len(terms.total),
                sync_dist=True,
            )

    return LogTerms()
