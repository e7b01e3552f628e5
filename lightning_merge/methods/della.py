"""DELLA (Deep et al., 2024, arXiv 2406.11617): drop entries at random, the smaller ones of a row more often."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_merge.errors import UserError
from lightning_merge.methods.base import Context, Header, Partial, PerModel, Transform, hyperparameter, per_model
from lightning_merge.methods.random import uniform
from lightning_merge.methods.rescale import Thinning, as_stored, keep_only, paired
from lightning_merge.methods.top_k import magnitude_bits
from lightning_merge.tensor_view import GRID, TensorView

# Draws for probabilities below this have 32 bits.
_SMALL = 2.0**-7


def keep_probabilities(count: int, density: float, epsilon: float) -> np.ndarray:
    """Return how likely each of ``count`` entries is kept, the largest first: from density + ε down to density − ε."""
    return density + epsilon * np.linspace(1.0, -1.0, count) if count > 1 else np.full(count, density)


def by_magnitude(rows: Tensor, coarse: bool = False) -> np.ndarray:
    """Return the flat indices ``(R, C)`` of each row's entries, the largest magnitude first; equal ones in their order.

    Args:
        rows: ``(R, C)``, ranked by what fp32 holds of them.
        coarse: Whether all entries are bf16 numbers, which sorts in half the time.
    """
    count = rows.shape[1]
    # Magnitude and column in one integer: sorting integers is many times faster than sorting indices by key.
    below = magnitude_bits(rows).bitwise_xor_(0x7FFFFFFF).numpy()
    if coarse and count <= 1 << 17:
        narrow = (below.view(np.uint32) >> np.uint32(16)) << np.uint32(17)
        narrow |= np.arange(count, dtype=np.uint32)
        narrow.sort(axis=1)
        columns = (narrow & np.uint32((1 << 17) - 1)).astype(np.int64)
    else:
        keys = below.astype(np.int64)
        keys <<= 32
        keys |= np.arange(count)
        keys.sort(axis=1)
        columns = np.bitwise_and(keys, (1 << 32) - 1, out=keys)
    columns += np.arange(0, rows.numel(), count)[:, None]
    return columns


def drop_by_rank(rows: Tensor, draws: Tensor, probabilities: np.ndarray, rescale: bool, coarse: bool = False) -> Tensor:
    """Keep the entry of rank r where its draw is below p_r, and divide it by p_r to rescale.

    Args:
        rows: ``(R, C)``.
        draws: Uniform in [0, 1), ``(R, C)``, in the order of ranks.
        probabilities: p, ``(C,)``, the largest magnitude first.
        rescale: Whether to divide.
        coarse: See :func:`by_magnitude`.
    """
    order = by_magnitude(rows, coarse)
    ranked = np.take(rows.reshape(-1).numpy(), order)
    if rescale:
        ranked /= probabilities.astype(ranked.dtype)
    kept = keep_only(torch.from_numpy(ranked), draws.numpy() < probabilities.astype(draws.numpy().dtype))
    out = torch.empty_like(rows)
    out.view(-1).numpy()[order] = kept.numpy()
    return out


@dataclass(frozen=True)
class Della(Transform):
    """Drop entries of a task vector at random, the smaller ones of each row more often, and divide by what is likely.

    In each row (a slice along the first axis, a whole vector) the kept share falls with the rank of the magnitude, in a
    line from density + ε for the largest to density − ε for the smallest; a kept entry is divided by its own
    probability. The draws depend on seed, model name, tensor name and position only. Of a vector with more than 2¹⁶
    entries each 2¹⁶ are ranked as one row.

    ``compat="mergekit"`` is the thinning of mergekit's ``della`` and ``della_linear``: task vectors are rounded to the
    dtype of the base, rows lie along the second axis (in a convolution one for each output and position), and what is
    kept grows to the L1 norm that the tensor had; a norm below 1e-7 stays as it is.

    Args:
        density: The mean share of entries that is kept, in (0, 1], for all models or one for each by name; 1 changes
            nothing. 0.7 by default.
        epsilon: ε, half the width of the paper's window, in [0, 0.5), likewise; density − ε and density + ε must lie
            between 0 and 1. 0.07 by default.
        rescale: Divide by the probabilities (or restore the norm); without it the task vector shrinks.
        compat: The ``paper``'s form, or ``mergekit``'s.

    Raises:
        UserError: density − ε or density + ε is not between 0 and 1.

    Cost: no pass of its own; one sort of integers for each row, 16 random bits an entry (32 where density − ε is
        below 2⁻⁷). Works on whole rows: 30 bytes for each of their entries. In mergekit's form one pass for the norms,
        and one bit of memory for each entry of a tensor in each model.
    Reference: Deep, Bhardwaj & Poria, 2024, DELLA-Merging, arXiv 2406.11617, section 3.1 (MagPrune).

    Example:
        >>> import torch
        >>> from lightning_merge import TaskVectors
        >>> base = {"weight": torch.tensor([1.0, 2.0, 3.0, 4.0])}
        >>> a = {"weight": torch.tensor([1.5, 2.0, 3.25, 3.0])}
        >>> b = {"weight": torch.tensor([0.75, 3.0, 3.5, 4.0])}
        >>> task_vectors = TaskVectors.open(base, {"a": a, "b": b})
        >>> from lightning_merge.methods import TaskArithmetic
        >>> TaskArithmetic(scale=1)(task_vectors, transforms=[Della(density=0.5, epsilon=0.25)], seed=1)["weight"]
        tensor([1.8571, 3.3333, 4.4571, 2.6667])
    """

    density: PerModel = hyperparameter(0.7, "(0, 1]")
    epsilon: PerModel = hyperparameter(0.07, "[0, 0.5)")
    rescale: bool = True
    compat: Literal["paper", "mergekit"] = "paper"

    paper: ClassVar[str] = "DELLA-Merging (Deep et al., 2024), arXiv 2406.11617"
    draws: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if "density" in self.varying or "epsilon" in self.varying:
            return  # checked again for each tensor
        for density, epsilon in paired(self.density, self.epsilon):
            if density < 1 and not (density - epsilon > 0 and density + epsilon < 1):
                raise UserError(
                    f"Della: density - epsilon and density + epsilon must lie between 0 and 1, got {density:g} and "
                    f"{epsilon:g}. For density {density:g}, epsilon must be below {min(density, 1 - density):g}."
                )

    @property
    def layout(self) -> Literal["rows"]:
        """Entries are ranked within their row."""
        return "rows"

    @property
    def elementwise(self) -> bool:
        """Only mergekit's form measures."""
        return not self._matches_norms

    def begin(self, header: Header) -> Context:
        """Remember the seed."""
        return Thinning(complete=not self._matches_norms, seed=header.seed)

    def measure(self, view: TensorView, context: Thinning) -> Partial:
        """Drop, and sum the norms before and after, row by row."""
        thinned = self._thinned(view, context.seed)
        sides = []
        for deltas in (self._deltas(view), thinned):
            sums: list[list[float]] = []
            for delta in deltas:
                # A row is never cut, so that its sum is the same in any piece.
                parts = [rows.double().abs_().numpy().sum(axis=1).tolist() for _, rows in _slabs(view, delta)]
                sums.append([value for part in parts for value in part])
            sides.append(sums)
        return {("norm", view.name, view.start): sides, **context.record(view, thinned)}

    def conclude(self, partial: Partial, context: Thinning) -> Context:
        """Find the factors that restore the norms."""
        return context.conclude(partial)

    def apply(self, view: TensorView, context: Thinning) -> Tensor:
        """Return the thinned task vectors ``(T, n)``."""
        return context.restored(view, self._deltas(view)) if context.kept else self._thinned(view, context.seed)

    def _thinned(self, view: TensorView, seed: int) -> Tensor:
        deltas = self._deltas(view)
        densities = per_model("Della: density", self.density, view.models)
        epsilons = per_model("Della: epsilon", self.epsilon, view.models)
        if all(density == 1 for density in densities):
            return deltas
        coarse = self.compat == "mergekit" and view.info.dtype == torch.bfloat16
        across = self.compat == "mergekit" and len(view.info.shape) > 2
        thinned = torch.empty_like(deltas)
        for task, (model, density, epsilon) in enumerate(zip(view.models, densities, epsilons, strict=True)):
            if density == 1:
                thinned[task] = deltas[task]
                continue
            # 16 bits would round small probabilities by more than a part in a thousand, but the divisor is exact.
            bits: Literal[16, 32] = 16 if density - epsilon >= _SMALL else 32
            draws = uniform(seed, model, view.name, view.start, view.stop, bits=bits)
            for here, rows in _slabs(view, deltas[task]):
                shape = rows.shape
                if across:
                    rows = rows.reshape(len(rows), view.info.shape[1], -1).transpose(1, 2)
                    shape = rows.shape
                    rows = rows.reshape(-1, view.info.shape[1])
                probabilities = keep_probabilities(rows.shape[1], density, epsilon)
                divide = self.rescale and self.compat == "paper"
                kept = drop_by_rank(rows, draws[here].reshape(rows.shape), probabilities, divide, coarse)
                kept = kept.reshape(shape).transpose(1, 2) if across else kept
                thinned[task, here] = kept.reshape(-1)
        return thinned

    @property
    def _matches_norms(self) -> bool:
        return self.rescale and self.compat == "mergekit"

    def _deltas(self, view: TensorView) -> Tensor:
        return view.deltas if self.compat == "paper" else as_stored(view.deltas, view.info.dtype)


def _slabs(view: TensorView, delta: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield ranges of a piece of whole rows, about a grid block long, and the rows ``(R, C)`` in them."""
    if not len(delta):
        return
    shape = view.info.shape
    row = view.info.numel // shape[0] if len(shape) > 1 else min(GRID, len(delta))
    step = max(GRID // row, 1) * row if len(shape) > 1 else GRID
    for start in range(0, len(delta), step):
        here = slice(start, min(start + step, len(delta)))
        yield here, delta[here].reshape(-1, row if len(shape) > 1 else here.stop - here.start)
