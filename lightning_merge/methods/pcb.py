"""PCB-Merging (Du et al., 2024, arXiv 2410.02396): entries of task vectors compete, and the best balanced are merged.

Within a task an entry counts by its size (intra-balancing), between tasks by how it agrees (inter-balancing).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_merge.methods.arcee_fusion import thresholds
from lightning_merge.methods.base import (
    Context,
    Header,
    Partial,
    PerModel,
    TensorMerge,
    hyperparameter,
    kept_count,
    ordered_sum,
    per_model,
    take_selected,
)
from lightning_merge.methods.magmax import mask_for, put_where
from lightning_merge.methods.top_k import LargestEntries, magnitude_bits
from lightning_merge.tensor_view import TensorView, add_delta, block_sums

# The released code cuts this share of magnitudes off at both ends.
_CLAMPED = 0.0001
# Entries scored at once.
_PART = 1 << 14


def competition(deltas: Tensor, low: Sequence[float], high: Sequence[float]) -> Iterator[tuple[int, int, Tensor]]:
    """Yield what the softmaxes sum, in fp64: exp(norm(τ_i ⊙ τ_j)) for all i ≤ j, then exp(T · norm(τ_i ⊙ τ_i)).

    Each comes as ``(i, j, (n,))``, the tasks' own with j = −1, and divided by its largest possible value.

    Args:
        deltas: τ, ``(T, n)``.
        low: The smallest product of each pair over the model.
        high: The largest; where that is the same, norm is constant.
    """
    rows = deltas.double()

    def rivals(i: int, j: int, number: int, factor: float) -> Tensor:
        width = high[number] - low[number]
        # norm − 1 is the distance to the largest product in units of the width.
        return (rows[i] * rows[j]).sub_(high[number]).mul_(factor / width if width else 0.0).exp_()

    for number, (i, j) in enumerate(pairs(len(rows))):
        yield i, j, rivals(i, j, number, 1.0)
    for number, (i, j) in enumerate(pairs(len(rows))):
        if i == j:
            yield i, -1, rivals(i, i, number, float(len(rows)))


def pairs(count: int) -> list[tuple[int, int]]:
    """Return all pairs of tasks i ≤ j."""
    return [(i, j) for i in range(count) for j in range(i, count)]


def paper_scores(deltas: Tensor, low: Sequence[float], high: Sequence[float], masses: Sequence[float]) -> Tensor:
    """Return β = softmax(T norm(τ_i ⊙ τ_i)) ⊙ Σ_j softmax(norm(τ_i ⊙ τ_j)), up to one factor for all.

    Args:
        deltas: τ, ``(T, n)``.
        low: The smallest product of each pair over the model.
        high: The largest.
        masses: The mean over the model of each vector that :func:`competition` yields.

    Returns:
        fp64 ``(T, n)``.
    """
    scores = torch.zeros(deltas.shape, dtype=torch.float64)
    for mass, (i, j, rival) in zip(masses, competition(deltas, low, high), strict=True):
        if j < 0:
            scores[i] *= rival.mul_(1 / mass)
            continue
        scores[i].add_(rival, alpha=1 / mass)
        if i != j:
            scores[j].add_(rival, alpha=1 / mass)
    return scores


def code_scores(deltas: Tensor, clamped: Tensor, low: Sequence[float], high: Sequence[float]) -> Tensor:
    """Return exp(T norm(|τ̂_i|)²) ⊙ tanh(τ_i ⊙ Σ_j τ_j), and 0 where that is negative; ``(T, n)`` fp64."""
    rows = deltas.double()
    scores = ordered_sum(rows) * rows
    scores.tanh_().clamp_(min=0)
    for score, row, least, most in zip(scores, clamped.double().abs(), low, high, strict=True):
        norm = (row - least).div_(most - least) if most > least else torch.zeros_like(row)
        score *= norm.square_().mul_(len(rows)).exp_()
    return scores


def balanced_mean(deltas: Tensor, weights: Tensor, scales: Sequence[float]) -> Tensor:
    """Return Σ w_i λ_i τ_i / Σ w_i, 0 where no weight is left, and exactly λ τ where one is; ``(T, n)`` to ``(n,)``."""
    total, mean, only = torch.zeros_like(weights[0]), torch.zeros_like(weights[0]), torch.zeros_like(weights[0])
    count = torch.zeros_like(weights[0])
    for delta, weight, scale in zip(deltas.double(), weights, scales, strict=True):
        taken = weight.gt(0).to(weight.dtype)
        count += taken
        total += weight
        mean.addcmul_(weight, delta, value=scale)
        only += taken.mul_(delta).mul_(scale)
    mean /= total.add_(torch.eq(count, 0))
    return put_where(mean, only, torch.le(count, 1, out=mask_for(count))).to(deltas.dtype)


@dataclass
class _Limits(Context):
    """What the scores go by, found in this order."""

    models: tuple[str, ...] = ()
    moved: list[int] = field(default_factory=list)  # the tasks that changed anything
    low: list[float] = field(default_factory=list)  # smallest products of each pair; or magnitudes of each task
    high: list[float] = field(default_factory=list)
    masses: list[float] = field(default_factory=list)  # means of what the softmaxes sum, of each pair and each task
    magnitudes: LargestEntries | None = None
    largest: LargestEntries | None = None


@dataclass(frozen=True)
class Pcb(TensorMerge):
    """Merge, entry by entry, the task vectors that win a parameter competition: θ₀ + Σ β̂_i λ_i τ_i / Σ β̂_i.

    β_i = softmax(T · norm(τ_i ⊙ τ_i)) ⊙ Σ_j softmax(norm(τ_i ⊙ τ_j)) over all entries of the model, norm scaling to
    [0, 1]; β̂ keeps exactly the ⌊ratio · D⌋ largest entries of a task (at least one; of equal ones the first by tensor
    name and flat index), ranked in fp32. A task vector that is 0 takes no part.

    The released code differs: it clamps |τ| to its 0.0001 quantiles, scores exp(T · norm(|τ|)²) · tanh(τ_i ⊙ Σ_j τ_j),
    and takes as weights the scores from the smallest kept one (weight 0) to the largest (weight 1). Here its weights
    begin at a score of 0 where fewer entries than kept ones score above that, and what equals the smallest kept score
    in fp32 has weight 0.

    Args:
        ratio: Fraction of each task vector kept, in (0, 1]; the authors use 0.05 to 0.2, 0.1 by default.
        scale: λ, for all models or one for each by name, in [-100, 100]; 1 by default. The authors choose 0.8 to 2.2
            on validation data.
        variant: ``paper``, or ``code`` as the authors released it.

    Cost: passes for the extreme products, for the softmax sums, over a sample, to rank and to apply, with T (T + 3) / 2
        fp64 exponentials for each entry in all but the first; ``code`` takes one more over a sample, and 2 T.
    Reference: Du et al., 2024, Parameter Competition Balancing for Model Merging, arXiv 2410.02396, section 3.

    Example:
        >>> import torch
        >>> from lightning_merge import TaskVectors
        >>> base = {"weight": torch.tensor([1.0, 2.0, 3.0, 4.0])}
        >>> a = {"weight": torch.tensor([1.5, 2.0, 3.25, 3.0])}
        >>> b = {"weight": torch.tensor([0.75, 3.0, 3.5, 4.0])}
        >>> task_vectors = TaskVectors.open(base, {"a": a, "b": b})
        >>> Pcb(ratio=0.5)(task_vectors)["weight"]
        tensor([1.0000, 3.0000, 3.4019, 3.0000])
    """

    ratio: float = hyperparameter(0.1, "(0, 1]")
    scale: PerModel = hyperparameter(1.0, "[-100, 100]")
    variant: Literal["paper", "code"] = "paper"

    paper: ClassVar[str] = "PCB-Merging (Du et al., 2024), arXiv 2410.02396"

    @property
    def reads_own_entries(self) -> bool:
        """Entries that equal one model's are that model's own."""
        return True

    @property
    def measuring_passes(self) -> float:
        """Extremes, sums of scores, their ranks, and what they are scaled by."""
        return 5.0

    @property
    def reach(self) -> Literal["tensor", "model"]:
        """Scores compete over the whole model."""
        return "model"

    def begin(self, header: Header) -> Context:
        """Plan the ranks."""
        if self.variant == "paper":
            ranks = LargestEntries(tensors=header.tensors, ranks=lambda count: [max(1, kept_count(self.ratio, count))])
            return _Limits(complete=False, models=header.models, largest=ranks)

        def ends(count: int) -> list[int]:
            # Ascending places ⌊0.0001 D⌋ and ⌊0.9999 D − 1⌋, as ranks from the largest.
            return [count - math.floor(count * _CLAMPED), count - max(0, math.floor(count * (1 - _CLAMPED) - 1))]

        ranks = LargestEntries(
            tensors=header.tensors, ranks=lambda count: [count - kept_count(1 - self.ratio, count), 1]
        )
        return _Limits(complete=False, magnitudes=LargestEntries(tensors=header.tensors, ranks=ends), largest=ranks)

    def measure(self, view: TensorView, context: _Limits) -> Partial:
        """Find extreme products, softmax sums and ranks, or magnitudes and ranks."""
        if context.magnitudes is not None and not context.magnitudes.complete:
            return context.magnitudes.measure(view)
        deltas = view.deltas
        if self.variant == "paper" and not context.low:
            rows = deltas.double()
            extremes = [torch.stack((rows[i] * rows[j]).aminmax()) for i, j in pairs(len(rows))]
            return {"products": bytearray(torch.stack(extremes).numpy().tobytes())}
        if self.variant == "paper" and not context.masses:
            rivals = competition(_moved(deltas, context), context.low, context.high)
            # Integers add exactly, in whatever order.
            return {number: sum(map(_fixed, block_sums(rival))) for number, (_, _, rival) in enumerate(rivals)}
        assert context.largest is not None
        return context.largest.measure(view)

    def conclude(self, partial: Partial, context: _Limits) -> Context:
        """Settle what a pass has measured."""
        assert context.largest is not None
        if not partial:
            return _Limits(largest=context.largest)
        if context.magnitudes is not None and not context.magnitudes.complete:
            context.magnitudes.conclude(partial)
            found = thresholds(context.magnitudes)
            if found is not None:
                # Which of several equal magnitudes come first does not matter here.
                context.magnitudes.complete = True
                context.low, context.high = [row[0] for row in found], [row[1] for row in found]
                context.moved = list(range(len(found)))
                context.largest.score = functools.partial(self._scores, context=context)
            return context
        if self.variant == "paper" and not context.low:
            return _with_products(np.frombuffer(partial["products"]), len(context.models), context)
        if self.variant == "paper" and not context.masses:
            entries = sum(info.numel for info in context.largest.tensors.values())
            context.masses = [partial[number] / _fixed(1.0) / entries for number in range(len(partial))]
            context.largest.score = functools.partial(self._scores, context=context)
            return context
        context.largest.conclude(partial)
        # In the released code's form an entry at the threshold has no weight: which of several stay does not matter.
        known = self.variant == "code" and thresholds(context.largest) is not None
        context.complete = known or context.largest.complete
        return context

    def apply(self, view: TensorView, context: _Limits) -> Tensor:
        """Return θ₀ + the balanced mean of what won."""
        scales = per_model("Pcb: scale", self.scale, view.models)
        if not context.moved:
            return add_delta(view.base, torch.zeros_like(view.base))
        assert context.largest is not None
        deltas = _moved(view.deltas, context)
        scores = self._scores(view.deltas, context)
        if self.variant == "paper":
            scores *= context.largest.mask(view, magnitude_bits(scores))
        else:
            deltas = _clamped(deltas, context)
            for score, (least, most) in zip(scores, thresholds(context.largest) or [], strict=True):
                # The threshold is an fp32 number: what an fp64 score has beyond it is rounding, yet would be a weight.
                above = score.float().gt(least)
                score.sub_(least).div_(most - least if most > least else math.inf).clamp_(0, 1).mul_(above)
        merged = balanced_mean(deltas, scores, [scales[position] for position in context.moved])
        if self.variant == "paper" and set(scales) == {1.0}:
            return take_selected(merged, view, context.moved)
        return add_delta(view.base, merged)

    def _scores(self, deltas: Tensor, context: _Limits) -> Tensor:
        parts = []
        # Small enough that the many intermediate rows stay in the cache.
        for part in _moved(deltas, context).split(_PART, dim=1):
            if self.variant == "paper":
                parts.append(paper_scores(part, context.low, context.high, context.masses))
            else:
                parts.append(code_scores(part, _clamped(part, context), context.low, context.high))
        return torch.cat(parts, 1)


def _moved(deltas: Tensor, context: _Limits) -> Tensor:
    """Return the rows of the tasks that changed anything."""
    return deltas if len(context.moved) == len(deltas) else deltas[context.moved]


def _clamped(deltas: Tensor, context: _Limits) -> Tensor:
    """Return the task vectors with their magnitudes between the bounds, their signs kept."""
    limits = (torch.tensor(ends, dtype=deltas.dtype)[:, None] for ends in (context.low, context.high))
    return deltas.abs().clamp(*limits).mul_(deltas.sign())


def _fixed(value: float) -> int:
    """Return a sum of numbers up to 1 in units of 2⁻⁶⁴, below its own rounding."""
    return int(math.ldexp(value, 64))


def _with_products(products: np.ndarray, count: int, context: _Limits) -> _Limits:
    """Keep the extremes (smallest and largest by pair, piece after piece) of the tasks that changed anything."""
    products = products.reshape(-1, len(pairs(count)), 2)
    low, high = products[:, :, 0].min(0).tolist(), products[:, :, 1].max(0).tolist()
    context.moved = [i for number, (i, j) in enumerate(pairs(count)) if i == j and high[number] > 0]
    numbers = [n for n, pair in enumerate(pairs(count)) if set(pair) <= set(context.moved)]
    context.low, context.high = [low[n] for n in numbers], [high[n] for n in numbers]
    context.complete = not context.moved
    return context
