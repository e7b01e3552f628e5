"""Model Breadcrumbs (Davari & Belilovsky, 2024, arXiv 2312.06795): drop the smallest and the largest entries."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import numpy as np
from torch import Tensor

from lightning_merge.errors import UserError
from lightning_merge.methods.base import (
    Context,
    Header,
    Partial,
    PerModel,
    Transform,
    hyperparameter,
    kept_count,
    per_model,
)
from lightning_merge.methods.rescale import as_stored, norm_factors, norms, paired
from lightning_merge.methods.top_k import LargestEntries, magnitude_bits
from lightning_merge.tensor_view import TensorView


def cuts(count: int, density: float, gamma: float, compat: Literal["paper", "mergekit"]) -> list[int]:
    """Return how many of ``count`` entries are outliers, and how many are outliers or kept."""
    if compat == "paper":
        outliers = kept_count(gamma, count)
        return [outliers, outliers + kept_count(density, count)]
    if density == 1:
        return [0, count]
    kept = int(density * count)
    # Fewer outliers go where otherwise too few entries would be left.
    outliers = min(int(gamma * count), count - kept)
    return [outliers, outliers + kept]


@dataclass
class _Middle(Context):
    """The two thresholds, then in mergekit's form the factors that restore norms."""

    largest: LargestEntries = field(default_factory=LargestEntries)
    factors: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Breadcrumbs(Transform):
    """Keep the entries of middle magnitude: the largest γ are outliers, the smallest are noise.

    The first ⌊γ n⌋ entries by magnitude go, the next ⌊density · n⌋ stay, the rest goes; nothing is rescaled.

    ``compat="mergekit"`` is the mask of mergekit's ``breadcrumbs`` and ``breadcrumbs_ties``: task vectors are rounded
    to the dtype of the base and ranked tensor by tensor; where density + gamma exceeds 1 fewer outliers go, and with
    density 1 none.

    Args:
        density: Fraction kept, in (0, 1], for all models or one for each by name; the paper's β = 0.85 and γ = 0.993
            keep 0.143.
        gamma: Fraction of the largest entries dropped, in [0, 1), likewise; 0.007 in the paper's terms 1 − 0.993.
        scope: Rank over each ``tensor`` (the paper's layers, and always with ``compat``) or over the whole ``model``.
        rescale: With ``compat="mergekit"``, give each tensor back its L1 norm.
        compat: The ``paper``'s form, or ``mergekit``'s.

    Raises:
        UserError: density + gamma exceeds 1 in the paper's form, or ``rescale`` there.

    Cost: a small sampling pass and one counting pass (over each tensor as it comes, or over the model); a further one
        where rare ties are broken, and one for norms.
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

    density: PerModel = hyperparameter(0.143, "(0, 1]")
    gamma: PerModel = hyperparameter(0.007, "[0, 1)")
    scope: Literal["tensor", "model"] = "tensor"
    rescale: bool = False
    compat: Literal["paper", "mergekit"] = "paper"

    paper: ClassVar[str] = "Model Breadcrumbs (Davari & Belilovsky, 2024), arXiv 2312.06795"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compat == "mergekit":
            return
        if self.rescale:
            raise UserError(
                "Breadcrumbs: rescale is a setting of mergekit's form. Expected compat: mergekit beside it."
            )
        if "density" in self.varying or "gamma" in self.varying:
            return  # checked again for each tensor
        for density, gamma in paired(self.density, self.gamma):
            if density + gamma > 1 + 1e-9:
                raise UserError(
                    f"Breadcrumbs: density + gamma must be at most 1, got {density:g} + {gamma:g}. "
                    f"For density {density:g}, gamma may be up to {1 - density:g}."
                )

    @property
    def reach(self) -> Literal["tensor", "model"]:
        """Over what entries are ranked."""
        return self.scope if self.compat == "paper" else "tensor"

    def begin(self, header: Header) -> Context:
        """Plan the two cuts of each model: the outliers, and the outliers with those kept."""
        densities = per_model("Breadcrumbs: density", self.density, header.models)
        gammas = per_model("Breadcrumbs: gamma", self.gamma, header.models)

        def ranks(count: int) -> list[list[int]]:
            return [cuts(count, density, gamma, self.compat) for density, gamma in zip(densities, gammas, strict=True)]

        dtypes = {info.dtype for info in header.tensors.values()}
        score = (lambda rows: as_stored(rows, *dtypes)) if self.compat == "mergekit" else None
        return _Middle(False, LargestEntries(tensors=header.tensors, ranks=ranks, score=score))

    def measure(self, view: TensorView, context: _Middle) -> Partial:
        """Count magnitudes, then sum norms."""
        if not context.largest.complete:
            return context.largest.measure(view)
        return norms(view, self._deltas(view), self.apply(view, context))

    def conclude(self, partial: Partial, context: _Middle) -> Context:
        """Narrow the two thresholds, then find the factors."""
        if context.largest.complete:
            return replace(context, complete=True, factors=norm_factors(partial))
        largest = context.largest.conclude(partial)
        return replace(context, complete=largest.complete and not self.rescale, largest=largest)

    def apply(self, view: TensorView, context: _Middle) -> Tensor:
        """Return the task vectors ``(T, n)`` between the two cuts."""
        deltas, largest = self._deltas(view), context.largest
        middle = largest.trim(view, rank=1, values=deltas)
        for cut, row, out in zip(largest.cuts(view, rank=0), deltas, middle, strict=True):
            for here, lowest, extra in cut.runs(view):
                patterns = magnitude_bits(row[here]).numpy()
                out[here][np.flatnonzero(patterns >= lowest)] = 0.0
                if extra:
                    out[here][np.flatnonzero(patterns == lowest - 1)[:extra]] = 0.0
        for row, factor in zip(middle, context.factors, strict=False):
            row *= factor
        return middle

    def _deltas(self, view: TensorView) -> Tensor:
        return view.deltas if self.compat == "paper" else as_stored(view.deltas, view.info.dtype)
