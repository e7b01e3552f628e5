"""TIES-Merging (Yadav et al., 2023, arXiv 2306.01708).

Trim each task vector to its largest entries, elect one sign for each entry, merge what agrees.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_merge.methods.base import (
    Context,
    Header,
    Partial,
    TensorMerge,
    hyperparameter,
    kept_count,
    ordered_sum,
    take_selected,
)
from lightning_merge.methods.top_k import LargestEntries
from lightning_merge.tensor_view import TensorView, add_delta


def elect_sign(deltas: Tensor, majority: float = 0.0) -> Tensor:
    """Elect the sign of the summed trimmed task vectors, ``(T, n)`` to ``(n,)`` with entries in {−1, 0, 1}.

    Where the sum is 0 the ``majority`` sign of all entries is taken (paper, section 3, and its released code).
    """
    sign = torch.sign(ordered_sum(deltas))
    return torch.where(sign == 0, majority, sign)


def disjoint_merge(deltas: Tensor, sign: Tensor, operation: Literal["mean", "sum"]) -> Tensor:
    """Sum, or average over those that agree, the entries whose sign is the elected one; ``(T, n)`` to ``(n,)``."""
    agreeing = torch.zeros_like(sign)
    count = torch.zeros_like(sign)
    for delta in deltas:
        along = (delta * sign).clamp_(min=0)  # exact, since the sign is -1, 0 or 1
        agreeing += along
        count += along > 0
    agreeing *= sign
    return agreeing / count.clamp_(min=1) if operation == "mean" else agreeing


@dataclass
class _Election(Context):
    """The trim's thresholds, then the majority sign."""

    largest: LargestEntries | None = None
    majority: float = 0.0


@dataclass(frozen=True)
class Ties(TensorMerge):
    """Trim, elect sign, merge: θ₀ + λ · (disjoint merge of the largest entries of each task vector).

    Trimming keeps exactly ⌊density · D⌋ entries (at least one); among equal magnitudes the first by tensor name and
    flat index stay. An entry whose trimmed sum is exactly 0 takes the sign that most entries elected.

    Args:
        density: Fraction of each task vector kept, in (0, 1]; the paper's 20 % by default.
        scale: λ, in [-100, 100]; 1 in the paper with ``mean``; about 0.3 goes with ``sum``.
        operation: ``mean`` over the agreeing entries (paper) or their ``sum`` (used for CLIP by AdaMerging).
        scope: Trim over the whole ``model`` (paper) or over each ``tensor`` (mergekit, peft).

    Cost: a small sampling pass and one counting pass for the trim (a further one where ties are broken), one for the
        signs, one to merge; no sorting. Extra memory: about 1 % of the entries for each task, and some pieces of 2¹⁸
        entries of T models.
    Reference: Yadav et al., 2023, TIES-Merging, arXiv 2306.01708, algorithm 1. (The released code keeps one entry
        more and fails at density 1.)

    Example:
        >>> import torch
        >>> from lightning_merge import TaskVectors
        >>> base = {"weight": torch.tensor([1.0, 2.0, 3.0, 4.0])}
        >>> a = {"weight": torch.tensor([1.5, 2.0, 3.25, 3.0])}
        >>> b = {"weight": torch.tensor([0.75, 3.0, 3.5, 4.0])}
        >>> task_vectors = TaskVectors.open(base, {"a": a, "b": b})
        >>> Ties(density=0.5)(task_vectors)["weight"]
        tensor([1.5000, 3.0000, 3.5000, 3.0000])
    """

    density: float = hyperparameter(0.2, "(0, 1]")
    scale: float = hyperparameter(1.0, "[-100, 100]")
    operation: Literal["mean", "sum"] = "mean"
    scope: Literal["model", "tensor"] = "model"

    paper: ClassVar[str] = "TIES-Merging (Yadav et al., 2023), arXiv 2306.01708"

    @property
    def reach(self) -> Literal["tensor", "model"]:
        """Over what entries are trimmed."""
        return self.scope

    def begin(self, header: Header) -> Context:
        """Plan how many entries each task vector keeps."""
        if self.density == 1:
            return _Election(complete=False)
        largest = LargestEntries(tensors=header.tensors, ranks=lambda count: [max(1, kept_count(self.density, count))])
        return _Election(complete=False, largest=largest)

    def measure(self, view: TensorView, context: _Election) -> Partial:
        """Count magnitudes until the trim is known, then the signs that entries elect."""
        if context.largest is not None and not context.largest.complete:
            return context.largest.measure(view)
        return {"majority": torch.sign(ordered_sum(self._trimmed(view, context))).sum(dtype=torch.int64)}

    def conclude(self, partial: Partial, context: _Election) -> Context:
        """Narrow the trim, then settle the majority sign."""
        if context.largest is not None and not context.largest.complete:
            return _Election(complete=False, largest=context.largest.conclude(partial))
        majority = float(torch.sign(partial["majority"])) if partial else 0.0
        return _Election(largest=context.largest, majority=majority)

    def apply(self, view: TensorView, context: _Election) -> Tensor:
        """Return θ₀ + λ · the disjoint merge."""
        trimmed = self._trimmed(view, context)
        merged = disjoint_merge(trimmed, elect_sign(trimmed, context.majority), self.operation)
        return take_selected(merged, view) if self.scale == 1 else add_delta(view.base, self.scale * merged)

    def _trimmed(self, view: TensorView, context: _Election) -> Tensor:
        if context.largest is None:
            return view.deltas
        return context.largest.trim(view)
