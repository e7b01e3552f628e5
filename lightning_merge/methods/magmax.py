"""MagMax (Marczak et al., 2024, arXiv 2407.06322): of each entry, the task vector that moved it furthest."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_merge.methods.base import PerTensor, TensorMerge, hyperparameter
from lightning_merge.tensor_view import TensorView, add_delta


def put_where(chosen: Tensor, value: Tensor, where: Tensor) -> Tensor:
    """Put entries of ``value`` into ``chosen``, in place and bit for bit, where the integer mask ``where`` is 1, not 0.

    Args:
        chosen: ``(n,)``, changed.
        value: ``(n,)`` of the same dtype.
        where: ``(n,)`` as integers of the same width, changed; see :func:`mask_for`.
    """
    # On patterns: torch.where and masked copies take six times as long where the mask is random.
    patterns = chosen.view(where.dtype)
    changed = torch.bitwise_xor(patterns, value.contiguous().view(where.dtype))
    patterns ^= changed.bitwise_and_(where.neg_())
    return chosen


def mask_for(values: Tensor) -> Tensor:
    """Return an empty integer mask for a comparison to be written into (``out=``), as wide as the values."""
    return torch.empty(values.shape, dtype=torch.int64 if values.dtype == torch.float64 else torch.int32)


def of_largest_change(deltas: Iterable[Tensor], values: Iterable[Tensor]) -> Tensor:
    """Return, entry by entry, the value of the model with the largest |τ_t|; of equal ones the first.

    Args:
        deltas: T rows ``(n,)`` that are compared.
        values: T rows ``(n,)`` from which entries are taken.
    """
    chosen: Tensor | None = None
    largest = torch.empty(0)
    for delta, value in zip(deltas, values, strict=True):
        magnitude = delta.abs()
        if chosen is None:
            chosen, largest = value.clone(), magnitude
            continue
        put_where(chosen, value, torch.gt(magnitude, largest, out=mask_for(chosen)))
        torch.maximum(largest, magnitude, out=largest)
    assert chosen is not None
    return chosen


@dataclass(frozen=True)
class MagMax(TensorMerge):
    """Take each entry from the task vector that changed it most: θ₀ + λ · τ_{argmax |τ_t|}.

    Of equal magnitudes the first model by name stays. With scale 1 an entry is the chosen model's own, bit for bit.

    Args:
        scale: λ, in [-100, 100]; 0.5 by default, as in the authors' scripts.

    Cost: one pass over the base and the models.
    Reference: Marczak et al., 2024, MagMax: Leveraging Model Merging for Seamless Continual Learning,
        arXiv 2407.06322.

    Example:
        >>> import torch
        >>> from lightning_merge import TaskVectors
        >>> base = {"weight": torch.tensor([1.0, 2.0, 3.0, 4.0])}
        >>> a = {"weight": torch.tensor([1.5, 2.0, 3.25, 3.0])}
        >>> b = {"weight": torch.tensor([0.75, 3.0, 3.5, 4.0])}
        >>> task_vectors = TaskVectors.open(base, {"a": a, "b": b})
        >>> MagMax(scale=1)(task_vectors)["weight"]
        tensor([1.5000, 3.0000, 3.5000, 3.0000])
    """

    scale: PerTensor = hyperparameter(0.5, "[-100, 100]")

    paper: ClassVar[str] = "MagMax (Marczak et al., 2024), arXiv 2407.06322"
    device_ready: ClassVar[bool] = True

    def apply(self, view: TensorView, context: Any) -> Tensor:
        """Return θ₀ + λ · the largest change, or with λ = 1 the entry of the model that made it."""
        if self.scale == 1:
            return of_largest_change(view.deltas, view.finetuned)
        return add_delta(view.base, of_largest_change(view.deltas, view.deltas).mul_(self.scale))
