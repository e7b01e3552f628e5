"""The exact largest entries of task vectors without sorting, over any number of tensors, streamed.

The magnitude pattern of an fp32 number orders like an integer. One pass counts its upper 16 bits, a second the lower 15
bits inside the bucket that holds the threshold; then the threshold is exact. Where several entries equal it and only
some may stay, a third pass counts them by grid block, and the first in order of (tensor name, flat index) stay.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_merge.methods.base import Context, Partial
from lightning_merge.task_vectors import GRID, TensorView
from lightning_merge.weights import TensorInfo

_LOW_BITS = 15
_LOW_SIZE = 1 << _LOW_BITS
_HIGH_SIZE = 1 << 16
# One above the pattern of infinity: no number reaches it.
_ABOVE_INFINITY = 0x7F800001


@dataclass
class _Threshold:
    """Of one group of tensors: for each of T tasks and R ranks, where the rank-th largest magnitude lies."""

    ranks: Tensor  # (R,) how many entries are wanted
    bucket: Tensor | None = None  # (T, R) upper bits of the threshold
    above: Tensor | None = None  # (T, R) entries in higher buckets
    bits: Tensor | None = None  # (T, R) the threshold's whole pattern; -1 keeps everything
    equal_kept: Tensor | None = None  # (T, R) how many entries equal to the threshold stay
    tied: bool = False  # whether some entries equal to the threshold must go
    equal_before: dict[tuple[str, int], list[list[int]]] = field(default_factory=dict)  # per grid block, (T, R)


@dataclass
class LargestEntries(Context):
    """Finds, for each task and each group of tensors, the exact set of the ``ranks`` largest magnitudes.

    Args:
        tensors: The tensors over which to rank.
        ranks: From the number of entries in a group to the R counts that are wanted.
        group: From a tensor's name to the group in which it is ranked; one group by default.

    Cost: two passes, a third where ties must be broken; 64 Ki counters for each task and group.
    """

    tensors: Mapping[str, TensorInfo] = field(default_factory=dict)
    ranks: Callable[[int], list[int]] = lambda count: [count]
    group: Callable[[str], Hashable] = lambda name: ""
    stage: int = 0
    groups: dict[Hashable, _Threshold] = field(default_factory=dict)

    def __post_init__(self) -> None:
        counts: dict[Hashable, int] = {}
        for name, info in self.tensors.items():
            counts[self.group(name)] = counts.get(self.group(name), 0) + info.numel
        self.groups = {key: _Threshold(torch.tensor(self.ranks(count))) for key, count in counts.items()}
        self.complete = False

    def measure(self, view: TensorView) -> Partial:
        """Count the magnitude patterns of one piece, as the current stage needs them."""
        key = self.group(view.name)
        threshold = self.groups[key]
        patterns = magnitude_bits(view.deltas)
        if self.stage == 0:
            return {key: torch.stack([torch.bincount(row >> _LOW_BITS, minlength=_HIGH_SIZE) for row in patterns])}
        if self.stage == 1:
            assert threshold.bucket is not None
            counts = [
                torch.stack([_low_counts(row, int(bucket)) for bucket in buckets])
                for row, buckets in zip(patterns, threshold.bucket, strict=True)
            ]
            return {key: torch.stack(counts)}
        if not threshold.tied:
            return {}
        assert threshold.bits is not None
        blocks: Partial = {}
        for start in range(0, patterns.shape[1], GRID):
            equal = patterns[:, start : start + GRID, None] == threshold.bits[:, None, :]
            blocks[(view.name, view.start + start)] = equal.sum(1).tolist()
        return blocks

    def conclude(self, partial: Partial) -> LargestEntries:
        """Narrow the thresholds with what a pass has counted."""
        if self.stage == 0:
            for key, threshold in self.groups.items():
                if key in partial:
                    _find_bucket(threshold, partial[key])
        elif self.stage == 1:
            for key, threshold in self.groups.items():
                if key in partial:
                    _find_bits(threshold, partial[key])
            self.complete = not any(threshold.tied for threshold in self.groups.values())
        else:
            for key, threshold in self.groups.items():
                assert threshold.equal_kept is not None
                before = torch.zeros_like(threshold.equal_kept)
                at = [where for where in partial if self.group(where[0]) == key]  # type: ignore[index]
                for where in sorted(at):  # type: ignore[type-var]
                    threshold.equal_before[where] = before.tolist()  # type: ignore[index]
                    before = before + torch.tensor(partial[where])
            self.complete = True
        self.stage += 1
        return self

    def trim(self, view: TensorView, rank: int = 0) -> Tensor:
        """Return the task vectors ``(T, n)`` of a piece with all but the largest entries set to 0."""
        threshold = self.groups[self.group(view.name)]
        assert threshold.bits is not None
        deltas = view.deltas
        if threshold.tied or deltas.dtype != torch.float32:
            return torch.where(self.mask(view, magnitude_bits(deltas), rank), deltas, 0.0)
        bits = threshold.bits[:, rank].tolist()
        # hardshrink keeps |δ| > λ: one operation, where comparing patterns takes three.
        return torch.stack(
            [nn.functional.hardshrink(row, _below(b)) if b else row for row, b in zip(deltas, bits, strict=True)]
        )

    def mask(self, view: TensorView, patterns: Tensor, rank: int = 0) -> Tensor:
        """Return which entries of a piece, ``(T, n)``, are among the largest of their task and group."""
        threshold = self.groups[self.group(view.name)]
        assert threshold.bits is not None and threshold.equal_kept is not None
        bits = threshold.bits[:, rank, None]
        if not threshold.tied:
            return patterns >= bits
        larger, equal = patterns > bits, patterns == bits
        for start in range(0, patterns.shape[1], GRID):
            block = equal[:, start : start + GRID]
            before = torch.tensor([counts[rank] for counts in threshold.equal_before[(view.name, view.start + start)]])
            left = threshold.equal_kept[:, rank] - before
            block &= block.cumsum(1) <= left[:, None]
        return larger | equal


def _below(bits: int) -> float:
    """Return the largest fp32 number whose pattern lies below ``bits``."""
    return float(torch.tensor(bits - 1, dtype=torch.int32).view(torch.float32))


def magnitude_bits(deltas: Tensor) -> Tensor:
    """Return the fp32 pattern of |δ| as int32, which orders like |δ|."""
    return deltas.to(torch.float32).view(torch.int32).bitwise_and(0x7FFFFFFF)


def _low_counts(patterns: Tensor, bucket: int) -> Tensor:
    """Count the lower bits of the entries inside one bucket."""
    # Entries outside fall into the two end bins, which costs less than gathering those inside.
    low = (patterns - (bucket << _LOW_BITS)).clamp_(-1, _LOW_SIZE).add_(1)
    return torch.bincount(low, minlength=_LOW_SIZE + 2)[1:-1]


def _find_bucket(threshold: _Threshold, counts: Tensor) -> None:
    """Find, from the counts of upper bits ``(T, 2¹⁶)``, the bucket with the rank-th largest entry."""
    at_least = counts.flip(1).cumsum(1).flip(1)  # (T, 2¹⁶) entries in this bucket or a higher one
    ranks = threshold.ranks.clamp(max=int(at_least[0, 0]))
    enough = at_least[:, None, :] >= ranks[None, :, None].clamp(min=1)  # (T, R, 2¹⁶), true up to the bucket
    threshold.ranks = ranks
    threshold.bucket = enough.sum(2) - 1
    threshold.above = torch.gather(at_least, 1, threshold.bucket) - torch.gather(counts, 1, threshold.bucket)


def _find_bits(threshold: _Threshold, counts: Tensor) -> None:
    """Find, from the counts of lower bits ``(T, R, 2¹⁵)`` inside the buckets, the exact threshold."""
    assert threshold.bucket is not None and threshold.above is not None
    at_least = counts.flip(2).cumsum(2).flip(2) + threshold.above[:, :, None]
    enough = at_least >= threshold.ranks[None, :, None].clamp(min=1)
    low = enough.sum(2) - 1  # (T, R)
    bits = (threshold.bucket << _LOW_BITS) + low
    reached = torch.gather(at_least, 2, low[:, :, None])[:, :, 0]
    equal = torch.gather(counts, 2, low[:, :, None])[:, :, 0]
    kept = threshold.ranks[None, :] - (reached - equal)
    # Zeros are all alike: whether one of them is kept changes nothing.
    zero = bits == 0
    nothing = (threshold.ranks == 0)[None, :].expand_as(bits)
    threshold.bits = torch.where(nothing, _ABOVE_INFINITY, bits).to(torch.int32)
    threshold.equal_kept = kept
    threshold.tied = bool(((equal > kept) & ~zero & ~nothing).any())
    threshold.equal_kept = torch.where(zero, torch.iinfo(torch.int64).max // 2, kept)
