"""What several individual models answer for the batches of a step: each through its own head, on any task's inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from lightning_merge.adaptation import Remember
from lightning_merge.errors import UserError, unknown


class IndividualAnswers:
    """The individual models' logits for a batch of each task; each model takes the merge's place once in a step.

    Args:
        ask: ``(task, batch, head)`` to logits: what the module as it stands answers for a batch of one task through
            the head of another, or its own.
        individual: Makes the module the model of a task, as :meth:`lightning_merge.adaptation.Adaptation.individual`.
        tasks: The tasks, which are also those of models and heads.
        across: Ask every model about every task's inputs, not only about its own.
        remember: ``computed`` asks at each step; ``cached`` keeps each row's logits on the host: rows are known by the
            batch's ``index``.

    Raises:
        UserError: An unknown mode; ``cached`` and a batch without ``index``.

    Cost: T models read and T forward passes a step, or T² across tasks; cached, in the first epoch only, and 4 · C
        bytes for each row, times T across tasks.
    """

    def __init__(
        self,
        ask: Callable[[str, Any, str], Tensor],
        individual: Callable[[str], AbstractContextManager[None]],
        tasks: Sequence[str],
        across: bool = False,
        remember: Remember = "computed",
    ) -> None:
        if remember not in ("computed", "cached"):
            raise unknown("way to remember individual answers", str(remember), ("computed", "cached"))
        self._ask, self._individual, self.tasks = ask, individual, tuple(tasks)
        self.across, self.remember = across, remember
        # By the batch's task and the model's: a row's logits by its number.
        self._known: dict[tuple[str, str], dict[int, Tensor]] = {}

    def __call__(self, batches: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
        """Return, by the batch's task and the model's task, logits without gradient; a batch's own model comes first.

        Args:
            batches: A batch for each task, or for some.
        """
        found: dict[str, dict[str, Tensor]] = {task: {} for task in batches}
        for model in self.tasks:
            asked = {task: batch for task, batch in batches.items() if self.across or task == model}
            new = {task: batch for task, batch in asked.items() if not self._knows(task, model, batch)}
            if new:
                with torch.no_grad(), self._individual(model):
                    for task, batch in new.items():
                        found[task][model] = self._ask(task, batch, model).detach()
            if self.remember == "cached":
                for task, batch in asked.items():
                    found[task][model] = self._remembered(task, model, batch, found[task].get(model))
        return {task: {task: answers.pop(task), **answers} for task, answers in found.items()}

    def _knows(self, task: str, model: str, batch: Any) -> bool:
        if self.remember == "computed":
            return False
        known = self._known.setdefault((task, model), {})
        return all(row in known for row in _rows(batch))

    def _remembered(self, task: str, model: str, batch: Any, logits: Tensor | None) -> Tensor:
        known, rows = self._known[task, model], _rows(batch)
        if logits is not None:
            known.update(zip(rows, logits.float().cpu().unbind(), strict=True))
            return logits
        index = batch["index"]
        return torch.stack([known[row] for row in rows]).to(index.device if isinstance(index, Tensor) else "cpu")


def _rows(batch: Any) -> list[int]:
    index = batch.get("index") if isinstance(batch, Mapping) else None
    if index is None:
        raise UserError(
            "Individual answers are cached by row, and the batch has no 'index'. Expected batches with "
            "{'index': row numbers}, or remember='computed'."
        )
    return [int(row) for row in index]
