"""Consensus merging (Wang et al., 2024, arXiv 2405.07813): leave out what no task, or only one, makes use of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_merge.errors import UserError
from lightning_merge.methods.base import (
    PerModel,
    PerTensor,
    TensorMerge,
    hyperparameter,
    ordered_sum,
    per_model,
    take_selected,
)
from lightning_merge.methods.tall_mask import tall_mask
from lightning_merge.tensor_view import TensorView, add_delta


def count_masks(deltas: Tensor, total: Tensor, thresholds: Sequence[float]) -> Tensor:
    """Count, entry by entry, the tasks whose TALL-mask holds it; ``(T, n)`` to ``(n,)``."""
    count = torch.zeros_like(total)
    for delta, threshold in zip(deltas, thresholds, strict=True):
        count += tall_mask(delta, total, threshold)
    return count


@dataclass(frozen=True)
class Consensus(TensorMerge):
    """Add the sum of the task vectors where at least k tasks' TALL-masks hold: θ₀ + λ · [Σ_t m_t ≥ k] ⊙ Σ τ.

    An entry that no mask holds is catastrophic, one that a single mask holds selfish; k = 2 drops both.

    Args:
        k: How many tasks must use an entry, in [0, 1000]; 2 in the paper. 1 drops catastrophic entries only, 0 none,
            which is task arithmetic.
        threshold: λ_t of the masks, for all models or one for each by name, in [0, 100]; 0.4 by default, the paper's
            grid is 0.2 to 0.6, chosen for each task on validation data.
        scale: λ, in [-100, 100]; chosen on validation data in the paper. 0.3 by default, as in task arithmetic.

    Raises:
        UserError: k is more than there are models: nothing would be merged.

    Cost: one pass over the base and the models.
    Reference: Wang et al., 2024, Localizing Task Information for Improved Model Merging and Compression,
        arXiv 2405.07813, section 5.

    Example:
        >>> import torch
        >>> from lightning_merge import TaskVectors
        >>> base = {"weight": torch.tensor([1.0, 2.0, 3.0, 4.0])}
        >>> a = {"weight": torch.tensor([1.5, 2.0, 3.25, 3.0])}
        >>> b = {"weight": torch.tensor([0.75, 3.0, 3.5, 4.0])}
        >>> task_vectors = TaskVectors.open(base, {"a": a, "b": b})
        >>> Consensus(scale=1)(task_vectors)["weight"]
        tensor([1.2500, 2.0000, 3.7500, 4.0000])
    """

    k: int = hyperparameter(2, "[0, 1000]")
    threshold: PerModel = hyperparameter(0.4, "[0, 100]")
    scale: PerTensor = hyperparameter(0.3, "[-100, 100]")

    paper: ClassVar[str] = "Localizing Task Information (Wang et al., 2024), arXiv 2405.07813"
    device_ready: ClassVar[bool] = True

    def check_models(self, models: Sequence[str]) -> None:
        """Check the models, and that there are enough to agree."""
        super().check_models(models)
        if self.k > len(models):
            raise UserError(
                f"Consensus: k is {self.k}, but there are {len(models)} models, so that no entry would be merged. "
                f"Expected at most {len(models)}."
            )

    def apply(self, view: TensorView, context: Any) -> Tensor:
        """Return θ₀ + λ · the sum where enough masks hold."""
        deltas = view.deltas
        total = ordered_sum(deltas)
        count = count_masks(deltas, total, per_model("Consensus: threshold", self.threshold, view.models))
        merged = total.mul_(count.ge_(self.k))
        return take_selected(merged, view) if self.scale == 1 else add_delta(view.base, merged.mul_(self.scale))
