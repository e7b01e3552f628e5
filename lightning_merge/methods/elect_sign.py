"""The task vectors of AdaMerging++ (Yang et al., 2024, arXiv 2310.02575): trimmed, and only what agrees in sign.

These are the first two steps of TIES-Merging (arXiv 2306.01708), kept for each task instead of being summed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_merge.methods.base import (
    Context,
    Header,
    Partial,
    PerModel,
    Transform,
    hyperparameter,
    kept_count,
    ordered_sum,
    per_model,
)
from lightning_merge.methods.rescale import blocks, keep_only
from lightning_merge.methods.ties import elect_sign
from lightning_merge.methods.top_k import LargestEntries
from lightning_merge.tensor_view import TensorView


def keep_agreeing(deltas: Tensor, sign: Tensor, out: Tensor | None = None) -> Tensor:
    """Return the task vectors ``(T, n)`` with 0 wherever an entry has not the elected sign, in ``out`` if given."""
    out = torch.empty_like(deltas) if out is None else out
    along = torch.empty_like(sign)
    for delta, kept in zip(deltas, out, strict=True):
        keep_only(delta, np.greater(torch.mul(delta, sign, out=along).numpy(), 0), kept)
    return out


@dataclass
class _Election(Context):
    """The trim's thresholds, then the majority sign."""

    largest: LargestEntries | None = None
    majority: float = 0.0
    models: int = 1


@dataclass(frozen=True)
class ElectSign(Transform):
    """Trim each task vector to its largest entries and keep, task by task, those that have the elected sign.

    What AdaMerging++ learns its coefficients on. The kept entries of all tasks sum up to what ``Ties`` with
    ``operation="sum"`` merges: the same trim, the same election.

    Args:
        density: Fraction of each task vector kept by the trim, in (0, 1]; for all models or one for each by name; the
            papers' 20 % by default.
        scope: Trim over the whole ``model`` (paper) or over each ``tensor``.
        elect: Elect signs; without it task vectors are only trimmed.

    Cost: that of ``Ties``: a small sampling pass and one counting pass for the trim (a further one where rare ties are
        broken), one for the majority sign; no sorting. Extra memory: about 1 % of the entries for each task.
    Reference: Yang et al., 2024, AdaMerging, arXiv 2310.02575, section 3.2; the steps are those of TIES-Merging,
        arXiv 2306.01708, algorithm 1.

    Example:
        >>> import torch
        >>> from lightning_merge import TaskVectors
        >>> from lightning_merge.methods import TaskArithmetic
        >>> base = {"weight": torch.tensor([1.0, 2.0, 3.0, 4.0])}
        >>> a = {"weight": torch.tensor([1.5, 2.0, 3.25, 3.0])}
        >>> b = {"weight": torch.tensor([0.75, 3.0, 3.5, 4.0])}
        >>> task_vectors = TaskVectors.open(base, {"a": a, "b": b})
        >>> TaskArithmetic(scale={"a": 1.0, "b": 0.0})(task_vectors, transforms=[ElectSign(density=0.5)])["weight"]
        tensor([1.5000, 2.0000, 3.0000, 3.0000])
    """

    density: PerModel = hyperparameter(0.2, "(0, 1]")
    scope: Literal["model", "tensor"] = "model"
    elect: bool = True

    paper: ClassVar[str] = "AdaMerging++ (Yang et al., 2024), arXiv 2310.02575"

    @property
    def measuring_passes(self) -> float:
        """One for the trim, one for the majority sign."""
        return float(self.density != 1) + float(self.elect)

    @property
    def reach(self) -> Literal["tensor", "model"]:
        """Over what entries are trimmed."""
        return self.scope

    def begin(self, header: Header) -> Context:
        """Plan how many entries each task vector keeps."""
        densities = per_model("ElectSign: density", self.density, header.models)
        election = _Election(complete=False, models=len(header.models))
        if all(density == 1 for density in densities):
            return self._next(election)

        def ranks(count: int) -> list[list[int]]:
            return [[max(1, kept_count(density, count))] for density in densities]

        return replace(election, largest=LargestEntries(tensors=header.tensors, ranks=ranks))

    def measure(self, view: TensorView, context: _Election) -> Partial:
        """Count magnitudes until the trim is known, then the signs that entries elect."""
        if context.largest is not None and not context.largest.complete:
            return context.largest.measure(view)
        trimmed = _trimmed(view, context)
        majority = 0
        for here in blocks(view):
            total = ordered_sum(trimmed[:, here]).numpy()
            majority += int(np.count_nonzero(total > 0)) - int(np.count_nonzero(total < 0))
        return {"majority": majority}

    def conclude(self, partial: Partial, context: _Election) -> Context:
        """Narrow the trim, then settle the majority sign."""
        if context.largest is not None and not context.largest.complete:
            largest = context.largest.conclude(partial)
            return self._next(replace(context, largest=largest)) if largest.complete else context
        return replace(context, complete=True, majority=float(np.sign(partial.get("majority", 0))))

    def apply(self, view: TensorView, context: _Election) -> Tensor:
        """Return what is kept of each task vector, ``(T, n)``."""
        trimmed = _trimmed(view, context)
        if not self.elect or context.models == 1:
            return trimmed
        kept = torch.empty_like(trimmed)
        for here in blocks(view):
            rows = trimmed[:, here]
            keep_agreeing(rows, elect_sign(rows, context.majority), kept[:, here])
        return kept

    def _next(self, context: _Election) -> _Election:
        """Go on after the trim: one model elects its own signs."""
        return replace(context, complete=not self.elect or context.models == 1)


def _trimmed(view: TensorView, context: _Election) -> Tensor:
    return view.deltas if context.largest is None else context.largest.trim(view)
