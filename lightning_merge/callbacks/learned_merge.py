"""What a callback that learns a merge has in common with any other: its answers, its beginning and end, its state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import lightning as L
from torch import Tensor, nn

from lightning_merge.adaptation import Individuals, Remember
from lightning_merge.callbacks.answers import Answers
from lightning_merge.callbacks.checks import check_ignored, check_module
from lightning_merge.callbacks.learning import Learning
from lightning_merge.callbacks.overrides import Overrides
from lightning_merge.callbacks.provenance import provenance, refuse_other
from lightning_merge.errors import UserError
from lightning_merge.merged_weights import MergedWeights
from lightning_merge.objectives import Objective, Outputs
from lightning_merge.task_vectors import TaskVectors


class LearnedMerge(L.Callback):
    """A merge that is learned in a user's module, between the start of a run and its end.

    What it learns, on what and when is a subclass's; see :class:`lightning_merge.callbacks.AdaMerging`.

    Attributes:
        task_vectors: The models over their base.
        models: The model of each task.
        scalars: What is learned; ``None`` before the first run.
        merged: The merged weights of the module, while a run lasts.
        last: The last losses, ``{objective: {task: loss}}``.
        bad_steps: Steps that were dropped because a loss or gradient was not finite.
    """

    def __init__(
        self,
        task_vectors: TaskVectors,
        models: Mapping[str, str],
        answers: Answers,
        objectives: Sequence[Objective],
        ignore: Sequence[str],
        names: Mapping[str, str] | None,
        prefix: str | None,
        weights: Mapping[str, Any],
        individuals: Remember,
        max_bad_steps: int,
    ) -> None:
        self.task_vectors, self.models = task_vectors, dict(models)
        self.objectives, self.ignore = list(objectives), tuple(ignore)
        self.max_bad_steps = max_bad_steps
        self.scalars: Any = None
        self.merged: MergedWeights | None = None
        self.last: dict[str, dict[str, float]] = {}
        self.bad_steps = 0
        self._answers = answers
        self._names, self._prefix, self._weights = names, prefix, dict(weights)
        self._found_names: dict[str, str] | None = None
        self._remember: Remember = individuals
        self._learning: Learning | None = None
        self._overrides = Overrides()
        self._module: L.LightningModule | None = None
        self._trainer: L.Trainer | None = None
        self._of: dict[str, Any] | None = None

    # --- what guards, logs and plots ask: lightning_merge.adaptation.Adaptation ------------------------------------

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks, which are the keys of the stream."""
        return tuple(self.models)

    def answer(self, task: str, batch: Any) -> Outputs:
        """Return what the module answers now for one batch of one task; gradients as the caller has set them."""
        module, trainer = self._running()
        with trainer.precision_plugin.forward_context():
            return self._answers(module, task, batch)

    @contextmanager
    def individual(self, task: str) -> Iterator[None]:
        """Inside, :meth:`answer` is that of the task's own fine-tuned model."""
        self._running()
        assert self.merged is not None
        with self.merged.individual(self.models[task]):
            yield

    def learned(self) -> dict[str, Tensor]:
        """Return a copy of everything that is learned, on the host."""
        return {name: value.detach().cpu().clone() for name, value in self._known().state_dict().items()}

    def restore(self, learned: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`learned` gave; the module answers accordingly at once."""
        self._known().load_state_dict(learned)
        if self._learning is not None:
            self._learning.materialise()

    def drift(self) -> float:
        """Return how far the coefficients have moved from their start, root mean square."""
        return self._known().drift()

    def table(self) -> dict[str, dict[str, float]]:
        """Return the coefficients by model and group."""
        return self._known().table()

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse to go on from a checkpoint of something else."""
        if trainer.state.fn == "fit":
            self._refuse_other_checkpoint(checkpoint)

    def state_dict(self) -> dict[str, Any]:
        """Return what is learned, and of what; nothing of the task vectors."""
        if self.scalars is None:
            return {}
        writes = self._trainer is None or self._trainer.is_global_zero  # the others need not hash models
        of = self._provenance() if writes else None
        return {"learned": self.learned(), "of": of, "bad_steps": self.bad_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what was learned."""
        if self.scalars is not None:
            refuse_other(self._provenance(), state_dict["of"])
            self.scalars.load_state_dict(state_dict["learned"])
            self.bad_steps = state_dict["bad_steps"]

    # --- inside -------------------------------------------------------------------------------------------------------

    def _known(self) -> Any:
        if self.scalars is None:
            raise UserError(
                "Nothing has been learned in this process. Expected a fit first; under a strategy that starts "
                "processes of its own, such as ddp_spawn, the coefficients are in the checkpoint."
            )
        return self.scalars

    def _running(self) -> tuple[L.LightningModule, L.Trainer]:
        if self._module is None or self._trainer is None:
            raise UserError("AdaMerging was asked outside of a run. Expected to be asked while its Trainer runs.")
        return self._module, self._trainer

    def _names_of(self, module: L.LightningModule) -> dict[str, str]:
        """Return the module's parameter for each tensor, checked once the module has them."""
        if self._found_names is None:
            covered = [*self._head_modules, self.scalars]
            names = check_module(module, self.task_vectors, covered, self.ignore, self._names, self._prefix)
            merged = [module.get_parameter(name) for name in names.values() if name in dict(module.named_parameters())]
            check_ignored(module, [*merged, *(p for part in covered for p in part.parameters())], self.ignore)
            self._found_names = names
        return self._found_names

    @property
    def _head_modules(self) -> list[nn.Module]:
        return list((self._answers.heads or {}).values())

    def _begin(self) -> None:
        """Write the merge into the module, freeze the rest of it and let gradients be contracted."""
        if self._learning is not None:
            return
        module, trainer = self._running()
        change = self._overrides
        heads = self._head_modules
        for head in heads:
            head.to(module.device)
        own = {id(parameter) for parameter in self.scalars.parameters()}
        change.freeze(p for part in (module, *heads) for p in part.parameters() if id(p) not in own)
        names = self._names_of(module)
        individuals = Individuals(self.answer, self.individual, self._remember)
        self.merged = MergedWeights(module, self.task_vectors, self.scalars, names=names, **self._weights)
        self.merged.attach()
        self._learning = Learning(
            self.merged, self.tasks, self.objectives, self.answer, individuals, self._answers.logits, self.max_bad_steps
        )
        change.later(self._end)
        for optimizer in trainer.optimizers:
            change.later(optimizer.register_step_post_hook(self._after_step).remove)

    def _after_step(self, *_: Any) -> None:
        if self._learning is not None:
            self._learning.materialise()

    def _end(self) -> None:
        assert self._learning is not None
        self._learning.close()
        self._learning = self.merged = None

    def _undo(self) -> None:
        self._overrides.undo()
        self._module = self._trainer = None

    def _provenance(self) -> dict[str, Any]:
        if self._of is None:
            self._of = provenance(self.task_vectors, self._weights["transforms"], self.scalars, self.objectives)
        return self._of

    def _refuse_other_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        state = (checkpoint.get("callbacks") or {}).get(self.state_key)
        if state is None:
            raise UserError(
                "The checkpoint was not written by a fit with AdaMerging: there are no coefficients in it. Expected "
                "one that was, or no ckpt_path: the base is read from the task vectors."
            )
        refuse_other(self._provenance(), state["of"])
