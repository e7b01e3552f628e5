"""The Karcher mean of models on the sphere: the direction with the least squared angles to all of them.

Karcher, 1977, Riemannian center of mass and mollifier smoothing. Applied to weights by mergekit, which refers to arXiv
2603.04972; that text could not be consulted, the mean here is the classical one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from torch import Tensor

from lightning_merge.errors import UserError
from lightning_merge.methods.base import PerModel, hyperparameter, per_model
from lightning_merge.methods.gram import OPPOSITE, Array, GramMerge, cosines, norms, vanishes
from lightning_merge.tensor_view import TensorView


def karcher_mean(
    cosine: Array, weights: Array, max_iterations: int, tolerance: float, fall_back: bool = False
) -> Array | None:
    """Return c with μ = Σ c_t u_t, the weighted Karcher mean of unit vectors, from their cosines ``(T, T)``.

    From the weighted mean direction on, μ ← exp_μ(Σ w_t log_μ u_t). Every μ lies in the span of the u_t: with C the
    cosines, ‖μ‖² = cᵀ C c and μ · u_t = (C c)_t.

    Args:
        cosine: C.
        weights: w, positive, with sum 1.
        max_iterations: After so many steps the search ends.
        tolerance: It ends when the tangent vector is shorter than this.
        fall_back: As mergekit does, begin at the first vector where the directions cancel, and let vectors opposite to
            μ, or closer to it than the tolerance, not pull.

    Returns:
        c, or ``None`` where the directions cancel or one is opposite to μ: there is no one mean direction.
    """
    square = float(weights @ cosine @ weights)
    cancels = square < tolerance**2 if fall_back else vanishes(square)
    if cancels and not fall_back:
        return None
    mean: Array = np.eye(len(weights))[0] if cancels else weights / np.sqrt(square)
    for _ in range(max_iterations):
        along = np.clip(cosine @ mean, -1, 1)
        opposite = along < OPPOSITE - 1
        if opposite.any() and not fall_back:
            return None
        angle = np.arccos(along)
        pulls = ~opposite & ((angle >= tolerance) | (not fall_back))
        # log_μ u = θ / sin θ · (u − cos θ · μ)
        pull = np.where(pulls, weights / np.sinc(np.where(pulls, angle, 0) / np.pi), 0)
        tangent = pull - (pull @ along) * mean
        length = math.sqrt(max(0.0, float(tangent @ cosine @ tangent)))
        if length < tolerance or length == 0:
            break
        mean = np.cos(length) * mean + np.sin(length) / length * tangent
        mean = mean / np.sqrt(mean @ cosine @ mean)
    return mean


@dataclass(frozen=True)
class Karcher(GramMerge):
    """Take the Karcher mean of the models' directions and the mean of their norms, tensor by tensor.

    μ minimises Σ w_t ∠(μ, θ_t)² on the unit sphere, and the merge is μ · Σ w_t ‖θ_t‖; of two models of equal norm it is
    slerp at t = w₂. A model whose tensor is 0 drops out with its weight; where there is no one mean direction (opposite
    models), the merge is the weighted average. With ``compat="mergekit"`` norms up to the tolerance have no direction
    but count in the mean norm, and directions that cancel start from the first.

    Args:
        max_iterations: Most steps of the search, in [1, 10000]; 10 by default.
        tolerance: Length of the step, in radian, below which it ends, in [0, 1]; 1e-5 by default.
        weights: One number for each model by name, in [0, 100]; equal weights by default. They are divided by their
            sum.
        compat: ``paper``, or ``mergekit`` for its rules on zero norms.

    Raises:
        UserError: Weights that are all 0.

    Cost: one pass over the models for their inner products, one to combine; the search is on T numbers.
    Reference: Karcher, 1977, Riemannian center of mass and mollifier smoothing, section 1.

    Example:
        >>> import torch
        >>> from lightning_merge import TaskVectors
        >>> a, b = {"weight": torch.tensor([3.0, 0.0])}, {"weight": torch.tensor([0.0, 1.0])}
        >>> Karcher()(TaskVectors.open(models={"a": a, "b": b}, check=False))["weight"]
        tensor([1.4142, 1.4142])
    """

    max_iterations: int = hyperparameter(10, "[1, 10000]")
    tolerance: float = hyperparameter(1e-5, "[0, 1]")
    weights: PerModel = hyperparameter(1.0, "[0, 100]")
    compat: Literal["paper", "mergekit"] = "paper"

    paper: ClassVar[str] = (
        "Riemannian center of mass and mollifier smoothing (Karcher, 1977), Communications on Pure and Applied "
        "Mathematics 30(5)"
    )
    needs_base: ClassVar[bool] = False

    @property
    def reads_base(self) -> bool:
        """The base takes no part."""
        return False

    def check_models(self, models: Sequence[str]) -> None:
        """Check the models, and that one has a weight."""
        super().check_models(models)
        if not any(per_model("Karcher: weights", self.weights, models)):
            raise UserError("Karcher: the weights are all 0. Expected one above 0.")

    def vectors(self, view: TensorView) -> Sequence[Tensor]:
        """Return θ_t."""
        return view.finetuned.unbind()

    def coefficients(self, gram: Array, models: Sequence[str]) -> Array:
        """Return the share of each model."""
        weights = np.array(per_model("Karcher: weights", self.weights, models))
        weights /= weights.sum()
        lengths, cosine = norms(gram)[:, 0], cosines(gram)[:, :, 0]
        theirs = self.compat == "mergekit"
        valid = (weights > 0) & (lengths > (self.tolerance if theirs else 0))
        found = np.zeros((len(weights), 1))
        if not valid.any():
            return found
        directed = weights[valid] / weights[valid].sum()
        cosine = cosine[np.ix_(valid, valid)]
        mean = karcher_mean(cosine, directed, int(self.max_iterations), self.tolerance, fall_back=theirs)
        norm = weights @ lengths if theirs else directed @ lengths[valid]
        found[valid, 0] = directed if mean is None else norm * mean / lengths[valid]
        return found
