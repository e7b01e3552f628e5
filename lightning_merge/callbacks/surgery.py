"""Representation Surgery (arXiv 2402.02705) and SurgeryV2 (arXiv 2410.14389) in anybody's trainer.

The merged model stays as it is. For each task, correctors learn on unlabeled batches to bring its representations to
those of the task's individual model.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, Protocol

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_merge import strategies
from lightning_merge.adaptation import Individuals
from lightning_merge.callbacks.answers import Answers, Part
from lightning_merge.callbacks.checks import check_objects
from lightning_merge.callbacks.corrections import Corrections
from lightning_merge.callbacks.overrides import Overrides, take_over
from lightning_merge.errors import UserError, unknown
from lightning_merge.individual_weights import IndividualWeights
from lightning_merge.modules.blocks import correctable_blocks, feature_root
from lightning_merge.modules.corrected import CorrectionHooks
from lightning_merge.modules.correctors import FINAL, Correctors, surgery_loss
from lightning_merge.objectives import Outputs
from lightning_merge.task_vectors import TaskVectors


class GivesIndividuals(Protocol):
    """What can turn a live module into an individual model for a while: ``MergedWeights``, any ``Adaptation``."""

    def individual(self, model: str) -> AbstractContextManager[None]:
        """Inside, the module is that model."""


class Surgery(Corrections):
    """Train correctors of a merged model's representations in ``fit``; nothing else of the module is trained.

    The training batch is a dict ``{task: batch}``, as Lightning makes of a dict of loaders. While fitting, the
    module's ``training_step`` and ``configure_optimizers`` are replaced, it is in evaluation mode and frozen; all of
    this is undone afterwards, and after an exception. One optimizer step is taken per batch over all tasks: as no two
    tasks share a number, that is the same as a step for each task in turn. Validation during ``fit`` sees the merge
    without correctors, for no task is named there.

    At inference the task must be named: ``with surgery.task("cars"): module(images)``, or :meth:`activate`, which a
    further ``fit`` ends. A further ``fit`` of the same module goes on from the correctors that are there; on another
    module they begin anew.

    The correctors are the callback's own state: checkpoints load into the plain module, and a run goes on where it
    was. Under ``ddp`` each process takes its own rows and a task's gradients are averaged over the processes that have
    rows of it; sharded strategies are refused, since an individual model takes the merged one's place whole.
    Strategies that fork or spawn leave nothing in the process that called ``fit``: give ``path``.

    Args:
        task_vectors: The individual models, read from their files one at a time.
        individuals: In place of ``task_vectors``: modules by task, or what has ``individual(model)``.
        features: The module's part, or method, that gives the representation which heads take. ``(B, d)``.
        logits: The method that maps a task's inputs to logits, and calls ``features`` on the way; it gets ``task`` if
            it takes it. ``None`` calls ``features`` itself, with keywords where inputs are a dict and it is a part.
        heads: By task, what maps the method's answer to logits, where the method gives features.
        inputs: The inputs in a task's batch: a place, a key or a function; by default the first of a tuple or list,
            or else the whole batch.
        version: 1 corrects the representation; 2 also after every residual block, on all tokens.
        rank: Of each correction, at least 1 (the papers: 16).
        blocks: For version 2, the path of the list of blocks, or patterns; found in the module by default.
        learning_rate: Of Adam, above 0.
        optimizer: Makes another optimizer of the parameters.
        remember: ``computed`` asks the individual model at each batch; ``cached`` once for each row, which needs
            batches with ``index``.
        tasks: The tasks; by default the individual models' names.
        models: The model of each task whose name differs from it.
        prefix: See :func:`lightning_merge.correspondence.parameter_names`.
        path: A file, or folder, for the correctors at the end of ``fit``.
        seed: Of the correctors' first values.

    Raises:
        UserError: A setting out of its range; in ``setup``, a strategy, precision or module that does not fit.

    Cost: for each task and step one forward pass of the merge and one of the individual model, which is read first
    unless answers are cached; version 2 also a backward pass through the merge. Activations of one task at a time.
    """

    def __init__(
        self,
        task_vectors: TaskVectors | None = None,
        individuals: Mapping[str, nn.Module] | GivesIndividuals | None = None,
        features: str = "encoder",
        *,
        logits: str | None = "forward",
        heads: Mapping[str, nn.Module] | None = None,
        inputs: Part = None,
        version: Literal[1, 2] = 1,
        rank: int = 16,
        blocks: str | Sequence[str] | None = None,
        learning_rate: float = 1e-3,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
        remember: Literal["computed", "cached"] = "computed",
        tasks: Sequence[str] | None = None,
        models: Mapping[str, str] | None = None,
        prefix: str | None = None,
        path: str | os.PathLike[str] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(features)
        if version not in (1, 2):
            raise unknown("version of surgery", str(version), ("1", "2"))
        if not 0 < learning_rate < float("inf"):
            raise UserError(f"Surgery: learning_rate must be a positive number, got {learning_rate}.")
        if remember not in ("computed", "cached"):
            raise unknown("way to remember individual answers", str(remember), ("computed", "cached"))
        if (task_vectors is None) == (individuals is None):
            raise UserError("Surgery needs the individual models: expected either task_vectors or individuals.")
        self._source = task_vectors if task_vectors is not None else individuals
        names = list(self._source) if isinstance(self._source, Mapping) else []
        chosen = list(tasks or models or names)
        if not chosen:
            raise UserError("Surgery knows no tasks. Expected tasks=[...], where the individual models have no names.")
        self._models = {task: (models or {}).get(task, task) for task in chosen}
        for model in self._models.values():
            if names and model not in names:
                raise unknown("individual model", model, names)
        Correctors(chosen, rank=rank)  # checks both
        self.logits = logits
        self._answers = Answers(logits or "forward", heads, inputs)
        self.version, self.rank, self.blocks, self.seed = version, rank, blocks, seed
        self.learning_rate, self.optimizer, self.remember = learning_rate, optimizer, remember
        self.prefix, self.path = prefix, path
        # The last step's losses, by task.
        self.last: dict[str, dict[str, float]] = {}
        self._individual: GivesIndividuals | None = None
        self._targets: Individuals | None = None
        self._as_individual = False
        self._stored: dict[str, Tensor] | None = None
        # The module whose correctors are held; None where they have been loaded.
        self._fitted: nn.Module | None = None
        self._streamed: tuple[str, ...] = ()
        self._trainer: L.Trainer | None = None
        self._overrides = Overrides()

    # --- an adaptation --------------------------------------------------------------------------------------------

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks, which are the keys of the stream."""
        return self._streamed or tuple(self._models)

    def answer(self, task: str, batch: Any) -> Outputs:
        """What the corrected model answers for one batch of one task, with its representations."""
        hooks, module = self._ready(), self._module
        assert module is not None
        precision = self._trainer.precision_plugin.forward_context() if self._trainer is not None else nullcontext()
        active = None if self._as_individual else task
        with precision, hooks.attached(), hooks.on(active), hooks.recording() as record:
            logits = self._call(module, task, batch)
        missing = [site for site in hooks.correctors.sites if site not in record]
        if missing:
            what = f"'{self.features}'" if missing[0] == FINAL else f"the block '{missing[0]}'"
            raise UserError(
                f"{type(module).__name__}.{self.logits or self.features} did not call {what}, whose output surgery "
                "corrects. Expected features=... (or blocks=...) to name what it does call."
            )
        return Outputs(task, logits, record.pop(FINAL), self._answers.labels(batch), extra=dict(record))

    @contextmanager
    def individual(self, task: str) -> Iterator[None]:
        """Inside, :meth:`answer` is that of the task's own fine-tuned model, which has no correctors."""
        self._ready()
        if task not in self._models:
            raise unknown("task", task, self._models)
        assert self._individual is not None
        self._as_individual = True
        try:
            with self._individual.individual(self._models[task]):
                yield
        finally:
            self._as_individual = False

    # --- files ----------------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, path: str | os.PathLike[str], features: str | None = None) -> Surgery:
        """Read saved correctors, for inference: ``Surgery.load(path).activate("cars", module)``."""
        correctors = Correctors.load(path)
        surgery = cls(
            individuals={task: nn.Identity() for task in correctors.tasks},
            features=correctors.features if features is None else features,
            version=2 if correctors.version == 2 else 1,
            rank=correctors.rank,
        )
        surgery.correctors = correctors
        return surgery

    # --- a callback -----------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what cannot work, and replace the module's training step and optimizers."""
        if stage != "fit":
            return
        self._put_back()
        self.deactivate()
        _refuse(trainer)
        check_objects(trainer, pl_module, self)
        if not is_overridden("configure_model", pl_module):
            self._structure(pl_module)
        self._module, self._trainer = pl_module, trainer
        change = self._overrides
        strategies.prepare(trainer, pl_module, change)
        take_over(pl_module, change, self._models, self._training_step, self._configure_optimizers)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Freeze the module and put the hooks in their places, once everything is restored."""
        stream = getattr(trainer.train_dataloader, "iterables", trainer.train_dataloader)
        if not isinstance(stream, Mapping):
            raise UserError(
                f"The training data is one {type(stream).__name__}, and surgery learns from a batch of each task. "
                f"Expected a dict of loaders with keys among: {', '.join(self._models)}."
            )
        for key in stream:
            if key not in self._models:
                raise unknown("task of the training stream", str(key), self._models)
        self._streamed = tuple(stream)
        heads = list((self._answers.heads or {}).values())
        self._overrides.evaluation_mode([pl_module, *heads])
        self._overrides.freeze([p for part in (pl_module, *heads) for p in part.parameters()])
        for head in heads:
            head.to(pl_module.device)
        source = self._source
        if isinstance(source, Mapping):
            self._individual = IndividualWeights(pl_module, source, self.prefix)
        else:
            self._individual = source
        self._targets = Individuals(self.answer, self.individual, self.remember)
        hooks = self._ready()
        self._overrides.later(hooks.detach)
        hooks.attach()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the correctors where they were asked for."""
        if self.path is not None and trainer.is_global_zero:
            if self.correctors is not None and self.correctors.trained_tasks:
                self.save(self.path)
            else:
                rank_zero_warn(f"Surgery has seen no batch, and writes nothing to '{self.path}'.")
        trainer.strategy.barrier()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Undo everything."""
        self._put_back()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Undo everything."""
        if stage == "fit":
            self._put_back()

    def state_dict(self) -> dict[str, Any]:
        """Return the correctors."""
        return {} if self.correctors is None else {"correctors": self.correctors.learned()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the correctors until the module is there."""
        self._stored = state_dict.get("correctors")

    # --- inside ---------------------------------------------------------------------------------------------------

    def _training_step(self, batch: Any) -> Tensor:
        """Return a loss whose gradient is that of all tasks' losses, of which one at a time was held in memory."""
        module = self._module
        assert self._targets is not None and self.correctors is not None and isinstance(module, L.LightningModule)
        module.eval()  # a hook of the module may have said otherwise
        gradients: dict[str, Sequence[Tensor]] = {}
        losses: dict[str, Tensor] = {}
        rows = 0
        for task, part in batch.items():
            if part is None:  # a short stream of CombinedLoader's max_size
                continue
            target = self._targets(task, part)
            found = self.answer(task, part)
            assert found.features is not None
            rows += len(found.features)
            loss = surgery_loss(found, target)
            gradients[task] = torch.autograd.grad(loss, self.correctors.parameters_of(task))
            losses[task] = loss.detach()
        if not losses:
            raise UserError("A training batch held no task. Expected {task: batch}.")
        losses, gradients = _average(self.correctors, sorted(self.tasks), losses, gradients)
        values = torch.stack(list(losses.values()))
        mean = values.mean()
        self.last = {"surgery": dict(zip(losses, values.tolist(), strict=True))}
        for task, value in self.last["surgery"].items():  # of all processes: they stop together
            if not math.isfinite(value):
                raise UserError(f"The representations of task '{task}' are not finite. Expected finite weights.")
        module.log("surgery/loss", mean, prog_bar=True, batch_size=rows)
        module.log_dict({f"surgery/{task}": loss for task, loss in self.last["surgery"].items()}, batch_size=rows)
        terms = [
            (parameter * gradient).sum()
            for task in losses
            for parameter, gradient in zip(self.correctors.parameters_of(task), gradients[task], strict=True)
        ]
        bearer = torch.stack(terms).sum()
        return mean + (bearer - bearer.detach())

    def _configure_optimizers(self) -> Optimizer:
        """Make the correctors and their optimizer, when the module is there and their state has been read."""
        module = self._module
        assert isinstance(module, L.LightningModule)
        blocks = self._structure(module)
        made = Correctors(self._models, blocks, self.rank, self.seed, self.features)
        old = self.correctors
        same = self._fitted is None or self._fitted is module
        if old is not None and same and (old.tasks, old.sites, old.rank) == (made.tasks, made.sites, made.rank):
            made = old
        if self._stored is not None:
            made.restore(self._stored)
            self._stored = None
        self.correctors = made.to(module.device).requires_grad_(True)
        self.deactivate()
        self._fitted = module
        self._module, self._hooks = module, CorrectionHooks(module, self.features, made)
        if self.optimizer is not None:
            return self.optimizer(self.correctors.parameters())
        return torch.optim.Adam(self.correctors.parameters(), lr=self.learning_rate)

    def _structure(self, module: nn.Module) -> list[str]:
        """Check that the module has what was named, and return the blocks to correct."""
        feature_root(module, self.features)
        if self.logits is not None and not callable(getattr(module, self.logits, None)):
            raise unknown(f"method of {type(module).__name__} (logits=...)", self.logits, ("forward",))
        return correctable_blocks(module, self.features, self.blocks) if self.version == 2 else []

    def _call(self, module: nn.Module, task: str, batch: Any) -> Tensor | None:
        if self.logits is not None:
            return self._answers(module, task, batch).logits
        part, method = feature_root(module, self.features)
        inputs = self._answers.inputs(batch)
        if method is None and isinstance(inputs, Mapping):
            found = part(**inputs)
        else:
            call = part if method is None else getattr(module, method)
            takes_task = "task" in inspect.signature(part.forward if method is None else call).parameters
            found = call(inputs, task=task) if takes_task else call(inputs)
        return None if self._answers.heads is None else self._answers.heads[task](found)

    def _put_back(self) -> None:
        self._overrides.undo()
        self._trainer = self._targets = None
        if self.correctors is not None:
            self.correctors.requires_grad_(False)


def _refuse(trainer: Any) -> None:
    """Refuse trainers, strategies and precisions that surgery cannot work with."""
    if not isinstance(trainer, L.Trainer):
        raise UserError(
            f"Surgery is a callback of 'lightning', the Trainer is of '{type(trainer).__module__.split('.')[0]}'. "
            "Expected import lightning as L; L.Trainer."
        )
    strategies.check_trainer(trainer)
    if strategies.is_sharding(trainer):
        raise UserError(
            f"Surgery does not support {type(trainer.strategy).__name__}: an individual model takes the merged one's "
            "place whole. Expected strategy='auto' or 'ddp'."
        )


def _average(
    correctors: Correctors, tasks: Sequence[str], losses: dict[str, Tensor], gradients: dict[str, Sequence[Tensor]]
) -> tuple[dict[str, Tensor], dict[str, Sequence[Tensor]]]:
    """Average losses and gradients over the processes that had rows of a task, in one exchange.

    What is exchanged has all tasks in one order, zeros where a process had no rows; all of them then step equally.
    """
    known = next(iter(losses))  # the widths, which a task that is new here does not know, are the same for all
    like, zero = correctors.parameters_of(known), torch.zeros_like(losses[known])
    pieces = [torch.ones_like(zero) if task in losses else zero for task in tasks]
    pieces += [losses.get(task, zero) for task in tasks]
    pieces += [piece for task in tasks for piece in gradients.get(task) or map(torch.zeros_like, like)]
    flat = strategies.mean_over_processes(torch.cat([piece.reshape(-1) for piece in pieces]))
    parts = iter(flat.split([piece.numel() for piece in pieces]))
    shares, means = torch.cat([next(parts) for _ in tasks]).tolist(), [next(parts).squeeze(0) for _ in tasks]
    found: dict[str, Tensor] = {}
    averaged: dict[str, Sequence[Tensor]] = {}
    for task, share, loss in zip(tasks, shares, means, strict=True):
        mine = [next(parts).view_as(parameter) / share if share else next(parts) for parameter in like]
        if share:
            found[task], averaged[task] = loss / share, mine
            for site in correctors.sites:
                if not correctors.of(task, site).dim:
                    correctors.of(task, site).begin(correctors.of(known, site).dim, flat.device)
    return found, averaged
