"""The individual models of a merge distilled into it, on unlabeled data, in anybody's trainer.

This is plain knowledge distillation (Hinton et al., 2015, arXiv 1503.02531) with several teachers, and no merge method
of a paper: all weights are trained, there are no merging coefficients, and what comes out is no longer in the span of
the task vectors. The merge is where it starts.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from lightning_merge import strategies
from lightning_merge.adaptation import Remember
from lightning_merge.callbacks.answers import Answers, Part, check_outputs
from lightning_merge.callbacks.checks import check_stream
from lightning_merge.callbacks.individual_answers import IndividualAnswers
from lightning_merge.callbacks.learning import keep_evaluation
from lightning_merge.callbacks.overrides import Overrides, take_over
from lightning_merge.callbacks.whole_weights import carry_gradients, refuse_trainer, trainable
from lightning_merge.errors import UserError, unknown
from lightning_merge.individual_weights import IndividualWeights
from lightning_merge.objectives import Outputs
from lightning_merge.task_vectors import TaskVectors


class DistilledMerge(L.Callback):
    """Train all weights of a merged model, in ``fit``, to answer as the individual models do.

    The module holds any merge of the models when ``fit`` begins. For each task's unlabeled inputs it learns the answers
    of that task's own model and, with ``cross``, those of every other model through its own head: what a model knows
    outside its task's data is kept then, which own answers alone do not ask for. One static model comes out: nothing is
    added to it, and no task need be named that the merge does not have to be told.

    The training batch is ``{task: batch}``, as a dict of loaders gives it. While fitting, the module's
    ``training_step`` and ``configure_optimizers`` are replaced and it is in evaluation mode; this is undone afterwards,
    and after an exception. Trained is what the models' tensors cover and at least one model has changed; heads and all
    else are frozen. Checkpoints are the module's own and load strictly into it. Under ``ddp`` each process takes
    its own rows and gradients are averaged; sharded strategies are refused, since an individual model takes the merged
    one's place whole.

    Args:
        task_vectors: The individual models, read from their files one at a time.
        individuals: In place of ``task_vectors``: modules by task.
        logits: The module's method that maps a batch's inputs to logits ``(B, C)``, or to features where there are
            ``heads``. It is given the task as ``task=`` if it has a parameter of that name.
        heads: For each task what maps features to logits. They are not trained.
        ignore: Patterns of the module's parameters that stay as they are.
        inputs: Where the inputs stand in a batch: a position, a key, or a function; by default the first element of a
            tuple or list, else the batch itself.
        cross: Weight of the other models' answers, at least 0; their mean counts ``cross`` times as much as the own
            model's. It needs ``heads`` or a method that takes ``task``.
        temperature: Divides both logits, above 0.
        learning_rate: Of AdamW, above 0: all weights move, so it is that of a fine-tuning.
        weight_decay: Of AdamW, at least 0.
        optimizer: Makes another optimizer of the parameters.
        lr_scheduler: Makes a scheduler of the optimizer, stepped every batch; by default the rate warms up over a
            twentieth of the steps and falls as a cosine.
        remember: ``computed`` asks the individual models at each step; ``cached`` once for each row, which needs
            batches with ``index``.
        models: The model of each task whose name differs from it.
        prefix: See :func:`lightning_merge.correspondence.parameter_names`.

    Raises:
        UserError: A setting out of its range; in ``setup``, a strategy, precision or module that does not fit.

    Cost: the memory of a fine-tuning with AdamW, one individual model at a time, and a copy of the start on the host; a
        step is one forward and backward over all tasks' batches (with ``cross`` and without ``heads``, T of them), and
        what :class:`lightning_merge.callbacks.individual_answers.IndividualAnswers` costs.
    Reference: Hinton et al., 2015, Distilling the knowledge in a neural network, arXiv 1503.02531.

    Example::

        distilled = DistilledMerge(TaskVectors.open(base, {"cars": cars, "sun": sun}), "features", heads, cross=2.0)
        trainer = L.Trainer(max_epochs=1, limit_train_batches=60, callbacks=[distilled])
        trainer.fit(merged_module, {"cars": cars_loader, "sun": sun_loader})
    """

    def __init__(
        self,
        task_vectors: TaskVectors | None = None,
        logits: str = "forward",
        heads: Mapping[str, nn.Module] | None = None,
        ignore: Sequence[str] = (),
        *,
        individuals: Mapping[str, nn.Module] | None = None,
        inputs: Part = None,
        cross: float = 0.0,
        temperature: float = 1.0,
        learning_rate: float = 1e-4,
        weight_decay: float = 0.0,
        optimizer: Callable[[Iterable], Optimizer] | None = None,
        lr_scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        remember: Remember = "computed",
        models: Mapping[str, str] | None = None,
        prefix: str | None = None,
    ) -> None:
        source = task_vectors if individuals is None else individuals
        if source is None or (task_vectors is not None and individuals is not None):
            raise UserError("DistilledMerge needs the individual models: expected either task_vectors or individuals.")
        for name, value, fits, expected in (
            ("cross", cross, 0 <= cross < math.inf, "a number of at least 0"),
            ("temperature", temperature, 0 < temperature < math.inf, "a number above 0"),
            ("learning_rate", learning_rate, 0 < learning_rate < math.inf, "a number above 0"),
            ("weight_decay", weight_decay, 0 <= weight_decay < math.inf, "a number of at least 0"),
        ):
            if not fits:
                raise UserError(f"DistilledMerge: {name} is {value}. Expected {expected}.")
        if isinstance(ignore, str):
            raise UserError(f"DistilledMerge: ignore must be a list of patterns, got '{ignore}'.")
        if remember not in ("computed", "cached"):
            raise unknown("way to remember individual answers", str(remember), ("computed", "cached"))
        self._source: TaskVectors | Mapping[str, nn.Module] = source
        self.models = dict(models) if models is not None else {name: name for name in source}
        for model in self.models.values():
            if model not in source:
                raise unknown("individual model", model, list(source))
        self._answers = Answers(logits, None if heads is None else dict(heads), inputs)
        self.ignore, self.prefix = tuple(ignore), prefix
        self.cross, self.temperature, self.remember = cross, temperature, remember
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self._optimizer, self._lr_scheduler = optimizer, lr_scheduler
        # The last step's divergences, {"distillation" or "cross": {task: value}}.
        self.last: dict[str, dict[str, float]] = {}
        self.trained: dict[str, nn.Parameter] = {}
        self._start: dict[str, Tensor] | None = None
        self._module: L.LightningModule | None = None
        self._trainer: L.Trainer | None = None
        self._individual: IndividualWeights | None = None
        self._targets: IndividualAnswers | None = None
        self._overrides = Overrides()

    # --- what guards, logs and plots ask: lightning_merge.adaptation.Adaptation ------------------------------------

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks, which are the keys of the stream."""
        return tuple(self.models)

    @property
    def trained_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.trained.values())

    def answer(self, task: str, batch: Any) -> Outputs:
        """Return what the module answers now for one batch of one task; gradients as the caller has set them."""
        module = self._known()
        with self._precision():
            return self._answers(module, task, batch)

    @contextmanager
    def individual(self, task: str) -> Iterator[None]:
        """Inside, :meth:`answer` is that of the task's own fine-tuned model."""
        self._known()
        if task not in self.models:
            raise unknown("task", task, self.models)
        assert self._individual is not None
        with self._individual.individual(self.models[task]):
            yield

    def learned(self) -> dict[str, Tensor]:
        """Return a copy of all trained weights, on the host."""
        self._known()
        return {name: parameter.detach().to("cpu", copy=True) for name, parameter in self.trained.items()}

    @torch.no_grad()
    def restore(self, learned: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`learned` gave; the module answers accordingly at once."""
        self._known()
        for name, parameter in self.trained.items():
            parameter.copy_(learned[name])
        torch.clear_autocast_cache()

    @torch.no_grad()
    def drift(self) -> float:
        """Return how far the weights have moved from the merge, root mean square."""
        self._known()
        assert self._start is not None
        squares = [(p.float() - self._start[n].to(p)).square().sum().double() for n, p in self.trained.items()]
        return math.sqrt(float(torch.stack(squares).sum()) / self.trained_parameters)

    def table(self) -> dict[str, dict[str, float]]:
        """Return nothing: there are no coefficients."""
        return {}

    # --- a callback -------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what cannot work, and replace the module's training step and optimizers."""
        if stage != "fit":
            return
        self._overrides.undo()
        refuse_trainer(trainer, "DistilledMerge")
        self._answers.check(pl_module, self.tasks, frozenset())
        takes_task = "task" in inspect.signature(getattr(pl_module, self._answers.logits)).parameters
        if self.cross and self._answers.heads is None and not takes_task:
            raise UserError(
                f"DistilledMerge: cross is {self.cross}, and '{self._answers.logits}' of {type(pl_module).__name__} "
                "gives one answer whatever the task, which cannot be that of every model. Expected heads={task: head}, "
                "a method with a parameter 'task', or cross=0."
            )
        check_stream(trainer, self.tasks)
        self._start, self.last, self._individual, self.trained = None, {}, None, {}
        self._module, self._trainer = pl_module, trainer
        if not is_overridden("configure_model", pl_module):
            self._prepare()
        strategies.prepare(trainer, pl_module, self._overrides)
        take_over(pl_module, self._overrides, self.tasks, self._training_step, self._configure_optimizers)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Freeze what is not trained, and remember where the rest starts, once everything is restored."""
        check_stream(trainer, self.tasks, loaded=True)
        heads = list((self._answers.heads or {}).values())
        change = self._overrides
        change.evaluation_mode([pl_module, *heads])
        for head in heads:
            head.to(pl_module.device)
        trained = {id(parameter) for parameter in self.trained.values()}
        change.freeze(p for part in (pl_module, *heads) for p in part.parameters() if id(p) not in trained)
        for parameter in self.trained.values():
            change.later(parameter.requires_grad_, parameter.requires_grad)
            change.later(setattr, parameter, "grad", None)
            parameter.requires_grad_(True)
        if self._start is None:
            self._start = self.learned()
        elif {n: v.shape for n, v in self._start.items()} != {n: p.shape for n, p in self.trained.items()}:
            raise UserError(
                f"The checkpoint is of a distillation of {len(self._start)} tensors, here {len(self.trained)} are "
                "trained, or others. Expected the same models and the same 'ignore'."
            )
        self._targets = IndividualAnswers(self._ask, self.individual, self.tasks, self.cross > 0, self.remember)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Undo everything but what was learned."""
        self._undo()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Undo everything but what was learned."""
        if stage == "fit":
            self._undo()

    def state_dict(self) -> dict[str, Any]:
        """Return the weights of the start; what they have become is the module's own state."""
        return {} if self._start is None else {"start": self._start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the start."""
        self._start = state_dict.get("start")

    # --- inside -----------------------------------------------------------------------------------------------------

    def _training_step(self, batch: Mapping[str, Any]) -> Tensor:
        """Return a loss whose gradient is that of all tasks' losses, of which one at a time was held in memory."""
        module = self._known()
        assert self._targets is not None
        keep_evaluation(module)
        batches = {task: batch[task] for task in self.tasks if batch.get(task) is not None}
        if not batches:
            raise UserError("A batch of the stream holds no task. Expected one with a batch for each task.")
        # First, because other weights take the place of those that a forward pass remembers.
        targets = self._targets(batches)
        gradients: dict[str, Tensor] = {}
        own: list[Tensor] = []
        others: list[Tensor] = []
        for task, part in batches.items():
            terms = self._learn(task, part, targets[task], gradients, 1.0 / len(batches))
            own.append(terms.pop(task))
            others.append(torch.stack(list(terms.values())).mean() if terms else torch.zeros_like(own[-1]))
        values = strategies.mean_over_processes(torch.stack([torch.stack(own), torch.stack(others)]))
        if not bool(values.isfinite().all()):
            bad = next(task for task, column in zip(batches, values.t(), strict=True) if not column.isfinite().all())
            raise UserError(
                f"DistilledMerge: the loss of the task '{bad}' is NaN or infinite. Expected finite logits: look at "
                "that task's batches and head, or lower the learning rate."
            )
        for name, row in zip(("distillation", "cross") if self.cross else ("distillation",), values, strict=False):
            self.last[name] = dict(zip(batches, row.tolist(), strict=True))
            module.log(f"distilled/{name}", row.mean(), on_step=True, on_epoch=False, prog_bar=True)
            for task, value in self.last[name].items():
                module.log(f"distilled/{name}/{task}", value, on_step=True, on_epoch=False)
        return carry_gradients((values[0] + self.cross * values[1]).mean(), self.trained, gradients)

    def _learn(
        self, task: str, batch: Any, targets: Mapping[str, Tensor], gradients: dict[str, Tensor], share: float
    ) -> dict[str, Tensor]:
        """Add the gradient of one task's loss, and return its divergences by the model that was asked."""
        terms: dict[str, Tensor] = {}
        # One forward pass gives features for all heads; otherwise each answer is one of its own.
        for heads in [list(targets)] if self._answers.heads is not None else [[head] for head in targets]:
            answers = self._ask_all(task, batch, heads)
            loss: Any = 0.0
            for head, logits in answers.items():
                check_outputs(Outputs(task, logits), frozenset({"logits"}), self._answers.logits)
                terms[head] = divergence(logits, targets[head], self.temperature)
                loss = loss + terms[head] * (1.0 if head == task else self.cross / (len(targets) - 1))
                terms[head] = terms[head].detach()
            # Backward is not meant to run under autocast: it takes the dtypes of its forward.
            with torch.autocast(loss.device.type, enabled=False):
                found = torch.autograd.grad(loss * share, list(self.trained.values()), allow_unused=True)
            for name, gradient in zip(self.trained, found, strict=True):
                if gradient is not None:
                    gradients[name] = gradients[name].add_(gradient) if name in gradients else gradient
        return terms

    def _ask(self, task: str, batch: Any, head: str) -> Tensor:
        """Return the logits for a batch of one task through the head of another, or its own."""
        return self._ask_all(task, batch, [head])[head]

    def _ask_all(self, task: str, batch: Any, heads: Sequence[str]) -> dict[str, Tensor]:
        if self._answers.heads is None:
            return {head: self.answer(head, batch).logits for head in heads}  # type: ignore[misc]
        features = self.answer(task, batch).features
        with self._precision():
            return {head: self._answers.heads[head](features) for head in heads}

    def _precision(self) -> Any:
        return nullcontext() if self._trainer is None else self._trainer.precision_plugin.forward_context()

    def _prepare(self) -> None:
        """Find the parameters to train, once the module has them."""
        if self._individual is None:
            module, heads = self._known(), list((self._answers.heads or {}).values())
            self._individual = IndividualWeights(module, self._source, self.prefix)
            self.trained = trainable(module, self._source, heads, self.ignore, self.prefix)

    def _configure_optimizers(self) -> Any:
        self._prepare()
        parameters = list(self.trained.values())
        if self._optimizer is not None:
            optimizer = self._optimizer(parameters)
        else:
            optimizer = torch.optim.AdamW(parameters, lr=self.learning_rate, weight_decay=self.weight_decay)
        scheduler = self._schedule(optimizer) if self._lr_scheduler is None else self._lr_scheduler(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _schedule(self, optimizer: Optimizer) -> LRScheduler:
        assert self._trainer is not None
        steps = float(self._trainer.estimated_stepping_batches)
        return LambdaLR(optimizer, lambda step: warm_cosine(step, steps))

    def _known(self) -> L.LightningModule:
        if self._module is None:
            raise UserError("DistilledMerge was asked before a fit. Expected to be asked while its Trainer runs.")
        return self._module

    def _undo(self) -> None:
        self._overrides.undo()
        self._trainer = self._targets = None


def divergence(logits: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the Kullback-Leibler divergence of predictions from those of a teacher, mean over rows, times T²."""
    log_p, log_q = ((values.float() / temperature).log_softmax(-1) for values in (logits, target))
    return functional.kl_div(log_p, log_q, reduction="batchmean", log_target=True) * temperature**2


def warm_cosine(step: int, steps: float, warm: float = 0.05, least: float = 0.02) -> float:
    """Return the factor of a learning rate: a warm-up, then a cosine down to ``least``; 1 where there is no end."""
    if not math.isfinite(steps):
        return 1.0
    rise = min(1.0, (step + 1) / max(1.0, warm * steps))
    return max(least, rise * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))
