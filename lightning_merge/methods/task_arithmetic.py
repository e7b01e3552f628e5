"""Task arithmetic (Ilharco et al., 2023, arXiv 2212.04089): θ₀ + Σ λ_t τ_t."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_merge.errors import UserError
from lightning_merge.methods.base import PerModel, TensorMerge, hyperparameter, per_model, take_selected
from lightning_merge.methods.rescale import as_stored
from lightning_merge.tensor_view import TensorView, add_delta


def combine(deltas: Tensor, coefficients: Sequence[float]) -> Tensor:
    """Return Σ λ_t τ_t, ``(T, n)`` to ``(n,)``, added in the order of the models."""
    total = torch.zeros_like(deltas[0])
    for delta, coefficient in zip(deltas, coefficients, strict=True):
        total.add_(delta, alpha=coefficient)
    return total


@dataclass(frozen=True)
class TaskArithmetic(TensorMerge):
    """Add the scaled sum of the task vectors to the base: addition, and with a negative scale negation.

    An analogy merges ``task_vectors.analogy(a, b, c)``, which is τ_c + (τ_b − τ_a).

    ``compat="mergekit"`` is mergekit's ``task_arithmetic`` and the sum that ends its ``*_linear`` methods and
    ``breadcrumbs``: task vectors are rounded to the dtype of the base, and weights that sum to less than 1e-8 are not
    normalised.

    Args:
        scale: λ, for all models or one for each by name, in [-100, 100]; chosen on validation data in the paper, which
            advises 0.3 to 0.4 where there is none. 0.3 by default.
        weights: What each task vector counts, for all models or one for each by name, in [-100, 100]; 1 by default.
        normalize: Divide by the sum of the weights.
        compat: The ``paper``'s form, or ``mergekit``'s.

    Raises:
        UserError: Weights that sum to 0 while ``normalize`` is set, in the paper's form.

    Cost: one pass over the base and the models.
    Reference: Ilharco et al., 2023, Editing Models with Task Arithmetic, arXiv 2212.04089, section 2.

    Example:
        >>> import torch
        >>> from lightning_merge import TaskVectors
        >>> base = {"weight": torch.tensor([1.0, 2.0, 3.0, 4.0])}
        >>> a = {"weight": torch.tensor([1.5, 2.0, 3.25, 3.0])}
        >>> b = {"weight": torch.tensor([0.75, 3.0, 3.5, 4.0])}
        >>> task_vectors = TaskVectors.open(base, {"a": a, "b": b})
        >>> TaskArithmetic(scale=0.5)(task_vectors)["weight"]
        tensor([1.1250, 2.5000, 3.3750, 3.5000])
    """

    scale: PerModel = hyperparameter(0.3, "[-100, 100]")
    weights: PerModel = hyperparameter(1.0, "[-100, 100]")
    normalize: bool = False
    compat: Literal["paper", "mergekit"] = "paper"

    paper: ClassVar[str] = "Editing Models with Task Arithmetic (Ilharco et al., 2023), arXiv 2212.04089"
    device_ready: ClassVar[bool] = True

    def check_models(self, models: Sequence[str]) -> None:
        """Check the models, and that the weights can be normalised."""
        super().check_models(models)
        self._coefficients(models)

    def apply(self, view: TensorView, context: Any) -> Tensor:
        """Return θ₀ + Σ λ_t w_t τ_t, over Σ w_t if normalised."""
        coefficients = self._coefficients(view.models)
        if self.compat == "mergekit":
            return add_delta(view.base, combine(as_stored(view.deltas, view.info.dtype), coefficients))
        merged = combine(view.deltas, coefficients)
        used = [position for position, coefficient in enumerate(coefficients) if coefficient]
        if len(used) == 1 and coefficients[used[0]] == 1:
            return take_selected(merged, view, used)
        return add_delta(view.base, merged)

    def _coefficients(self, models: Sequence[str]) -> list[float]:
        scales = per_model("TaskArithmetic: scale", self.scale, models)
        weights = per_model("TaskArithmetic: weights", self.weights, models)
        divisor = sum(weights) if self.normalize else 1.0
        if self.compat == "mergekit" and abs(divisor) < 1e-8:
            divisor = 1.0
        # What rounding leaves of a sum of 0 is no number to divide by.
        elif abs(divisor) <= 1e-9 * sum(map(abs, weights)):
            raise UserError("TaskArithmetic: the weights sum to 0. Expected another sum, or normalize: false.")
        return [scale * weight / divisor for scale, weight in zip(scales, weights, strict=True)]
