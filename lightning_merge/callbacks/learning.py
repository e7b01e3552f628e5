"""One step of learning a merge: the losses of all tasks, the gradient of what is learned, the merge written anew.

Nothing here knows a trainer; AdaMerging runs it inside ``fit`` or on the stream of ``test`` and ``predict``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_merge import strategies
from lightning_merge.adaptation import Individuals
from lightning_merge.callbacks.answers import check_outputs
from lightning_merge.errors import UserError
from lightning_merge.merged_weights import MergedWeights
from lightning_merge.objectives import Objective, Outputs


class Learning:
    """What is learned in a module that is merged.

    Args:
        merged: The merged module.
        tasks: All tasks, in an order that is the same in all processes.
        objectives: What is minimised: their weighted sum, averaged over the tasks.
        answer: The module's answer for a task and a batch.
        individuals: Those of the individual models.
        method: How the answering method is called, for messages.
        max_bad_steps: After how many steps in a row that were not finite to give up.

    Attributes:
        last: The last losses, ``{objective: {task: loss}}``, averaged over processes.
        bad_steps: Steps that were dropped because a loss or gradient was not finite.
    """

    def __init__(
        self,
        merged: MergedWeights,
        tasks: Sequence[str],
        objectives: Sequence[Objective],
        answer: Callable[[str, Any], Outputs],
        individuals: Individuals,
        method: str,
        max_bad_steps: int,
    ) -> None:
        self.merged, self.tasks, self.objectives = merged, tuple(tasks), objectives
        self._scalars: Any = merged.scalars
        self._answer, self._individuals = answer, individuals
        self._method, self._most = method, max_bad_steps
        self._needs: frozenset[str] = frozenset().union(*(objective.needs for objective in objectives))
        self.last: dict[str, dict[str, float]] = {}
        self.bad_steps = 0
        self._bad_in_a_row = 0
        self._bad_tasks: list[str] = []
        self._written = self._version()

    def losses(self, batches: Mapping[str, Any], divide: int = 1) -> Tensor:
        """Return the loss over all tasks, of which only the last task's part is still to go backward.

        The other tasks have gone backward, so that the activations of one task live at a time; the gradients of the
        weights add up and are contracted once, in the last backward. Each task counts alike, and so does each process
        that has a batch of it.

        Args:
            batches: A batch for each task, or for some of them.
            divide: What the caller divides the loss by before its backward: batches that are accumulated.

        Raises:
            UserError: A process has a batch of no task; or not all have batches of the same ones, and the module is
                sharded.
        """
        if self._written != self._version():  # an optimizer that asks for several losses a step
            self.materialise()
        tasks = list(batches)
        having = self._having(tasks)
        processes, present = strategies.processes(), sum(number > 0 for number in having.values())
        self.merged.keep_gradients = True
        terms: list[Tensor] = []
        total: Tensor | float = 0.0
        for task in tasks:
            values, loss = self._terms(task, batches[task])
            # Gradients are averaged over all processes, also over those without a batch of this task.
            loss = loss * (processes / having[task]) / present
            terms.append(values)
            if task == tasks[-1]:
                break
            total = total + loss.detach()
            # Backward is not meant to run under autocast: it takes the dtypes of its forward.
            with torch.autocast(loss.device.type, enabled=False):
                (loss / divide).backward()
        self.merged.keep_gradients = False
        self._note(having, dict(zip(tasks, terms, strict=True)))
        return loss + total

    def gradient(self) -> bool:
        """Turn what was contracted into the gradient of what is learned; or drop it, where something is not finite.

        Returns:
            Whether there is a gradient; without one an optimizer leaves parameters, and what it remembers, alone.

        Raises:
            UserError: As many steps in a row were dropped as are borne with; names the task.
        """
        self.merged.backward()
        penalty = self._scalars.penalty() if hasattr(self._scalars, "penalty") else None
        if penalty is not None and penalty.requires_grad:
            penalty.backward()
        finite = all(bool(p.grad.isfinite().all()) for p in self._scalars.parameters() if p.grad is not None)
        tasks, self._bad_tasks = self._bad_tasks, []
        if finite and not tasks:
            self._bad_in_a_row = 0
            return True
        for parameter in self._scalars.parameters():
            parameter.grad = None
        self.bad_steps += 1
        self._bad_in_a_row += 1
        if self._bad_in_a_row >= self._most:
            where = f"the loss of the task '{tasks[0]}'" if tasks else "the gradient of the coefficients"
            raise UserError(
                f"AdaMerging: {where} was NaN or infinite in {self._bad_in_a_row} steps in a row (max_bad_steps). "
                "Expected finite logits: look at that task's batches and head, or lower the learning rate."
            )
        return False

    def materialise(self) -> None:
        """Write the merge as it is learned now."""
        self.merged.materialise()
        self._written = self._version()

    def close(self) -> None:
        """Leave the module merged, without hooks."""
        # Whatever has interrupted the run may have done so while weights were being written.
        try:
            self.materialise()
        finally:
            self.merged.detach()

    def _terms(self, task: str, batch: Any) -> tuple[Tensor, Tensor]:
        """Return the terms of one task, without gradient, and their weighted sum."""
        # First, because it writes other weights than those that a forward pass has remembered.
        individual = self._individuals(task, batch) if "individual" in self._needs else None
        outputs = self._answer(task, batch)
        outputs.individual = individual
        check_outputs(outputs, self._needs, self._method)
        terms = torch.stack([objective(outputs).float() for objective in self.objectives])
        weights = torch.tensor([objective.weight for objective in self.objectives], device=terms.device)
        return terms.detach(), (terms * weights.to(terms.dtype)).sum()

    def _having(self, tasks: Sequence[str]) -> dict[str, int]:
        """Return how many processes have a batch of each task, the same everywhere; what cannot work all refuse."""
        here = [float(task in tasks) for task in self.tasks]
        counted = torch.tensor([*here, float(not tasks)], device=self.merged.device)
        *counts, without = (round(number) for number in strategies.sum_over_processes(counted).tolist())
        if without:
            raise UserError("A batch of the stream holds no task. Expected one with a batch for each task.")
        having = dict(zip(self.tasks, counts, strict=True))
        uneven = [task for task, number in having.items() if 0 < number < strategies.processes()]
        if uneven and self.merged.sharded:
            raise UserError(
                f"Only {having[uneven[0]]} of {strategies.processes()} processes have a batch of the task "
                f"'{uneven[0]}', and a sharded module answers in all of them together. Expected loaders that give "
                "each process equally many batches of a task."
            )
        return having

    def _note(self, having: Mapping[str, int], terms: Mapping[str, Tensor]) -> None:
        """Keep the terms, averaged over the processes that have the task, and the tasks whose loss is not finite."""
        tasks = [task for task, number in having.items() if number]
        none = torch.zeros_like(next(iter(terms.values())))
        summed = strategies.sum_over_processes(torch.stack([terms.get(task, none) for task in tasks]))
        counts = torch.tensor([float(having[task]) for task in tasks], device=summed.device)
        values = (summed / counts[:, None]).t().tolist()
        names = [objective.name for objective in self.objectives]
        self.last = {name: dict(zip(tasks, row, strict=True)) for name, row in zip(names, values, strict=True)}
        for row in values:
            bad = [task for task, value in zip(tasks, row, strict=True) if not math.isfinite(value)]
            self._bad_tasks += [task for task in bad if task not in self._bad_tasks]

    def _version(self) -> int:
        """Tell one state of what is learned from the next; whoever changes it writes in place."""
        return sum(parameter._version for parameter in self._scalars.parameters())


def keep_evaluation(module: nn.Module) -> None:
    """Switch dropout off and BatchNorm to its statistics again where a hook of the module has said otherwise.

    Raises:
        UserError: BatchNorm is in training mode: it has changed its statistics, or will.
    """
    if not any(part.training for part in module.modules()):
        return
    for name, part in module.named_modules():
        if part.training and isinstance(part, nn.modules.batchnorm._BatchNorm):
            raise UserError(
                f"'{name}' ({type(part).__name__}) of {type(module).__name__} is in training mode: batches would move "
                "its statistics, which the merge does not learn. Expected evaluation mode: no .train() in the "
                "module's hooks while it is adapted."
            )
    module.eval()
