"""TALL-masks (Wang et al., 2024, arXiv 2405.07813): find in the sum of all task vectors what one task needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_merge.errors import UserError, nearest
from lightning_merge.methods.base import PerTensor, TensorMerge, hyperparameter, ordered_sum, take_selected
from lightning_merge.tensor_view import TensorView


def tall_mask(delta: Tensor, total: Tensor, threshold: float) -> Tensor:
    """Return 1 where |τ_t| > λ |τ_mt − τ_t|: there the summed task vector is still about the task's own; else 0."""
    mask = (total - delta).abs_().mul_(threshold)
    return torch.gt(delta.abs(), mask, out=mask)


def position_of(owner: str, task: str, models: Sequence[str]) -> int:
    """Return the position of the one model that a setting ``task`` names.

    Raises:
        UserError: It names none of the models.
    """
    if task not in models:
        raise UserError(
            f"{owner}: task must name one of the models, got '{task}'. "
            f"Expected one of {', '.join(models)}.{nearest(str(task), models)}"
        )
    return list(models).index(task)


@dataclass(frozen=True)
class TallMask(TensorMerge):
    """Retrieve the model of one task from the sum of all task vectors: θ₀ + m_t ⊙ Σ τ.

    The mask m_t holds the entries where |τ_t| > λ |Σ τ − τ_t|. Stored for T tasks, that is one vector and T bitmaps.

    Args:
        task: Name of the model whose task is meant.
        threshold: λ, in [0, 100]; 0.4 by default, the paper's grid is 0.2 to 0.6, chosen for each task on validation
            data. A larger one keeps less; 0 keeps every entry that the task changed.

    Raises:
        UserError: ``task`` names none of the models.

    Cost: one pass over the base and the models.
    Reference: Wang et al., 2024, Localizing Task Information for Improved Model Merging and Compression,
        arXiv 2405.07813, section 4. (FusionBench compares |θ₀ − τ_t| where the paper has |τ_t|.)

    Example:
        >>> import torch
        >>> from lightning_merge import TaskVectors
        >>> base = {"weight": torch.tensor([1.0, 2.0, 3.0, 4.0])}
        >>> a = {"weight": torch.tensor([1.5, 2.0, 3.25, 3.0])}
        >>> b = {"weight": torch.tensor([0.75, 3.0, 4.0, 4.0])}
        >>> task_vectors = TaskVectors.open(base, {"a": a, "b": b})
        >>> TallMask(task="a", threshold=0.5)(task_vectors)["weight"]
        tensor([1.2500, 2.0000, 3.0000, 3.0000])
    """

    task: str = ""
    threshold: PerTensor = hyperparameter(0.4, "[0, 100]")

    paper: ClassVar[str] = "Localizing Task Information (Wang et al., 2024), arXiv 2405.07813"
    device_ready: ClassVar[bool] = True

    @property
    def reads_own_entries(self) -> bool:
        """Entries that equal one model's are that model's own."""
        return True

    def check_models(self, models: Sequence[str]) -> None:
        """Check the models, and that one of them is the task's."""
        super().check_models(models)
        position_of("TallMask", self.task, models)

    def apply(self, view: TensorView, context: Any) -> Tensor:
        """Return θ₀ + the masked sum."""
        position = view.models.index(self.task)
        total = ordered_sum(view.deltas)
        mask = tall_mask(view.deltas[position], total, self.threshold)
        return take_selected(total.mul_(mask), view, [position])
