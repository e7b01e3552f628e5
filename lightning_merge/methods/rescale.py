"""What methods that drop entries share: the stored dtype, masks without branches, and norms to restore."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_merge.methods.base import Context, Partial
from lightning_merge.tensor_view import GRID, TensorView

# mergekit leaves a tensor as it is whose norm, before or after dropping, is smaller.
MERGEKIT_SMALLEST_NORM = 1e-7


def as_stored(deltas: Tensor, dtype: torch.dtype) -> Tensor:
    """Round task vectors to the dtype the base is stored in, where that has 16 bits: so mergekit keeps them."""
    return deltas.to(dtype).to(deltas.dtype) if dtype in (torch.bfloat16, torch.float16) else deltas


def keep_only(values: Tensor, keep: np.ndarray, out: Tensor | None = None) -> Tensor:
    """Return the values where ``keep`` is true and +0 elsewhere, in ``out`` if given.

    By their bits: a choice for each entry costs 3 ns where the mask is random, because no processor can foresee it.
    """
    bits = torch.from_numpy(np.negative(keep.view(np.int8)))  # all bits set where true
    integers = torch.int64 if values.dtype == torch.float64 else torch.int32
    out = torch.empty_like(values) if out is None else out
    torch.bitwise_and(bits.to(integers), values.view(integers), out=out.view(integers))
    return out


def paired(one: Any, other: Any) -> Iterator[tuple[float, float]]:
    """Yield what two settings are together, for each model that one of them names; unnamed models are checked later."""
    models = {*(one if isinstance(one, dict) else ()), *(other if isinstance(other, dict) else ())}
    for model in sorted(models) or [""]:
        first, second = (setting.get(model) if isinstance(setting, dict) else setting for setting in (one, other))
        if first is not None and second is not None:
            yield first, second


def blocks(view: TensorView) -> Iterator[slice]:
    """Yield the grid blocks of a piece, as ranges inside it: what is done in them stays in the cache."""
    for start in range(0, view.stop - view.start, GRID):
        yield slice(start, min(start + GRID, view.stop - view.start))


def absolute_sum(values: Tensor) -> float:
    """Return Σ |v| of a block in fp64, in a fixed order of summing."""
    return float(np.abs(values.numpy()).sum(dtype=np.float64))


def norms(view: TensorView, before: Tensor, after: Tensor) -> Partial:
    """Measure the L1 norms of the task vectors ``(T, n)`` of a piece before and after dropping, block by block."""
    sums = [[[absolute_sum(row[here]) for here in blocks(view)] for row in rows] for rows in (before, after)]
    return {("norm", view.name, view.start): sums}


def norm_factors(partial: Partial, smallest: float = MERGEKIT_SMALLEST_NORM) -> list[float]:
    """Return for each task ‖τ‖₁ before dropping by that after it; 1 where one of them is below ``smallest``.

    What was measured is that of one tensor.
    """
    pieces = [sums for key, sums in partial.items() if isinstance(key, tuple) and key[0] == "norm"]
    factors = []
    for task in range(len(pieces[0][0]) if pieces else 0):
        before, after = (math.fsum(part for sums in pieces for part in sums[side][task]) for side in (0, 1))
        factors.append(before / after if before >= smallest and after >= smallest else 1.0)
    return factors


@dataclass
class Thinning(Context):
    """What a transform that drops at random knows: the seed, and, once norms are measured, how to restore them."""

    seed: int = 0
    factors: list[float] = field(default_factory=list)
    # What is kept of each piece, by (tensor name, start), as one bit an entry: drawing again would cost more.
    kept: dict[Hashable, list[bytes]] = field(default_factory=dict)

    def record(self, view: TensorView, thinned: Tensor) -> Partial:
        """Note which entries of a piece are kept."""
        return {("kept", view.name, view.start): [np.packbits(row.numpy() != 0).tobytes() for row in thinned]}

    def conclude(self, partial: Partial) -> Thinning:
        """Return the context with what all pieces of one tensor have noted and measured."""
        kept: dict[Hashable, list[bytes]] = {
            key[1:]: rows for key, rows in partial.items() if isinstance(key, tuple) and key[0] == "kept"
        }
        return Thinning(complete=True, seed=self.seed, factors=norm_factors(partial), kept=kept)

    def restored(self, view: TensorView, deltas: Tensor) -> Tensor:
        """Return what is kept of the task vectors ``(T, n)``, grown to the norms from before."""
        out = torch.empty_like(deltas)
        rows = zip(out, deltas, self.kept[view.name, view.start], self.factors, strict=True)
        for place, delta, bits, factor in rows:
            keep = np.unpackbits(np.frombuffer(bits, dtype=np.uint8), count=len(delta)).view(bool)
            keep_only(delta, keep, out=place).mul_(factor)
        return out
