"""Model Breadcrumbs (Davari & Belilovsky, 2024, arXiv 2312.06795): drop the smallest and the largest entries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from lightning_merge.errors import UserError
from lightning_merge.methods.base import Context, Header, Partial, Transform, hyperparameter, kept_count
from lightning_merge.methods.top_k import LargestEntries
from lightning_merge.tensor_view import TensorView


@dataclass(frozen=True)
class Breadcrumbs(Transform):
    """Keep the entries of middle magnitude: the largest γ are outliers, the smallest are noise.

    The first ⌊γ n⌋ entries by magnitude go, the next ⌊density · n⌋ stay, the rest goes; nothing is rescaled.

    Args:
        density: Fraction kept, in (0, 1]; the paper's β = 0.85 and γ = 0.993 keep 0.143.
        gamma: Fraction of the largest entries dropped, in [0, 1); 0.007 in the paper's terms 1 − 0.993.
        scope: Rank over each ``tensor`` (the paper's layers) or over the whole ``model``.

    Raises:
        UserError: density + gamma exceeds 1.

    Cost: a small sampling pass and one counting pass (over each tensor as it comes, or over the model); a further one
        where ties are broken.
    Reference: Davari & Belilovsky, 2024, Model Breadcrumbs, arXiv 2312.06795, section 3. (The released code ranks
        within rows.)

    Example:
        >>> import torch
        >>> from lightning_merge import TaskVectors
        >>> base = {"weight": torch.tensor([1.0, 2.0, 3.0, 4.0])}
        >>> a = {"weight": torch.tensor([1.5, 2.0, 3.25, 3.0])}
        >>> b = {"weight": torch.tensor([0.75, 3.0, 3.5, 4.0])}
        >>> task_vectors = TaskVectors.open(base, {"a": a, "b": b})
        >>> from lightning_merge.methods import TaskArithmetic
        >>> TaskArithmetic(scale=1)(task_vectors, transforms=[Breadcrumbs(density=0.5, gamma=0.25)])["weight"]
        tensor([1.2500, 2.0000, 3.7500, 4.0000])
    """

    density: float = hyperparameter(0.143, "(0, 1]")
    gamma: float = hyperparameter(0.007, "[0, 1)")
    scope: Literal["tensor", "model"] = "tensor"

    paper: ClassVar[str] = "Model Breadcrumbs (Davari & Belilovsky, 2024), arXiv 2312.06795"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.density + self.gamma > 1 + 1e-9:
            raise UserError(
                f"Breadcrumbs: density + gamma must be at most 1, got {self.density:g} + {self.gamma:g}. "
                f"For density {self.density:g}, gamma may be up to {1 - self.density:g}."
            )

    @property
    def reach(self) -> Literal["tensor", "model"]:
        """Over what entries are ranked."""
        return self.scope

    def begin(self, header: Header) -> Context:
        """Plan the two cuts: the outliers, and the outliers with those kept."""

        def cuts(count: int) -> list[int]:
            outliers = kept_count(self.gamma, count)
            return [outliers, outliers + kept_count(self.density, count)]

        return LargestEntries(tensors=header.tensors, ranks=cuts)

    def measure(self, view: TensorView, context: LargestEntries) -> Partial:
        """Count magnitudes."""
        return context.measure(view)

    def conclude(self, partial: Partial, context: LargestEntries) -> Context:
        """Narrow the two thresholds."""
        return context.conclude(partial)

    def apply(self, view: TensorView, context: LargestEntries) -> Tensor:
        """Return the task vectors ``(T, n)`` between the two cuts."""
        outliers = context.trim(view, rank=0)
        return context.trim(view, rank=1).masked_fill_(outliers != 0, 0.0)
