"""NuSLERP: slerp of two weighted models, of weights or of task vectors, by tensor, row or column.

No paper; the method is mergekit's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from lightning_merge.errors import UserError
from lightning_merge.methods.base import PerModel, hyperparameter, per_model
from lightning_merge.methods.gram import Array, Extent, TaskVectorGramMerge, norms
from lightning_merge.methods.slerp import arc, slerp


@dataclass(frozen=True)
class NuSlerp(TaskVectorGramMerge):
    """Slerp between two models with a weight each: of their weights, or of their task vectors where a base is given.

    The second model by name stands at t = w₂ / (w₁ + w₂). ``along`` says what is one vector: the ``tensor``
    (mergekit's ``nuslerp_flatten: true``), each ``row``, a slice along the first axis (``nuslerp_flatten: false,
    nuslerp_row_wise: false``; theirs is inverted), or each ``column``, what lies across those slices
    (``nuslerp_flatten: false, nuslerp_row_wise: true``). A tensor of fewer than two axes is one vector. With
    ``compat="mergekit"`` a row of a tensor of more than two axes is what lies along its last axis, norms below 1e-7
    count as 1e-7, opposite vectors are interpolated linearly only where 1 − cos² ≤ 1e-16, and weights that sum to
    less than 1e-6 mean t = 0.5.

    Args:
        weights: One number for each model by name, in [-100, 100]; equal weights by default.
        along: What is one vector: ``tensor``, ``row`` or ``column``.
        compat: ``paper``, or ``mergekit`` for its constants and its rows.

    Raises:
        UserError: Weights that sum to 0.

    Cost: one pass over the models for the angles (none by row and by column), one to combine. By column, whole tensors
        of both models and the base are in memory.
    Reference: mergekit, merge method nuslerp; Shoemake, 1985, Animating rotation with quaternion curves.

    Example:
        >>> import torch
        >>> from lightning_merge import TaskVectors
        >>> base = {"weight": torch.tensor([1.0, 1.0])}
        >>> a = {"weight": torch.tensor([2.0, 1.0])}
        >>> b = {"weight": torch.tensor([1.0, 2.0])}
        >>> NuSlerp(weights={"a": 2, "b": 1})(TaskVectors.open(base, {"a": a, "b": b}, check=False))["weight"]
        tensor([1.8660, 1.5000])
    """

    weights: PerModel = hyperparameter(1.0, "[-100, 100]")
    along: Literal["tensor", "row", "column"] = "tensor"
    compat: Literal["paper", "mergekit"] = "paper"

    paper: ClassVar[str] = "no paper; the method nuslerp of mergekit"
    needs_base: ClassVar[bool] = False
    min_models: ClassVar[int] = 2
    max_models: ClassVar[int | None] = 2

    @property
    def extent(self) -> Extent:
        """What one vector is."""
        return "last" if self.along == "row" and self.compat == "mergekit" else self.along

    def check_models(self, models: Sequence[str]) -> None:
        """Check the models, and that the weights say where between them."""
        super().check_models(models)
        first, second = per_model("NuSlerp: weights", self.weights, models)
        if self.compat == "paper" and abs(first + second) <= 1e-9 * (abs(first) + abs(second)):
            raise UserError("NuSlerp: the weights sum to 0. Expected another sum.")

    def coefficients(self, gram: Array, models: Sequence[str]) -> Array:
        """Return the share of each model."""
        first, second = per_model("NuSlerp: weights", self.weights, models)
        if self.compat == "paper":
            return slerp(gram, second / (first + second))
        t = 0.5 if abs(first + second) < 1e-6 else second / (first + second)
        lengths = np.maximum(norms(gram), 1e-7)
        cosine = np.clip(gram[0, 1] / (lengths[0] * lengths[1]), -1, 1)
        # In fp32, as there: cosines that fp32 cannot tell from 1 or -1 are those.
        return arc(cosine, t, 1 - np.square(cosine.astype(np.float32)) <= 1e-16)
