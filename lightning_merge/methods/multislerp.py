"""Multi-SLERP: the barycentre of several models on the sphere, projected from their weighted mean direction.

No paper; the method is mergekit's. Its tangent vectors at the weighted mean direction add up to exactly 0, whatever the
weights, so that mapping their mean back to the sphere gives that direction: this is what is computed here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lightning_merge.errors import UserError
from lightning_merge.methods.base import PerModel, hyperparameter, per_model
from lightning_merge.methods.gram import Array, TaskVectorGramMerge, cosines, norms, vanishes


def mean_direction(gram: Array, weights: Array) -> Array:
    """Return the coefficients of Σ w ‖x‖ · m / ‖m‖ with m = Σ w x / ‖x‖, from ``(T, T, R)`` and ``(T,)`` to ``(T, R)``.

    Where the directions cancel there is no m / ‖m‖: the weighted sum Σ w x instead. A vector that is 0 has no
    direction, and counts in the norm.
    """
    lengths = norms(gram)
    units = np.divide(weights[:, None], lengths, out=np.zeros_like(lengths), where=lengths > 0)
    square = np.einsum("s,str,t->r", weights, cosines(gram), weights)
    cancels = vanishes(square, np.abs(weights).sum())
    scale = weights @ lengths / np.sqrt(np.where(cancels, 1.0, square))
    return np.where(cancels, weights[:, None], scale * units)


@dataclass(frozen=True)
class MultiSlerp(TaskVectorGramMerge):
    """Average directions and norms apart, tensor by tensor: Σ w ‖x‖ along the weighted mean of the unit vectors.

    On task vectors where a base is given, else on the weights. Where directions cancel, the weighted sum is taken
    (mergekit does so for two models, and refuses more, also if all task vectors are 0).

    Args:
        weights: One number for each model by name, in [-100, 100]; equal weights by default.
        normalize: Divide the weights by their sum.

    Raises:
        UserError: Weights that sum to 0 while ``normalize`` is set.

    Cost: one pass over the models for their inner products, one to combine.
    Reference: mergekit, merge method multislerp.

    Example:
        >>> import torch
        >>> from lightning_merge import TaskVectors
        >>> a, b = {"weight": torch.tensor([3.0, 0.0])}, {"weight": torch.tensor([0.0, 1.0])}
        >>> MultiSlerp()(TaskVectors.open(models={"a": a, "b": b}, check=False))["weight"]
        tensor([1.4142, 1.4142])
    """

    weights: PerModel = hyperparameter(1.0, "[-100, 100]")
    normalize: bool = True

    paper: ClassVar[str] = "no paper; the method multislerp of mergekit"
    needs_base: ClassVar[bool] = False

    def check_models(self, models: Sequence[str]) -> None:
        """Check the models, and that the weights can be normalised."""
        super().check_models(models)
        weights = per_model("MultiSlerp: weights", self.weights, models)
        if self.normalize and abs(sum(weights)) <= 1e-9 * sum(map(abs, weights)):
            raise UserError("MultiSlerp: the weights sum to 0. Expected another sum, or normalize: false.")

    def coefficients(self, gram: Array, models: Sequence[str]) -> Array:
        """Return the share of each model."""
        weights = np.array(per_model("MultiSlerp: weights", self.weights, models))
        return mean_direction(gram, weights / weights.sum() if self.normalize else weights)
