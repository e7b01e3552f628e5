"""The exact largest entries of task vectors without sorting them, over any number of tensors, streamed.

The magnitude pattern of an fp32 number orders like an integer (fp64 differences are ranked after rounding to fp32). A
small sample brackets the threshold; one pass counts what lies above the bracket and collects the few entries inside,
among which the threshold is exact. Where the sample misled, or too much lies inside (few distinct magnitudes, as
between bf16 models), two passes count instead: the upper 16 bits of all patterns, then the lower 15 bits in the bucket
that holds the threshold. Where several entries equal the threshold and only some may stay, a last pass counts them by
grid block, and the first in order of (tensor name, flat index) stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from lightning_merge.methods.base import Context, Partial
from lightning_merge.tensor_view import GRID, TensorView
from lightning_merge.weights import TensorInfo

_LOW_BITS = 15
_LOW_SIZE = 1 << _LOW_BITS
_HIGH_SIZE = 1 << 16
# One above the pattern of infinity: no number reaches it.
_ABOVE_INFINITY = 0x7F800001

# Entries of each task and group that the sample aims at; the bracket then holds about 1 % of all entries.
_SAMPLE = 1 << 18
# How far the bracket reaches to both sides of the wanted rank, in standard deviations of the sample's rank.
_DEVIATIONS = 5.0
# A bracket that holds more than this share of the sample would collect too much: many entries are equal.
_WIDEST = 0.05


@dataclass
class _Threshold:
    """Of one group of tensors: for each of T tasks and R ranks, where the rank-th largest magnitude lies."""

    count: int  # entries in the group
    ranks: Tensor  # (R,) how many entries are wanted
    bracket: list[list[tuple[int, int] | None]] | None = None  # (T, R) patterns that surely enclose it, as [low, high)
    bucket: Tensor | None = None  # (T, R) upper bits of the threshold
    above: Tensor | None = None  # (T, R) entries in higher buckets
    bits: Tensor | None = None  # (T, R) the threshold's whole pattern
    equal_kept: Tensor | None = None  # (T, R) how many entries equal to the threshold stay
    tied: bool = False  # whether some entries equal to the threshold must go
    # Per grid block, (T, R): entries equal to the threshold in earlier blocks, and in this one.
    equal_before: dict[tuple[str, int], tuple[list[list[int]], list[list[int]]]] = field(default_factory=dict)

    @property
    def stride(self) -> int:
        """Which entries the sample takes; odd, so that it does not walk down one column."""
        return max(1, self.count // _SAMPLE) | 1


@dataclass
class LargestEntries(Context):
    """Finds, for each task and each group of tensors, the exact set of the ``ranks`` largest magnitudes.

    Args:
        tensors: The tensors over which to rank.
        ranks: From the number of entries in a group to the R counts that are wanted.
        group: From a tensor's name to the group in which it is ranked; one group by default.

    Cost: a pass over a sample of 2¹⁸ entries for each task and group, and one over all; one more where ties must be
    broken; two more where the sample misled. Memory: about 1 % of the group's entries for each task.
    """

    tensors: Mapping[str, TensorInfo] = field(default_factory=dict)
    ranks: Callable[[int], list[int]] = lambda count: [count]
    group: Callable[[str], Hashable] = lambda name: ""
    stage: Literal["sample", "collect", "upper bits", "lower bits", "ties"] = "sample"
    groups: dict[Hashable, _Threshold] = field(default_factory=dict)

    def __post_init__(self) -> None:
        counts: dict[Hashable, int] = {}
        for name, info in self.tensors.items():
            counts[self.group(name)] = counts.get(self.group(name), 0) + info.numel
        self.groups = {key: _Threshold(n, torch.tensor(self.ranks(n)).clamp(max=n)) for key, n in counts.items()}
        self.complete = False

    def measure(self, view: TensorView) -> Partial:
        """Measure one piece, as the current stage needs it."""
        key = self.group(view.name)
        threshold = self.groups[key]
        if self.stage == "sample":
            rows = view.sampled_deltas(threshold.stride)
            return {(key, task): bytearray(magnitude_bits(row).numpy()) for task, row in enumerate(rows)}
        if self.stage == "ties":
            return self._count_ties(view, threshold) if threshold.tied else {}
        if threshold.bits is not None:
            return {}
        patterns = torch.empty(view.stop - view.start, dtype=torch.int32)
        partial: Partial = {}
        for task, row in enumerate(view.delta_rows()):
            _magnitude_bits_into(patterns, row)
            if self.stage == "collect":
                assert threshold.bracket is not None
                for rank, bracket in enumerate(threshold.bracket[task]):
                    assert bracket is not None
                    low, high = bracket
                    reached = patterns >= low
                    over = patterns >= high
                    partial[(key, task, rank, "above")] = over.sum()
                    partial[(key, task, rank)] = bytearray(patterns[reached ^ over].numpy())
            elif self.stage == "upper bits":
                partial[(key, task)] = torch.bincount(patterns >> _LOW_BITS, minlength=_HIGH_SIZE)
            else:
                assert threshold.bucket is not None
                for rank, bucket in enumerate(threshold.bucket[task].tolist()):
                    partial[(key, task, rank)] = _low_counts(patterns, bucket)
        return partial

    def conclude(self, partial: Partial) -> LargestEntries:
        """Narrow the thresholds with what a pass has found."""
        tasks = 1 + max((key[1] for key in partial if isinstance(key, tuple)), default=-1) if partial else 0
        if self.stage == "sample":
            for key, threshold in self.groups.items():
                if threshold.count:
                    threshold.bracket = [_bracket(threshold, partial[(key, task)]) for task in range(tasks)]
            # One group whose bracket is too wide sends all to the counting passes.
            wide = any(None in row for t in self.groups.values() for row in t.bracket or [])
            self.stage = "upper bits" if wide else "collect"
            return self
        if self.stage == "collect":
            for key, threshold in self.groups.items():
                if threshold.count:
                    _find_in_bracket(threshold, key, partial)
            missed = any(threshold.bits is None for threshold in self.groups.values() if threshold.count)
            return self._after("upper bits" if missed else "ties")
        if self.stage == "upper bits":
            for key, threshold in self.groups.items():
                if threshold.bits is None and threshold.count:
                    _find_bucket(threshold, torch.stack([partial[(key, task)] for task in range(tasks)]))
            self.stage = "lower bits"
            return self
        if self.stage == "lower bits":
            for key, threshold in self.groups.items():
                if threshold.bits is None and threshold.count:
                    ranks = range(len(threshold.ranks))
                    counts = [torch.stack([partial[(key, task, rank)] for rank in ranks]) for task in range(tasks)]
                    _find_bits(threshold, torch.stack(counts))
            return self._after("ties")
        before: dict[Hashable, Tensor] = {}
        for where in sorted(partial):  # type: ignore[type-var]
            key = self.group(where[0])  # type: ignore[index]
            here = torch.tensor(partial[where])
            earlier = before.get(key, torch.zeros_like(here))
            self.groups[key].equal_before[where] = (earlier.tolist(), partial[where])  # type: ignore[index]
            before[key] = earlier + here
        self.complete = True
        return self

    def _after(self, stage: Literal["upper bits", "ties"]) -> LargestEntries:
        """Go on to a stage; the ties only where there are any."""
        self.stage = stage
        self.complete = stage == "ties" and not any(threshold.tied for threshold in self.groups.values())
        return self

    def _count_ties(self, view: TensorView, threshold: _Threshold) -> Partial:
        """Count, block by block, the entries equal to the thresholds."""
        assert threshold.bits is not None
        blocks: dict[Hashable, list[list[int]]] = {}
        patterns = torch.empty(view.stop - view.start, dtype=torch.int32)
        for row, bits in zip(view.delta_rows(), threshold.bits.tolist(), strict=True):
            _magnitude_bits_into(patterns, row)
            for start in range(0, len(patterns), GRID):
                block = patterns[start : start + GRID]
                counts = [int(torch.count_nonzero(block == bit)) for bit in bits]
                blocks.setdefault((view.name, view.start + start), []).append(counts)
        return dict(blocks)

    def trim(self, view: TensorView, rank: int = 0) -> Tensor:
        """Return the task vectors ``(T, n)`` of a piece with all but the largest entries set to 0."""
        threshold = self.groups[self.group(view.name)]
        assert threshold.bits is not None and threshold.equal_kept is not None
        deltas = view.deltas
        if deltas.dtype != torch.float32:
            return torch.where(self.mask(view, magnitude_bits(deltas), rank), deltas, 0.0)
        trimmed = torch.empty_like(deltas)
        for task, (row, out) in enumerate(zip(deltas, trimmed, strict=True)):
            bits, kept = int(threshold.bits[task, rank]), int(threshold.equal_kept[task, rank])
            for start in range(0, len(row), GRID):
                block, place = row[start : start + GRID], out[start : start + GRID]
                before, equal = 0, 0
                if threshold.tied:
                    counts = threshold.equal_before[(view.name, view.start + start)]
                    before, equal = counts[0][task][rank], counts[1][task][rank]
                if bits == 0:
                    place.copy_(block)
                    continue
                # hardshrink keeps |δ| > λ: one operation, where comparing patterns takes three.
                all_stay = before + equal <= kept
                place.copy_(nn.functional.hardshrink(block, _value(bits - 1 if all_stay else bits)))
                if not all_stay and before < kept:
                    at = (magnitude_bits(block) == bits).nonzero()[: kept - before, 0]
                    place[at] = block[at]
        return trimmed

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
            earlier, _ = threshold.equal_before[(view.name, view.start + start)]
            before = torch.tensor([counts[rank] for counts in earlier])
            left = threshold.equal_kept[:, rank] - before
            block &= block.cumsum(1) <= left[:, None]
        return larger | equal


def _value(bits: int) -> float:
    """Return the fp32 number with the pattern ``bits``."""
    return float(torch.tensor(bits, dtype=torch.int32).view(torch.float32))


def magnitude_bits(deltas: Tensor) -> Tensor:
    """Return the fp32 pattern of |δ| as int32, which orders like |δ|."""
    return deltas.to(torch.float32).view(torch.int32).bitwise_and(0x7FFFFFFF)


def _magnitude_bits_into(patterns: Tensor, row: Tensor) -> None:
    """Write the fp32 patterns of |δ| of one task into a buffer that is used again."""
    torch.bitwise_and(row.to(torch.float32).view(torch.int32), 0x7FFFFFFF, out=patterns)


def _bracket(threshold: _Threshold, sample: bytearray) -> list[tuple[int, int] | None]:
    """Enclose each wanted rank between two patterns of a sample; ``None`` where that would enclose too much."""
    ordered = np.sort(np.frombuffer(sample, dtype=np.int32))[::-1]
    brackets: list[tuple[int, int] | None] = []
    for rank in threshold.ranks.tolist():
        share = rank / threshold.count
        reach = _DEVIATIONS * math.sqrt(max(share * (1 - share) * len(ordered), 1.0)) + 2
        first, last = math.floor(share * len(ordered) - reach), math.ceil(share * len(ordered) + reach)
        high = int(ordered[first]) + 1 if first >= 0 else _ABOVE_INFINITY
        # Zeros are never collected: if the rank lies among them, everything else is kept.
        low = max(int(ordered[last]), 1) if last < len(ordered) else 1
        inside = np.count_nonzero((ordered >= low) & (ordered < high))
        small = len(ordered) == threshold.count
        brackets.append((low, high) if small or inside <= _WIDEST * len(ordered) else None)
    return brackets


def _find_in_bracket(threshold: _Threshold, key: Hashable, partial: Partial) -> None:
    """Find the exact thresholds among the collected entries; leaves them unknown where a bracket missed."""
    assert threshold.bracket is not None
    bits, kept, tied = [], [], False
    for task, brackets in enumerate(threshold.bracket):
        for rank, bracket in enumerate(brackets):
            assert bracket is not None
            low = bracket[0]
            wanted = int(threshold.ranks[rank]) - int(partial[(key, task, rank, "above")])
            inside = np.frombuffer(partial[(key, task, rank)], dtype=np.int32)
            if int(threshold.ranks[rank]) == 0:
                bits.append(_ABOVE_INFINITY)
                kept.append(0)
            elif 1 <= wanted <= len(inside):
                found = int(np.partition(inside, len(inside) - wanted)[len(inside) - wanted])
                stay = wanted - int(np.count_nonzero(inside > found))
                bits.append(found)
                kept.append(stay)
                tied |= stay < int(np.count_nonzero(inside == found))
            elif wanted > len(inside) and low == 1:
                bits.append(0)
                kept.append(torch.iinfo(torch.int64).max // 2)
            else:
                return
    shape = (len(threshold.bracket), len(threshold.ranks))
    threshold.bits = torch.tensor(bits, dtype=torch.int32).reshape(shape)
    threshold.equal_kept = torch.tensor(kept).reshape(shape)
    threshold.tied = tied


def _low_counts(patterns: Tensor, bucket: int) -> Tensor:
    """Count the lower bits of the entries inside one bucket."""
    # Entries outside fall into the two end bins, which costs less than gathering those inside.
    low = (patterns - (bucket << _LOW_BITS)).clamp_(-1, _LOW_SIZE).add_(1)
    return torch.bincount(low, minlength=_LOW_SIZE + 2)[1:-1]


def _find_bucket(threshold: _Threshold, counts: Tensor) -> None:
    """Find, from the counts of upper bits ``(T, 2¹⁶)``, the bucket with the rank-th largest entry."""
    at_least = counts.flip(1).cumsum(1).flip(1)  # (T, 2¹⁶) entries in this bucket or a higher one
    # (T, R, 2¹⁶), true up to the bucket
    enough = at_least[:, None, :] >= threshold.ranks[None, :, None].clamp(min=1)
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
