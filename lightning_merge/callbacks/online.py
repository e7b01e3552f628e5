"""Learning on the stream itself, while ``Trainer.test`` or ``Trainer.predict`` runs: test-time adaptation, online."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import lightning as L
import torch
from torch.optim import Optimizer

from lightning_merge.callbacks.learned_merge import LearnedMerge
from lightning_merge.callbacks.learning import Learning
from lightning_merge.errors import UserError, nearest, unknown

When = Literal["none", "before", "after"]
Stage = Literal["test", "predict"]


class OnlineMerge(LearnedMerge):
    """A merge that can be learned on the stream of ``Trainer.test`` and ``Trainer.predict``, batch by batch.

    Attributes:
        online: Whether a batch is predicted ``before`` it is learned from, or ``after``; or ``none``.
    """

    def __init__(self, online: When, **settings: Any) -> None:
        super().__init__(**settings)
        if online not in ("none", "before", "after"):
            raise unknown("time to learn online", str(online), ("none", "before", "after"))
        self.online: When = online
        self._online_optimizer: Optimizer | None = None

    def _make_optimizer(self) -> Any:
        raise NotImplementedError

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Merge, to learn on the stream of ``Trainer.test``."""
        self._begin_online("test")

    def on_test_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Learn from a batch that is predicted after."""
        self._learn_online("test", "after", batch, dataloader_idx)

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Learn from a batch that was predicted before."""
        self._learn_online("test", "before", batch, dataloader_idx)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Merge, to learn on the stream of ``Trainer.predict``."""
        self._begin_online("predict")

    def on_predict_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Learn from a batch that is predicted after."""
        self._learn_online("predict", "after", batch, dataloader_idx)

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Learn from a batch that was predicted before."""
        self._learn_online("predict", "before", batch, dataloader_idx)

    def _begin_online(self, stage: Stage) -> None:
        if self.online == "none":
            return
        module, trainer = self._running()
        check_loaders(trainer, stage, self.tasks)
        self.scalars.to(module.device)
        self._begin()
        made = self._make_optimizer()
        self._online_optimizer = made["optimizer"] if isinstance(made, dict) else made

    def _learn_online(self, stage: Stage, when: When, batch: Any, dataloader_idx: int) -> None:
        if self.online != when:
            return
        assert self._learning is not None and self._online_optimizer is not None
        _, trainer = self._running()
        batches = batches_of(trainer, stage, self.tasks, batch, dataloader_idx)
        learn(self._learning, self._online_optimizer, batches)
        self.last, self.bad_steps = self._learning.last, self._learning.bad_steps


def check_online(trainer: L.Trainer, stage: str) -> None:
    """Refuse inference mode, whose tensors no backward pass can use, and predictions in several processes.

    Raises:
        UserError: The trainer runs this stage in inference mode; or it predicts in several processes, of which
            Lightning gives some a batch less than others.
    """
    stage = str(getattr(stage, "value", stage))
    loop = trainer.test_loop if stage == "test" else trainer.predict_loop
    if loop.inference_mode:
        raise UserError(
            f"AdaMerging cannot learn during Trainer.{stage}, which runs in inference mode. Expected "
            "Trainer(inference_mode=False)."
        )
    if stage == "predict" and trainer.world_size > 1:
        raise UserError(
            f"AdaMerging cannot learn during Trainer.predict in {trainer.world_size} processes: they get unequal "
            "numbers of batches, and each step needs all of them. Expected devices=1, or Trainer.test, or a fit first "
            "and online='none'."
        )


def check_loaders(trainer: L.Trainer, stage: str, tasks: Sequence[str]) -> None:
    """Refuse loaders that do not say which task a batch is of.

    Raises:
        UserError: Their keys are not among the tasks, or there are none for several tasks.
    """
    loaders = _loaders(trainer, stage)
    if not isinstance(loaders, Mapping):
        several = isinstance(loaders, (list, tuple)) and len(loaders) > 1
        if len(tasks) == 1 and not several:
            return
        raise UserError(
            f"The loaders of Trainer.{stage} do not say of which task a batch is. Expected a dict of loaders with "
            f"keys among: {', '.join(tasks)}."
        )
    strange = [str(key) for key in loaders if key not in tasks]
    if strange:
        raise UserError(
            f"The loader '{strange[0]}' of Trainer.{stage} is of no task. Expected keys among: {', '.join(tasks)}."
            f"{nearest(strange[0], tasks)}"
        )


def batches_of(trainer: L.Trainer, stage: str, tasks: Sequence[str], batch: Any, dataloader_idx: int) -> dict[str, Any]:
    """Return ``{task: batch}``: of a loader under its key, or of a batch that holds several tasks."""
    if isinstance(batch, Mapping) and batch and all(key in tasks for key in batch):
        return {task: part for task, part in batch.items() if part is not None}
    loaders = _loaders(trainer, stage)
    return {list(loaders)[dataloader_idx] if isinstance(loaders, Mapping) else tasks[0]: batch}


def learn(learning: Learning, optimizer: Optimizer, batches: Mapping[str, Any]) -> None:
    """Take one step; the module answers accordingly at once."""
    with torch.enable_grad():
        loss = learning.losses(batches)
        with torch.autocast(loss.device.type, enabled=False):
            loss.backward()
        optimizer.zero_grad()
        if learning.gradient():
            optimizer.step()
            learning.materialise()


def _loaders(trainer: L.Trainer, stage: str) -> Any:
    loaders = trainer.test_dataloaders if stage == "test" else trainer.predict_dataloaders
    return getattr(loaders, "iterables", loaders)
