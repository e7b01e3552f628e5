"""A callback that writes what was fine-tuned at the end of a run of Lightning's Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import lightning as L
import torch

from lightning_merge.errors import UserError, unknown
from lightning_merge.modules.finetune import FineTune
from lightning_merge.modules.folder import BASE_SHA256
from lightning_merge.weights import open_weights


class ExportFineTuned(L.Callback):
    """At the end of ``fit``, write what ``FineTune`` learned as a folder to merge from (one process writes).

    Args:
        folder: where the fine-tuned model goes. It must be new, empty, or an earlier export.
        task: the task's name; by default the one trained on.
        head_path: the head's file; by default ``folder/heads/<task>.safetensors``.
        weights: ``last``, or ``best`` as the run's ModelCheckpoint judged; the module then holds those weights.

    Raises:
        UserError: before training starts, when the folder holds something else, or ``best`` has nothing to go by.
    """

    def __init__(
        self,
        folder: str,
        task: str | None = None,
        head_path: str | None = None,
        weights: Literal["last", "best"] = "last",
    ) -> None:
        if weights not in ("last", "best"):
            raise unknown("weights", weights, ("last", "best"))
        self.folder = folder
        self.task = task
        self.head_path = head_path
        self.weights = weights

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what could only fail after training."""
        if stage != "fit":
            return
        if not isinstance(pl_module, FineTune):
            raise UserError(f"ExportFineTuned exports a FineTune module, got {type(pl_module).__name__}.")
        target = Path(self.folder)
        if target.exists() and not (target.is_dir() and _is_export(target, pl_module.base_folder)):
            raise UserError(
                f"Export folder '{target}' already holds something else. "
                "Accepted: a new folder, an empty one, or an earlier export."
            )
        if self.weights == "best" and not getattr(trainer.checkpoint_callback, "monitor", None):
            raise UserError(
                "ExportFineTuned: weights='best' needs a ModelCheckpoint with a monitor, such as val_accuracy."
            )

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the export."""
        assert isinstance(pl_module, FineTune)
        if self.weights == "best":
            best = trainer.checkpoint_callback.best_model_path  # type: ignore[union-attr]
            if best:  # none where fit ended before the first validation
                pl_module.load_state_dict(torch.load(best, map_location="cpu", weights_only=True)["state_dict"])
        if trainer.is_global_zero:
            pl_module.export(self.folder, self.task, self.head_path)
        trainer.strategy.barrier()


def _is_export(folder: Path, base: Path) -> bool:
    """Whether a folder is empty or was written, perhaps not to its end, by ``FineTune.export``."""
    weights = folder / "model.safetensors"
    if not weights.is_file():
        # an export that was interrupted has no weights yet, but nothing that is not a copy of the base either
        return {entry.name for entry in folder.iterdir()} <= {"heads", *(entry.name for entry in base.iterdir())}
    try:
        return BASE_SHA256 in open_weights(weights).metadata
    except UserError:
        return False
