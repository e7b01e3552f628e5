"""AdaMerging (Yang et al., 2024, arXiv 2310.02575) in anybody's trainer, with anybody's LightningModule.

The coefficients λ of a merge θ₀ + Σ λ τ are learned on unlabeled batches, by default by minimising the entropy of the
predictions; the module knows nothing of it. AdaMerging++ is the same on task vectors that agree in sign
(``ElectSign``); other objectives make it learned soups, feature matching or few-shot coefficients.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_merge import strategies
from lightning_merge.adaptation import Remember
from lightning_merge.callbacks.answers import Answers, Part
from lightning_merge.callbacks.checks import check_remembered, check_setting, check_stream
from lightning_merge.callbacks.learning import keep_evaluation
from lightning_merge.callbacks.online import OnlineMerge, When, check_online
from lightning_merge.callbacks.overrides import is_overridden, take_over
from lightning_merge.coefficients import Coefficients, Constraint, Grouping, Initial
from lightning_merge.errors import UserError, unknown
from lightning_merge.merged_weights import Storage, StoredDtype
from lightning_merge.methods.base import Transform
from lightning_merge.objectives import Entropy, Objective
from lightning_merge.task_vectors import TaskVectors


class AdaMerging(OnlineMerge):
    """Learn the coefficients of a merge while somebody's Trainer runs somebody's LightningModule.

    For the time of a ``fit`` the callback puts a step of its own in the place of the module's ``training_step`` and an
    optimizer of the coefficients in that of its ``configure_optimizers``. A training batch is ``{task: batch}``, as a
    dict of loaders gives them. Each step merges once, runs one forward and backward for each task in turn, and moves
    the coefficients once; everything else of the module stays as it is, in evaluation mode (without dropout). At the
    end the module holds the merged weights and is otherwise as it was, also after an exception.

    Checkpoints load, strictly, into the plain module; the coefficients are in the callback's own state. Length is best
    given in epochs (``max_epochs`` with ``limit_train_batches``): Lightning repeats batches when it resumes elsewhere.
    Coefficients of what no answer depends on, such as the biases of attention's keys, have a gradient of 0 but for
    rounding, which Adam scales up: they wander, and the answers stay. Each ``fit`` starts at ``initial``; ``test`` and
    ``predict`` at what the last ``fit`` has learned. Under strategies that start processes of their own (``ddp_spawn``)
    attributes stay there: read coefficients from the checkpoint.

    Args:
        task_vectors: The models over their base, or ``{base: ..., models: {name: ...}}`` to open.
        logits: The module's method that maps a batch's inputs to logits ``(B, C)``, or to features where there are
            ``heads``. It is given the task as ``task=`` if it has a parameter of that name.
        heads: For each task what maps features to logits: modules, or files of heads. They are not trained.
        ignore: Patterns of the module's trainable parameters that stay as they are.
        inputs: Where the inputs stand in a batch: a position, a key, or a function; by default the first element of a
            tuple or list, else the batch itself.
        features: The method that maps inputs to features, for objectives that compare them, where no heads are given.
        labels: Where the labels stand in a batch, for ``Supervised``; by default the second element, or under
            ``labels``, ``label`` or ``y``.
        by: What shares a coefficient: ``tensor`` (AdaMerging calls it layer-wise), ``block``, ``layer``, ``task``, or
            patterns by group name.
        initial: Where coefficients start: a number, one for each model, or a file of coefficients.
        constraint: ``free``, ``clamp`` into [0, 1], or ``softmax`` over the models.
        prior: Strength of the pull back to the start, at least 0.
        transforms: Of the task vectors, first; ``ElectSign`` makes it AdaMerging++.
        scalars: Others to learn than ``Coefficients``, such as ``RankMasks``: an object, or a function that makes one
            of the task vectors. An object goes on from where it is at each ``fit``.
        objectives: What is minimised, summed, averaged over the tasks; ``Entropy`` by default.
        learning_rate: Of Adam, above 0; 1e-3 in the paper.
        weight_decay: Of Adam, at least 0.
        optimizer: Makes another optimizer of the coefficients.
        lr_scheduler: Makes a scheduler of the optimizer, stepped every batch.
        storage: Where task vectors live: on the ``device``, on the ``host``, or in the models' ``files``.
        dtype: What task vectors are kept in: ``float32``, or ``bfloat16`` at half the memory.
        keep_base: Keep the base in memory, or read it again from its file at each step.
        prefix: What stands before the tensors' names in the module; found out by default.
        names: The module's parameter for each tensor, where names differ otherwise.
        individuals: Where an objective asks for the fine-tuned models' answers: ``computed`` each time, or ``cached``
            (not under sharding).
        online: Learn during ``Trainer.test`` and ``Trainer.predict`` too: each batch is predicted ``before`` it is
            learned from, or ``after``; ``none`` for not.
        max_bad_steps: Steps in a row with a NaN or infinite loss that are skipped before the fit is stopped.
        seed: Of transforms that draw at random.
        models: The model of each task, where tasks are called otherwise than models.

    Raises:
        UserError: In ``setup``: a strategy or precision that cannot work, a stream whose keys are not the tasks,
            trainable parameters that nothing covers, task vectors without a base or of another architecture, a second
            callback of the kind. In the first batch: no logits. When resuming: a checkpoint of other task vectors.

    Cost: T numbers for each merged entry in ``dtype``, and the base; a step costs one forward and backward over all
        tasks' batches and two passes over the task vectors.
    Reference: Yang et al., 2024, AdaMerging, arXiv 2310.02575.

    Example::

        adamerging = AdaMerging(TaskVectors.open(base, {"cars": cars, "sun": sun}))
        trainer = L.Trainer(max_epochs=1, limit_train_batches=500, callbacks=[adamerging])
        trainer.fit(module, {"cars": cars_loader, "sun": sun_loader})
        adamerging.table()  # λ of each model and tensor
    """

    def __init__(
        self,
        task_vectors: TaskVectors | dict[str, Any],
        logits: str = "forward",
        heads: Mapping[str, nn.Module | str] | None = None,
        ignore: Sequence[str] = (),
        *,
        inputs: Part = None,
        features: str | None = None,
        labels: Part = None,
        by: Grouping | dict[str, str] = "tensor",
        initial: Initial = 0.3,
        constraint: Constraint = "free",
        prior: float | dict[str, float] = 0.0,
        transforms: Sequence[Transform] = (),
        scalars: Any = None,
        objectives: Sequence[Objective] | None = None,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.0,
        optimizer: Callable[[Iterable], Optimizer] | None = None,
        lr_scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        storage: Storage = "device",
        dtype: StoredDtype = "float32",
        keep_base: bool = True,
        prefix: str | None = None,
        names: dict[str, str] | None = None,
        individuals: Remember = "computed",
        online: When = "none",
        max_bad_steps: int = 10,
        seed: int = 0,
        models: dict[str, str] | None = None,
    ) -> None:
        if not isinstance(task_vectors, TaskVectors):
            task_vectors = TaskVectors.open(**task_vectors)
        for name, value, fits, expected in (
            ("learning_rate", learning_rate, learning_rate > 0, "a number above 0"),
            ("weight_decay", weight_decay, weight_decay >= 0, "a number of at least 0"),
            ("max_bad_steps", max_bad_steps, max_bad_steps >= 1, "an integer of at least 1"),
            ("objectives", objectives, objectives is None or len(objectives) > 0, "at least one, such as Entropy()"),
        ):
            if not fits:
                raise UserError(f"AdaMerging: {name} is {value}. Expected {expected}.")
        if isinstance(ignore, str):
            raise UserError(f"AdaMerging: ignore must be a list of patterns, got '{ignore}'. Expected ['{ignore}'].")
        chosen = dict(models) if models is not None else {name: name for name in task_vectors.names}
        for model in chosen.values():
            if model not in task_vectors:
                raise unknown("model", model, task_vectors.names)
        super().__init__(
            online,
            task_vectors=task_vectors,
            models=chosen,
            answers=Answers(logits, _heads(heads), inputs, features, labels),
            objectives=[Entropy()] if objectives is None else objectives,
            ignore=ignore,
            names=names,
            prefix=prefix,
            weights={
                "transforms": tuple(transforms),
                "seed": seed,
                "storage": storage,
                "dtype": dtype,
                "keep_base": keep_base,
            },
            individuals=individuals,
            max_bad_steps=max_bad_steps,
        )
        self._coefficients: dict[str, Any] = {
            "by": by,
            "initial": initial,
            "constraint": constraint,
            "prior": prior,
        }
        self._given_scalars = scalars
        self._optimizer, self._lr_scheduler = optimizer, lr_scheduler
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self._after_fit: dict[str, Tensor] | None = None

    # --- fit --------------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what cannot work, and take over the module's training for the time of the fit."""
        if stage == "validate" or (stage != "fit" and self.online == "none"):
            return
        self._undo()
        check_setting(trainer, pl_module, self)
        strategies.check_trainer(trainer)
        needs: frozenset[str] = frozenset().union(*(objective.needs for objective in self.objectives))
        self._answers.check(pl_module, self.tasks, needs)
        if "individual" in needs:
            check_remembered(trainer, self._remember)
        if stage == "fit":
            check_stream(trainer, self.tasks)
        else:
            check_online(trainer, stage)
        self._module, self._trainer = pl_module, trainer
        self.scalars = self._make_scalars()
        self.bad_steps, self.last, self._of = 0, {}, None
        self._found_names = None
        if not is_overridden("configure_model", pl_module):
            self._names_of(pl_module)
        if stage == "fit":
            strategies.prepare(trainer, pl_module, self._overrides, self._refuse_other_checkpoint)
            take_over(pl_module, self._overrides, self.tasks, self._training_step, self._configure_optimizers)
        elif self._after_fit is not None:
            self.scalars.load_state_dict(self._after_fit)

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Merge: by now everything is restored, under every strategy."""
        self._begin()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Merge, unless that is done, and switch dropout and the like off."""
        check_stream(trainer, self.tasks, loaded=True)
        self._begin()
        self._overrides.evaluation_mode([pl_module, *self._head_modules])

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Turn the contracted gradient into that of the coefficients, or drop the step."""
        assert self._learning is not None
        if not self._learning.gradient():
            self.bad_steps += 1
            pl_module.log("adamerging/bad_steps", float(self.bad_steps))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the module merged and otherwise as it was."""
        if stage == "fit" and self._learning is not None:
            self._after_fit = self.learned()  # a guard may have gone back at the end
        self._undo()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave the module merged and otherwise as it was."""
        self._undo()

    # --- inside -------------------------------------------------------------------------------------------------------

    def _make_scalars(self) -> Any:
        given = self._given_scalars
        if given is not None:
            return given if isinstance(given, nn.Module) else given(self.task_vectors)
        return Coefficients(self.task_vectors.names, sorted(self.task_vectors.tensor_names), **self._coefficients)

    def _configure_optimizers(self) -> Any:
        module, trainer = self._running()
        self._names_of(module)
        strategies.house(trainer, module, self.scalars, self._overrides)
        return self._make_optimizer()

    def _make_optimizer(self) -> Any:
        parameters = [parameter for parameter in self.scalars.parameters() if parameter.requires_grad]
        if self._optimizer is not None:
            optimizer = self._optimizer(parameters)
        else:
            optimizer = torch.optim.Adam(parameters, lr=self.learning_rate, weight_decay=self.weight_decay)
        if self._lr_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self._lr_scheduler(optimizer), "interval": "step"},
        }

    def _training_step(self, batch: Mapping[str, Any]) -> Tensor:
        assert self._learning is not None
        module, trainer = self._running()
        keep_evaluation(module)
        batches = {task: batch[task] for task in self.tasks if batch.get(task) is not None}
        loss = self._learning.losses(batches, trainer.accumulate_grad_batches)
        self.last = self._learning.last
        for name, values in self.last.items():
            for task, value in values.items():
                module.log(f"adamerging/{name}/{task}", value, on_step=True, on_epoch=False)
            module.log(f"adamerging/{name}", sum(values.values()) / len(values), on_step=True, prog_bar=True)
        return loss


def _heads(heads: Mapping[str, nn.Module | str] | None) -> dict[str, nn.Module] | None:
    """Read the heads that are files."""
    if heads is None:
        return None
    from lightning_merge.modules.heads import load_head

    return {task: load_head(head)[0] if isinstance(head, (str, os.PathLike)) else head for task, head in heads.items()}
