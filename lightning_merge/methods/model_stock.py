"""Model Stock (Jang et al., 2024, arXiv 2403.19522).

Fine-tuned models of one base lie on a thin shell around a centre that does better than any of them. The angle between
them, seen from the base, tells how far from the base towards their mean the point nearest to that centre lies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from lightning_merge.methods.gram import Array, Extent, TaskVectorGramMerge, cosines, norms


def interpolation_ratio(cosine: Array, count: int) -> Array:
    """Return t = N cos θ / (1 + (N − 1) cos θ), elementwise; 0 where the models' task vectors cancel."""
    rest = 1 + (count - 1) * cosine
    return np.divide(count * cosine, rest, out=np.zeros_like(cosine), where=np.abs(rest) >= 1e-6)


def mean_cosine(cosine: Array) -> Array:
    """Return the mean over all pairs, ``(N, N, R)`` to ``(R,)``."""
    first, second = np.triu_indices(len(cosine), 1)
    mean: Array = cosine[first, second].mean(axis=0)
    return mean


@dataclass(frozen=True)
class ModelStock(TaskVectorGramMerge):
    """Move from the base towards the mean of the models as far as the angle between their task vectors tells.

    θ = t · mean(θ_i) + (1 − t) · θ₀ with t = N cos θ / (1 + (N − 1) cos θ), and cos θ the mean over all pairs of task
    vectors, tensor by tensor. A task vector that is 0 counts as orthogonal to the others. With ``compat="mergekit"``
    the product of two norms counts as at least 1e-6 (equal models that moved little then stay near the base), t is
    never clamped, and a row is what lies along the last axis.

    Args:
        clamp: Keep t in [0, 1]; without it, models more than 90 degrees apart push beyond the base.
        per_row: An angle for each slice along the first axis instead of one for the tensor; a tensor of fewer than two
            axes is one row.
        compat: ``paper``, or ``mergekit`` for its constants and its rows.

    Cost: one pass over the base and the models for the inner products (none by row), one to combine.
    Reference: Jang et al., 2024, Model Stock, arXiv 2403.19522, equations 1 and 2 and appendix (N models); the paper
        merges anew after each epoch of fine-tuning, here the models are merged once.

    Example:
        >>> import torch
        >>> from lightning_merge import TaskVectors
        >>> base = {"weight": torch.tensor([1.0, 1.0])}
        >>> a = {"weight": torch.tensor([3.0, 1.0])}
        >>> b = {"weight": torch.tensor([2.0, 2.0])}
        >>> ModelStock()(TaskVectors.open(base, {"a": a, "b": b}, check=False))["weight"]  # 45 degrees: t = 0.83
        tensor([2.2426, 1.4142])
    """

    clamp: bool = True
    per_row: bool = False
    compat: Literal["paper", "mergekit"] = "paper"

    paper: ClassVar[str] = "Model Stock (Jang et al., 2024), arXiv 2403.19522"
    min_models: ClassVar[int] = 2

    @property
    def extent(self) -> Extent:
        """What one vector is."""
        if not self.per_row:
            return "tensor"
        return "last" if self.compat == "mergekit" else "row"

    def coefficients(self, gram: Array, models: Sequence[str]) -> Array:
        """Return t / N for every model."""
        count = len(gram)
        if self.compat == "mergekit":
            lengths = norms(gram)
            cosine = np.clip(gram / np.maximum(lengths[:, None] * lengths[None], 1e-6), -1, 1)
        else:
            cosine = cosines(gram)
        ratio = interpolation_ratio(mean_cosine(cosine), count)
        if self.clamp and self.compat == "paper":
            ratio = ratio.clip(0, 1)
        return np.broadcast_to(ratio / count, (count, len(ratio))).copy()
