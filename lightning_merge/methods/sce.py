"""SCE (FuseChat; Wan et al., 2024, arXiv 2408.07990): select, calculate, erase.

The entries on which the models differ most say how much each model counts in a tensor; what goes against the elected
sign of an entry is erased.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_merge.methods.base import (
    Context,
    Header,
    Partial,
    PerTensor,
    TensorMerge,
    hyperparameter,
    kept_count,
    take_selected,
)
from lightning_merge.methods.rescale import as_stored, blocks, keep_only
from lightning_merge.methods.ties import disjoint_merge, elect_sign
from lightning_merge.methods.top_k import LargestEntries, magnitude_bits
from lightning_merge.tensor_view import TensorView, add_delta

# mergekit counts all models alike where their mean squares sum to less, and divides by no less.
MERGEKIT_SMALLEST_WEIGHT = 1e-6


def spread(deltas: Tensor) -> Tensor:
    """Return T² times the variance over the models, ``(T, n)`` to ``(1, n)`` in fp32.

    In fp64 inside, over differences from the first model: 0 where all models agree. Rounding may leave a sign. In fp32
    the order is faithful for standard deviations from about 1e-19 to 1e19 / T: variances of less than that lose
    digits, and are 0 below about 1e-23; those of more are infinite, and equal.
    """
    out = torch.empty(1, deltas.shape[1])
    for start in range(0, deltas.shape[1], _SPREAD_BLOCK):
        block = deltas[:, start : start + _SPREAD_BLOCK]
        # The difference from the first model itself is 0.
        rest = [torch.sub(row, block[0]).double() for row in block[1:]] or [torch.zeros_like(block[0]).double()]
        total, squares = rest[0], rest[0] * rest[0]
        for row in rest[1:]:
            total += row
            squares.addcmul_(row, row)
        squares.mul_(len(deltas)).addcmul_(total, total, value=-1.0)
        out[0, start : start + _SPREAD_BLOCK] = squares
    return out


# fp64 copies of a few models in this many entries stay in the cache.
_SPREAD_BLOCK = 1 << 15


@dataclass
class _Weights(Context):
    """Which entries differ most, then what each model counts in the tensor."""

    largest: LargestEntries | None = None
    weights: list[float] = field(default_factory=list)
    entries: int = 0


@dataclass(frozen=True)
class Sce(TensorMerge):
    """Select the entries that differ most, calculate each model's weight from them, erase what goes against the sign.

    In each tensor the ⌊density · n⌋ entries of largest variance over the models are selected, of the n on which the
    models differ; the weight of a model is the share of its squares there (equal where all are 0). An entry's elected
    sign is that of its summed task vectors, + where they sum to 0; the merge is the weighted mean of what agrees.

    ``compat="mergekit"`` is mergekit's ``sce``: task vectors are rounded to the dtype of the base, entries that are not
    selected stay as the base has them, mean squares that sum to less than 1e-6 count all models alike, and the mean
    divides by at least 1e-6.

    Args:
        density: Share of the entries that is selected, in (0, 1]; mergekit's ``select_topk``. 0.1 by default.
        compat: The ``paper``'s form (and that of its released code), or ``mergekit``'s.

    Cost: a small sampling pass and one counting pass (a further one where rare ties are broken), one for the squares,
        one to merge; with density 1 the last two.
    Reference: Wan et al., 2024, FuseChat, arXiv 2408.07990, section 3.3.

    Example:
        >>> import torch
        >>> from lightning_merge import TaskVectors
        >>> base = {"weight": torch.tensor([1.0, 2.0, 3.0, 4.0])}
        >>> a = {"weight": torch.tensor([1.5, 2.0, 3.25, 3.0])}
        >>> b = {"weight": torch.tensor([0.75, 3.0, 3.5, 4.0])}
        >>> task_vectors = TaskVectors.open(base, {"a": a, "b": b})
        >>> Sce(density=0.5)(task_vectors)["weight"]
        tensor([1.5000, 3.0000, 3.3750, 3.0000])
    """

    density: PerTensor = hyperparameter(0.1, "(0, 1]")
    compat: Literal["paper", "mergekit"] = "paper"

    paper: ClassVar[str] = "FuseChat (Wan et al., 2024), arXiv 2408.07990"

    @property
    def reads_own_entries(self) -> bool:
        """Entries that equal one model's are that model's own."""
        return self.compat == "paper"

    @property
    def measuring_passes(self) -> float:
        """One for the selection, one for the squares."""
        return 1.0 + float(self.density != 1)

    def begin(self, header: Header) -> Context:
        """Plan how many entries are selected."""
        entries = sum(info.numel for info in header.tensors.values())
        if self.density == 1:
            return _Weights(complete=False, entries=entries)
        dtypes = {info.dtype for info in header.tensors.values()}

        def score(deltas: Tensor) -> Tensor:
            return spread(as_stored(deltas, *dtypes) if self.compat == "mergekit" else deltas)

        def ranks(count: int) -> list[int]:
            assert isinstance(self.density, (int, float)), "schedules are settled before"
            density = self.density
            return [int(density * count) if self.compat == "mergekit" else kept_count(density, count)]

        largest = LargestEntries(tensors=header.tensors, ranks=ranks, score=score, nonzero=True)
        return _Weights(complete=False, largest=largest, entries=entries)

    def measure(self, view: TensorView, context: _Weights) -> Partial:
        """Count variances until the selection is known, then sum the squares in it."""
        if context.largest is not None and not context.largest.complete:
            return context.largest.measure(view)
        deltas, selected = self._deltas(view), self._selected(view, context)
        sums: list[list[float]] = [[] for _ in view.models]
        for here in blocks(view):
            at = None if selected is None else np.flatnonzero(selected[here])
            for delta, of_model in zip(deltas[:, here], sums, strict=True):
                chosen = delta.numpy() if at is None else np.take(delta.numpy(), at)
                of_model.append(float(np.square(chosen, dtype=np.float64).sum()))
        return {(view.name, view.start): sums}

    def conclude(self, partial: Partial, context: _Weights) -> Context:
        """Narrow the selection, then settle the weights."""
        if context.largest is not None and not context.largest.complete:
            return replace(context, largest=context.largest.conclude(partial))
        pieces = list(partial.values())
        models = len(pieces[0]) if pieces else 0
        squares = [math.fsum(part for sums in pieces for part in sums[model]) for model in range(models)]
        total = math.fsum(squares)
        if self.compat == "mergekit" and context.entries:
            total = 0.0 if total / context.entries < MERGEKIT_SMALLEST_WEIGHT else total
        weights = [square / total if total else 1 / models for square in squares]
        return replace(context, complete=True, weights=weights)

    def apply(self, view: TensorView, context: _Weights) -> Tensor:
        """Return θ₀ + the weighted mean of what agrees with the elected sign."""
        deltas = self._deltas(view)
        merged = torch.empty(view.stop - view.start, dtype=deltas.dtype)
        weights = torch.tensor(context.weights, dtype=deltas.dtype)
        smallest = MERGEKIT_SMALLEST_WEIGHT if self.compat == "mergekit" else None
        for here in blocks(view):
            rows = deltas[:, here]
            sign = elect_sign(rows, majority=1.0)
            merged[here] = disjoint_merge(rows * weights[:, None], sign, "mean", context.weights, smallest)
        if self.compat == "paper":
            return take_selected(merged, view)
        selected = self._selected(view, context)
        return add_delta(view.base, merged if selected is None else keep_only(merged, selected))

    def _deltas(self, view: TensorView) -> Tensor:
        return view.deltas if self.compat == "paper" else as_stored(view.deltas, view.info.dtype)

    def _selected(self, view: TensorView, context: _Weights) -> np.ndarray | None:
        """Return which entries ``(n,)`` are selected; ``None`` for all."""
        if context.largest is None:
            return None
        return context.largest.mask(view, magnitude_bits(spread(self._deltas(view))))[0].numpy()
