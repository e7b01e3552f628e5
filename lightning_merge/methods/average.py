"""Simple and weighted averages of models: uniform soups (Wortsman et al., 2022, arXiv 2203.05482)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_merge.errors import UserError
from lightning_merge.methods.base import PerModel, TensorMerge, hyperparameter, per_model
from lightning_merge.methods.gram import combine
from lightning_merge.tensor_view import TensorView


def weighted_average(
    finetuned: Tensor, weights: Sequence[float], divisor: float = 1.0, accumulate: torch.dtype = torch.float64
) -> Tensor:
    """Return Σ w_t θ_t / divisor; ``(T, n)`` to ``(n,)`` in the input's dtype.

    Sums in fp64: of fp32 models, the average of equal ones is that model, and a one-hot weight takes that model's
    entries. Of fp64 models either may be off by the last bit, unless the one weight is 1; so of fp32 ones summed in
    fp32, which is enough for models stored in 16 bits.
    """
    if accumulate == finetuned.dtype:
        present = [(row, weight) for row, weight in zip(finetuned, weights, strict=True) if weight]
        if not present:
            return torch.zeros_like(finetuned[0])
        total32 = present[0][0] * present[0][1]
        for row, weight in present[1:]:
            total32.add_(row, alpha=weight)
        return total32 if divisor == 1 else total32.div_(divisor)
    total: Tensor | None = None
    term: Tensor | None = None
    for row, weight in zip(finetuned, weights, strict=True):
        if not weight:
            continue
        if total is None:
            # The first term starts the sum: adding it to +0 would lose the sign of a −0.
            total = row.to(torch.float64, copy=True).mul_(weight)
        else:
            term = torch.empty_like(total) if term is None else term
            total += term.copy_(row).mul_(weight)
    if total is None:
        return torch.zeros_like(finetuned[0])
    return (total if divisor == 1 else total.div_(divisor)).to(finetuned.dtype)


def _accumulator(view: TensorView) -> torch.dtype:
    """Return the dtype of sums: fp64; fp32 for models stored in 16 bits, where only a wider output shows rounding."""
    return torch.float32 if view.info.dtype in (torch.bfloat16, torch.float16) else torch.float64


@dataclass(frozen=True)
class SimpleAverage(TensorMerge):
    """Average the weights of all models: the uniform soup.

    Needs no base, no data and no hyper-parameter.

    Cost: one pass over the models.
    Reference: Wortsman et al., 2022, Model soups, arXiv 2203.05482, "uniform soup".

    Example:
        >>> import torch
        >>> from lightning_merge import TaskVectors
        >>> base = {"weight": torch.tensor([1.0, 2.0, 3.0, 4.0])}
        >>> a = {"weight": torch.tensor([1.5, 2.0, 3.25, 3.0])}
        >>> b = {"weight": torch.tensor([0.75, 3.0, 3.5, 4.0])}
        >>> task_vectors = TaskVectors.open(base, {"a": a, "b": b})
        >>> SimpleAverage()(task_vectors)["weight"]
        tensor([1.1250, 2.5000, 3.3750, 3.5000])
    """

    paper: ClassVar[str] = "Model soups (Wortsman et al., 2022), arXiv 2203.05482"
    device_ready: ClassVar[bool] = True
    needs_base: ClassVar[bool] = False

    @property
    def reads_base(self) -> bool:
        """The base takes no part."""
        return False

    def apply(self, view: TensorView, context: Any) -> Tensor:
        """Return the mean over the models."""
        # In fp64 a sum of equal fp32 numbers is exact, and so is their average; in fp32 that of 16-bit numbers.
        total = view.finetuned[0].to(_accumulator(view), copy=True)
        for row in view.finetuned[1:]:
            total += row
        return total.div_(len(view.models)).to(view.finetuned.dtype)


@dataclass(frozen=True)
class WeightedAverage(TensorMerge):
    """Average the weights of all models with one weight each.

    Sums are in fp64, those of models stored in 16 bits in fp32. mergekit rounds weights to fp32, sums in fp32, and
    divides by a sum of weights that is but their rounding (``compat="mergekit"``).

    Args:
        weights: One number for each model by name, in [-100, 100]; equal weights by default.
        normalize: Divide by the sum of the weights.
        compat: ``paper``, or ``mergekit`` for its arithmetic.

    Raises:
        UserError: Weights that sum to 0 while ``normalize`` is set, or that do not name the models.

    Cost: one pass over the models.
    Reference: Wortsman et al., 2022, Model soups, arXiv 2203.05482.

    Example:
        >>> import torch
        >>> from lightning_merge import TaskVectors
        >>> base = {"weight": torch.tensor([1.0, 2.0, 3.0, 4.0])}
        >>> a = {"weight": torch.tensor([1.5, 2.0, 3.25, 3.0])}
        >>> b = {"weight": torch.tensor([0.75, 3.0, 3.5, 4.0])}
        >>> task_vectors = TaskVectors.open(base, {"a": a, "b": b})
        >>> WeightedAverage(weights={"a": 3, "b": 1})(task_vectors)["weight"]
        tensor([1.3125, 2.2500, 3.3125, 3.2500])
    """

    weights: PerModel = hyperparameter(1.0, "[-100, 100]")
    normalize: bool = True
    compat: Literal["paper", "mergekit"] = "paper"

    paper: ClassVar[str] = "Model soups (Wortsman et al., 2022), arXiv 2203.05482"
    device_ready: ClassVar[bool] = True
    needs_base: ClassVar[bool] = False

    @property
    def reads_base(self) -> bool:
        """The base takes no part."""
        return False

    def check_models(self, models: Sequence[str]) -> None:
        """Check the models, and that the weights can be normalised."""
        super().check_models(models)
        weights = per_model("WeightedAverage: weights", self.weights, models)
        # 0.1 + 0.2 − 0.3 is 5.6e-17: what rounding leaves of a sum of 0 is no number to divide by.
        total, rounding = sum(weights), 1e-9 * sum(map(abs, weights))
        if self.compat == "mergekit":
            total, rounding = float(torch.tensor(weights, dtype=torch.float32).sum()), 0.0
        if self.normalize and abs(total) <= rounding:
            raise UserError("WeightedAverage: the weights sum to 0. Expected another sum, or normalize: false.")

    def apply(self, view: TensorView, context: Any) -> Tensor:
        """Return Σ w_t θ_t / Σ w_t."""
        weights = per_model("WeightedAverage: weights", self.weights, view.models)
        if self.compat == "paper":
            divisor = sum(weights) if self.normalize else 1.0
            return weighted_average(view.finetuned, weights, divisor, _accumulator(view))
        rounded = torch.tensor(weights, dtype=view.finetuned.dtype)
        total = combine(view.finetuned.unbind(), rounded.tolist())
        return total / rounded.sum() if self.normalize else total
