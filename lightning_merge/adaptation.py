"""What learning on an unlabeled stream has in common, whatever is learned: answers, individual models, a state.

Guards, logs and plots ask these things of :class:`lightning_merge.callbacks.AdaMerging`, of a surgery, of a router.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from lightning_merge.errors import UserError, unknown
from lightning_merge.objectives import Outputs

Remember = Literal["computed", "cached"]


class Adaptation(Protocol):
    """Something that learns during ``fit`` and can be asked about, kept and put back."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks, which are the keys of the stream."""

    def answer(self, task: str, batch: Any) -> Outputs:
        """What the model answers now for one batch of one task; gradients as the caller has set them."""

    def individual(self, task: str) -> AbstractContextManager[None]:
        """Inside, :meth:`answer` is that of the task's own fine-tuned model."""

    def learned(self) -> dict[str, Tensor]:
        """A copy of everything that is learned, on the host."""

    def restore(self, learned: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`learned` gave; the model answers accordingly at once."""

    def drift(self) -> float:
        """How far what is learned has moved from its start: root mean square, 0 at the start."""

    def table(self) -> dict[str, dict[str, float]]:
        """What is learned as numbers by model (or task) and group, for logs and plots; empty where it is too much."""


class Individuals:
    """What the tasks' own fine-tuned models answer for batches of the stream, without holding T models.

    Args:
        answer: The model's answer for a batch, as :meth:`Adaptation.answer`.
        individual: Makes the model one of the individual ones, as :meth:`Adaptation.individual`.
        remember: ``computed`` asks the individual model at each batch. ``cached`` keeps features and logits of each
            row on the host and asks once: rows are known by the batch's ``index``.

    Raises:
        UserError: An unknown mode; ``cached`` and a batch without ``index``.

    Cost: computed, one model read, written and run for each task and step; cached, that in the first epoch, and
    4 · (d + C) bytes for each row.
    """

    def __init__(
        self,
        answer: Callable[[str, Any], Outputs],
        individual: Callable[[str], AbstractContextManager[None]],
        remember: Remember = "computed",
    ) -> None:
        if remember not in ("computed", "cached"):
            raise unknown("way to remember individual answers", str(remember), ("computed", "cached"))
        self._answer, self._individual, self.remember = answer, individual, remember
        self._known: dict[str, dict[int, dict[str, Tensor]]] = {}

    def __call__(self, task: str, batch: Any) -> Outputs:
        """Return the individual model's answer for a batch, detached."""
        if self.remember == "computed":
            return self._ask(task, batch)
        index = batch.get("index") if isinstance(batch, Mapping) else None
        if index is None:
            raise UserError(
                "Individual answers are cached by row, and the batch has no 'index'. Expected batches with "
                "{'index': row numbers}, or remember='computed'."
            )
        rows = [int(row) for row in index]
        known = self._known.setdefault(task, {})
        if any(row not in known for row in rows):
            found = self._ask(task, batch)
            for place, row in enumerate(rows):
                known[row] = {
                    name: values[place].float().cpu()
                    for name, values in (("logits", found.logits), ("features", found.features))
                    if values is not None
                }
                known[row] |= {name: values[place].float().cpu() for name, values in found.extra.items()}
        device = index.device if isinstance(index, Tensor) else "cpu"
        stacked = {name: torch.stack([known[row][name] for row in rows]).to(device) for name in known[rows[0]]}
        extra = {name: values for name, values in stacked.items() if name not in ("logits", "features")}
        return Outputs(task, stacked.get("logits"), stacked.get("features"), extra=extra)

    @torch.no_grad()
    def _ask(self, task: str, batch: Any) -> Outputs:
        with self._individual(task):
            found = self._answer(task, batch)
        detached = {name: values.detach() for name, values in found.extra.items() if isinstance(values, Tensor)}
        logits = None if found.logits is None else found.logits.detach()
        return Outputs(task, logits, None if found.features is None else found.features.detach(), extra=detached)
