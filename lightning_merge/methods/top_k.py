"""The exact largest entries of task vectors without sorting them, over any number of tensors, streamed.

The magnitude pattern of an fp32 number orders like an integer (fp64 differences are ranked after rounding to fp32). A
small sample brackets the threshold; one pass counts what lies above the bracket and looks at the few entries inside.
Magnitudes that the sample met often (between bf16 models there are few distinct ones) are counted there block by block,
the others collected; among both the threshold is exact. Where the sample misled, two passes count instead: the upper 16
bits of all patterns, then the lower 15 bits in the bucket that holds the threshold. Where several entries equal the
threshold and only some may stay, the first in order of (tensor name, flat index) do; for a threshold that was not
counted by blocks, a last pass does that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_merge.methods.base import Context, Partial
from lightning_merge.tensor_view import GRID, TensorView
from lightning_merge.weights import TensorInfo

_LOW_BITS = 15
_LOW_SIZE = 1 << _LOW_BITS
_HIGH_SIZE = 1 << 16
_MAGNITUDE = 0x7FFFFFFF
# One above the pattern of infinity: no number reaches it.
_ABOVE_INFINITY = 0x7F800001

# Entries of each task and group that the sample aims at: a sixteenth, within these bounds. The bracket of a large group
# then holds about 1 % of all entries.
_SMALLEST_SAMPLE, _LARGEST_SAMPLE = 1 << 14, 1 << 18
# How far the bracket reaches to both sides of the wanted rank, in standard deviations of the sample's rank.
_DEVIATIONS = 5.0
# A magnitude that holds this share of the sample is counted block by block; there are at most 16 in a bracket.
_OFTEN, _MOST_COUNTED = 1 / 2048, 16
# A bracket in which more than this share of the sample would be collected is too wide.
_WIDEST = 0.05

# From the number of entries in a group to the counts that are wanted: the same for all tasks, or one list for each.
Ranks = Callable[[int], "Sequence[int] | Sequence[Sequence[int]]"]


@dataclass
class _Cut:
    """Where the rank-th largest magnitude of one task and group lies."""

    rank: int
    bracket: tuple[int, int] | None = None  # patterns that surely enclose it, as [low, high)
    counted: list[int] = field(default_factory=list)  # patterns inside, ascending, that are counted block by block
    bucket: int = 0  # upper bits of the threshold
    above: int = 0  # entries in higher buckets
    bits: int | None = None  # the threshold's whole pattern
    kept: int = 0  # how many entries equal to the threshold stay
    tied: bool = False  # whether some entries equal to the threshold must go
    # Per grid block: entries equal to the threshold in earlier blocks, and in this one.
    equal_before: dict[tuple[str, int], tuple[int, int]] = field(default_factory=dict)

    def settle(self, bits: int, kept: int, equal: int) -> None:
        """Set the threshold, at which ``kept`` of ``equal`` entries stay."""
        # Zeros are all alike: whether one of them is kept changes nothing.
        self.bits, self.kept, self.tied = bits, kept, 0 < bits < _ABOVE_INFINITY and kept < equal

    def runs(self, view: TensorView) -> Iterator[tuple[slice, int, int]]:
        """Yield ranges of a piece, the lowest pattern that stays in each, and how many just below it stay too."""
        assert self.bits is not None
        if not self.tied:
            yield slice(0, view.stop - view.start), self.bits, 0
            return
        for start in range(view.start, view.stop, GRID):
            before, equal = self.equal_before[view.name, start]
            here = slice(start - view.start, min(start + GRID, view.stop) - view.start)
            if before + equal <= self.kept:
                yield here, self.bits, 0
            else:
                yield here, self.bits + 1, max(self.kept - before, 0)


@dataclass
class _Group:
    """Tensors that are ranked together."""

    count: int  # entries
    cuts: list[list[_Cut]] = field(default_factory=list)  # for each task, for each of the wanted ranks

    @property
    def stride(self) -> int:
        """Which entries the sample takes; odd, so that it does not walk down one column."""
        sample = min(max(self.count >> 4, _SMALLEST_SAMPLE), _LARGEST_SAMPLE)
        return max(1, self.count // sample) | 1

    def open_cuts(self) -> Iterator[tuple[int, int, _Cut]]:
        """Yield (task, rank's number, cut) of the thresholds that are not known yet."""
        return ((t, r, cut) for t, cuts in enumerate(self.cuts) for r, cut in enumerate(cuts) if cut.bits is None)


@dataclass
class LargestEntries(Context):
    """Finds, for each task and each group of tensors, the exact set of the largest magnitudes.

    Args:
        tensors: The tensors over which to rank.
        ranks: From the number of entries in a group to how many are wanted: R counts for all tasks, or for each.
        group: From a tensor's name to the group in which it is ranked; one group by default.
        score: From task vectors ``(T, n)`` to the rows that are ranked, entry by entry; the task vectors by default.
        nonzero: Whether only entries that are not 0 count for ``ranks``.

    Cost: a pass over a sample of at most 2¹⁸ entries for each task and group, and one over all; one more where rare
    ties must be broken; two more where the sample misled. Memory: about 1 % of the group's entries for each task.
    """

    tensors: Mapping[str, TensorInfo] = field(default_factory=dict)
    ranks: Ranks = lambda count: [count]
    group: Callable[[str], Hashable] = lambda name: ""
    score: Callable[[Tensor], Tensor] | None = None
    nonzero: bool = False
    stage: Literal["sample", "collect", "upper bits", "lower bits", "ties"] = "sample"
    groups: dict[Hashable, _Group] = field(default_factory=dict)

    def __post_init__(self) -> None:
        counts: dict[Hashable, int] = {}
        for name, info in self.tensors.items():
            counts[self.group(name)] = counts.get(self.group(name), 0) + info.numel
        self.groups = {key: _Group(count) for key, count in counts.items()}
        self.complete = False

    # --- measuring -----------------------------------------------------------------------------------------------

    def measure(self, view: TensorView) -> Partial:
        """Measure one piece, as the current stage needs it."""
        key = self.group(view.name)
        group = self.groups[key]
        partial: Partial = {}
        if self.stage == "sample":
            rows: Iterable[Tensor] = view.sampled_deltas(group.stride)
            rows = rows if self.score is None else self.score(torch.stack(list(rows)))
            return {("sample", key, task): bytearray(magnitude_bits(row).numpy()) for task, row in enumerate(rows)}
        wanted = [[cut for cut in cuts if cut.tied and not cut.equal_before] for cuts in group.cuts]
        if not (any(map(any, wanted)) if self.stage == "ties" else any(group.open_cuts())):
            return partial
        buffer = np.empty(GRID, dtype=np.int32)
        for task, row in enumerate(view.delta_rows() if self.score is None else self.score(view.deltas)):
            numbers = row.to(torch.float32).numpy().view(np.int32)
            for start in range(0, len(numbers), GRID):
                block = numbers[start : start + GRID]
                block = np.bitwise_and(block, _MAGNITUDE, out=buffer[: len(block)])
                where = (view.name, view.start + start)
                if self.stage == "collect":
                    self._collect(partial, key, task, where, block)
                elif self.stage == "ties":
                    equal = [int(np.count_nonzero(block == cut.bits)) for cut in wanted[task]]
                    partial.setdefault(("ties", *where), []).append(equal)
                else:
                    self._count_bits(partial, key, task, block)
        return partial

    def _collect(self, partial: Partial, key: Hashable, task: int, where: tuple[str, int], block: np.ndarray) -> None:
        """Count what lies above each bracket, and collect or count what lies inside."""
        if self.nonzero:
            _add(partial, ("nonzero", key, task), int(np.count_nonzero(block)))
        counts: list[list[int]] = []
        for rank, cut in enumerate(self.groups[key].cuts[task]):
            if cut.bits is not None:
                counts.append([])
                continue
            assert cut.bracket is not None
            low, high = cut.bracket
            inside, over = block >= low, block >= high
            _add(partial, ("above", key, task, rank), int(np.count_nonzero(over)))
            found = block[np.flatnonzero(np.logical_xor(inside, over, out=inside))]
            if cut.counted:
                found.sort()
                ends = [np.searchsorted(found, cut.counted, side).tolist() for side in ("left", "right")]
                counts.append([last - first for first, last in zip(*ends, strict=True)])
                found = np.concatenate([found[a:b] for a, b in zip([0, *ends[1]], [*ends[0], None], strict=True)])
            else:
                counts.append([])
            collected = partial.setdefault(("inside", key, task, rank), bytearray())
            collected += found.tobytes()
        if any(counts):
            place = ("counted", *where, task)
            partial[place] = counts

    def _count_bits(self, partial: Partial, key: Hashable, task: int, block: np.ndarray) -> None:
        """Count the upper bits of all entries, or the lower bits of those inside a bucket."""
        patterns = torch.from_numpy(block)
        if self.stage == "upper bits":
            _add(partial, ("upper", key, task), torch.bincount(patterns >> _LOW_BITS, minlength=_HIGH_SIZE))
            if self.nonzero:
                _add(partial, ("nonzero", key, task), int(np.count_nonzero(block)))
            return
        for rank, cut in enumerate(self.groups[key].cuts[task]):
            if cut.bits is None:
                # Entries outside fall into the two end bins, which costs less than gathering those inside.
                low = (patterns - (cut.bucket << _LOW_BITS)).clamp_(-1, _LOW_SIZE).add_(1)
                _add(partial, ("lower", key, task, rank), torch.bincount(low, minlength=_LOW_SIZE + 2)[1:-1])

    # --- concluding ----------------------------------------------------------------------------------------------

    def conclude(self, partial: Partial) -> LargestEntries:
        """Narrow the thresholds with what a pass has found."""
        if self.stage == "sample":
            for key, group in self.groups.items():
                samples: list[np.ndarray] = []
                while ("sample", key, len(samples)) in partial:
                    samples.append(np.frombuffer(partial["sample", key, len(samples)], dtype=np.int32))
                group.cuts = [self._brackets(group, task, sample) for task, sample in enumerate(samples)]
            # One group whose bracket is too wide sends all to the counting passes.
            wide = any(cut.bracket is None for group in self.groups.values() for _, _, cut in group.open_cuts())
            self.stage = "upper bits" if wide else "collect"
            return self
        if self.stage != "ties":
            self._count_nonzero(partial)
        if self.stage == "collect":
            places = self._places(partial, "counted")
            for key, group in self.groups.items():
                for task, rank, cut in list(group.open_cuts()):
                    every = places.get(key, []) if cut.counted else []
                    blocks = {at[1:3]: partial[at][rank] for at in every if at[3] == task}
                    inside = np.frombuffer(partial["inside", key, task, rank], dtype=np.int32)
                    _find_in_bracket(cut, partial["above", key, task, rank], inside, blocks)
            missed = any(any(group.open_cuts()) for group in self.groups.values())
            return self._after("upper bits" if missed else "ties")
        if self.stage == "upper bits":
            for key, group in self.groups.items():
                for task, _, cut in group.open_cuts():
                    cut.bucket, reached, there = _holding(partial["upper", key, task], cut.rank)
                    cut.above = reached - there
            self.stage = "lower bits"
            return self
        if self.stage == "lower bits":
            for key, group in self.groups.items():
                for task, rank, cut in list(group.open_cuts()):
                    low, reached, equal = _holding(partial["lower", key, task, rank], cut.rank - cut.above)
                    bits = (cut.bucket << _LOW_BITS) + low if cut.rank else _ABOVE_INFINITY
                    cut.settle(bits, cut.rank - cut.above - (reached - equal), equal)
            return self._after("ties")
        places = self._places(partial, "ties")
        for key, group in self.groups.items():
            for task, cuts in enumerate(group.cuts):
                waiting = [cut for cut in cuts if cut.tied and not cut.equal_before]
                for number, cut in enumerate(waiting):
                    cut.equal_before = _running({at[1:]: partial[at][task][number] for at in places[key]})
        self.complete = True
        return self

    def _places(self, partial: Partial, what: str) -> dict[Hashable, list[Any]]:
        """Return by group the keys, in order, of what was counted by grid block."""
        places: dict[Hashable, list[Any]] = {}
        for at in sorted(key for key in partial if isinstance(key, tuple) and key[0] == what):
            places.setdefault(self.group(at[1]), []).append(at)
        return places

    def _brackets(self, group: _Group, task: int, sample: np.ndarray) -> list[_Cut]:
        """Enclose what is wanted of one task between patterns of its sample."""
        ordered = np.sort(sample)[::-1]
        count, whole = group.count, len(sample) == group.count
        if self.nonzero:
            ordered = ordered[: np.count_nonzero(ordered)]
            count = len(ordered) if whole else count
        cuts = [_Cut(min(rank, count)) for rank in self._wanted(count, task)]
        for cut in cuts:
            cut.bracket, cut.counted = _bracket(cut.rank / max(count, 1), ordered, whole)
            if cut.rank == 0 and not (self.nonzero and not whole):
                cut.settle(_ABOVE_INFINITY, 0, 0)
        return cuts

    def _wanted(self, count: int, task: int) -> list[int]:
        ranks = self.ranks(count)
        return [int(rank) for rank in (ranks[task] if ranks and isinstance(ranks[0], Sequence) else ranks)]  # type: ignore[arg-type,union-attr]

    def _count_nonzero(self, partial: Partial) -> None:
        """Set the ranks by the number of entries that are not 0, now that it is known."""
        for key, group in self.groups.items():
            for task, cuts in enumerate(group.cuts):
                if ("nonzero", key, task) in partial:
                    count = int(partial["nonzero", key, task])
                    for cut, rank in zip(cuts, self._wanted(count, task), strict=True):
                        cut.rank = min(rank, count)

    def _after(self, stage: Literal["upper bits", "ties"]) -> LargestEntries:
        """Go on to a stage; to the ties only where some were not counted yet."""
        self.stage = stage
        every = [cut for group in self.groups.values() for cuts in group.cuts for cut in cuts]
        self.complete = stage == "ties" and not any(cut.tied and not cut.equal_before for cut in every)
        return self

    # --- applying ------------------------------------------------------------------------------------------------

    def cuts(self, view: TensorView, rank: int = 0) -> list[_Cut]:
        """Return the thresholds that hold in a piece, one for each task."""
        return [cuts[rank] for cuts in self.groups[self.group(view.name)].cuts]

    def trim(self, view: TensorView, rank: int = 0, values: Tensor | None = None) -> Tensor:
        """Return the task vectors ``(T, n)`` of a piece with all but the largest entries set to 0.

        Args:
            view: The piece.
            rank: Which of the wanted counts.
            values: The rows that were ranked, where they are not the piece's task vectors.
        """
        values = view.deltas if values is None else values
        if values.dtype != torch.float32:
            return torch.where(self.mask(view, magnitude_bits(values), rank), values, 0.0)
        trimmed = torch.empty_like(values)
        for cut, row, out in zip(self.cuts(view, rank), values, trimmed, strict=True):
            for here, lowest, extra in cut.runs(view):
                block, place = row[here], out[here]
                if lowest == 0:
                    place.copy_(block)
                    continue
                # hardshrink keeps |δ| > λ: one operation, where comparing patterns takes three.
                torch.ops.aten.hardshrink.out(block, _value(lowest - 1), out=place)
                if extra:
                    at = (magnitude_bits(block) == lowest - 1).nonzero()[:extra, 0]
                    place[at] = block[at]
        return trimmed

    def mask(self, view: TensorView, patterns: Tensor, rank: int = 0) -> Tensor:
        """Return which entries of a piece, by their patterns ``(T, n)``, are among the largest of task and group."""
        mask = np.empty(tuple(patterns.shape), dtype=bool)
        for cut, row, out in zip(self.cuts(view, rank), patterns.numpy(), mask, strict=True):
            for here, lowest, extra in cut.runs(view):
                np.greater_equal(row[here], lowest, out=out[here])
                if extra:
                    out[here][np.flatnonzero(row[here] == lowest - 1)[:extra]] = True
        return torch.from_numpy(mask)


def _add(partial: Partial, key: Hashable, value: int | Tensor) -> None:
    partial[key] = partial[key] + value if key in partial else value


def _value(bits: int) -> float:
    """Return the fp32 number with the pattern ``bits``."""
    return float(np.int32(bits).view(np.float32))


def magnitude_bits(deltas: Tensor) -> Tensor:
    """Return the fp32 pattern of |δ| as int32, which orders like |δ|."""
    return deltas.to(torch.float32).view(torch.int32).bitwise_and(_MAGNITUDE)


def _bracket(share: float, ordered: np.ndarray, whole: bool) -> tuple[tuple[int, int] | None, list[int]]:
    """Enclose a rank between two patterns of a sample, and name those that are worth counting block by block.

    Args:
        share: The rank, of all entries.
        ordered: The sample's patterns, the largest first.
        whole: Whether it holds all entries.

    Returns:
        The bracket, ``None`` where too much would be collected, and what to count inside.
    """
    count = len(ordered)
    reach = 1.0 if whole else _DEVIATIONS * math.sqrt(max(share * (1 - share) * count, 1.0)) + 2
    first, last = math.floor(share * count - reach), math.ceil(share * count + reach)
    high = int(ordered[first]) + 1 if first >= 0 else _ABOVE_INFINITY
    # Zeros are never collected: if the rank lies among them, everything else is kept.
    low = max(int(ordered[last]), 1) if last < count else 1
    inside, times = np.unique(ordered[(ordered >= low) & (ordered < high)], return_counts=True)
    often = np.argsort(-times, kind="stable")[:_MOST_COUNTED]
    often = np.sort(often[times[often] >= max(2, _OFTEN * count)])
    rest = int(times.sum() - times[often].sum())
    return (low, high) if whole or rest <= _WIDEST * count else None, inside[often].tolist()


def _find_in_bracket(cut: _Cut, above: int, inside: np.ndarray, blocks: dict[tuple[str, int], list[int]]) -> None:
    """Find the exact threshold among what was collected and counted; leaves it unknown where the bracket missed."""
    assert cut.bracket is not None
    if cut.rank == 0:
        cut.settle(_ABOVE_INFINITY, 0, 0)
        return
    wanted = cut.rank - above
    if wanted < 1:
        return
    ordered = np.sort(inside)[::-1]
    done = 0
    for number in reversed(range(len(cut.counted) + 1)):
        # What was collected above a counted pattern, then that pattern; at last what was collected below all of them.
        pattern = cut.counted[number - 1] if number else 0
        larger = len(ordered) - int(np.searchsorted(ordered[::-1], pattern, "right"))
        if wanted <= larger - done:
            bits = int(ordered[done + wanted - 1])
            first, last = (len(ordered) - int(np.searchsorted(ordered[::-1], bits, side)) for side in ("right", "left"))
            cut.settle(bits, done + wanted - first, last - first)
            return
        wanted, done = wanted - (larger - done), larger
        if number:
            equal = {where: counts[number - 1] for where, counts in blocks.items()}
            total = sum(equal.values())
            if wanted <= total:
                cut.settle(pattern, wanted, total)
                cut.equal_before = _running(equal) if cut.tied else {}
                return
            wanted -= total
    if cut.bracket[0] == 1:
        cut.settle(0, 0, 0)


def _running(equal: Mapping[tuple[str, int], int]) -> dict[tuple[str, int], tuple[int, int]]:
    """Turn counts by block, in order, into (counts in the blocks before, here)."""
    before, found = 0, {}
    for where, here in equal.items():
        found[where] = (before, here)
        before += here
    return found


def _holding(counts: Tensor, rank: int) -> tuple[int, int, int]:
    """Find the bin that holds the rank-th largest entry, how many lie in it or above, and in it."""
    at_least = counts.flip(0).cumsum(0).flip(0)
    position = int((at_least >= max(rank, 1)).sum()) - 1
    return position, int(at_least[position]), int(counts[position])
