"""Merges that are linear combinations whose coefficients follow from inner products of the models alone.

Slerp, Karcher means and model stock stay in the span of the models: one pass over the weights measures the T x T inner
products (the Gram matrix), all iterating is done on T numbers, and one more pass combines the models.
"""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_merge.methods.base import Context, Header, Partial, TensorMerge
from lightning_merge.tensor_view import GRID, TensorView, add_delta

Array = NDArray[np.float64]
# A tensor as one vector; each slice along the first axis; along the last axis; across the slices of the first axis.
Extent = Literal["tensor", "row", "last", "column"]

# Products of so many entries are summed in the computing dtype, sums of those in fp64. Each run is one call of the same
# dot product, whatever stands beside it in the piece, so that no chunking changes a bit.
RUN = 1 << 10
# Squared norms of runs between these have lost nothing to underflow or overflow in fp32.
_SMALLEST, _LARGEST = 2.0**-90, 3e38
# Vectors closer to opposite than 1.4e-3 radian: in which plane one turns into the other is lost in fp32's rounding.
OPPOSITE = 1e-6


def block_products(vectors: Sequence[Tensor]) -> list[list[float]]:
    """Return ⟨x_s, x_t⟩ of flat vectors for s ≤ t, each as one number for each grid block of 2¹⁶.

    What fills no run is taken in fp64, so that small tensors are exact to fp64's rounding.
    """
    arrays = [vector.numpy() for vector in vectors]
    pairs = list(itertools.combinations_with_replacement(range(len(arrays)), 2))
    size = len(arrays[0])
    whole, blocks = size // RUN * RUN, size // GRID
    sums = _run_products([array[:whole].reshape(-1, RUN) for array in arrays])
    inside = blocks * (GRID // RUN)
    full = sums[:, :inside].reshape(len(pairs), blocks, GRID // RUN).sum(axis=2).tolist()
    if size == blocks * GRID:
        return full
    rests = [array[whole:].astype(np.float64) for array in arrays]
    ends = sums[:, inside:].sum(axis=1).tolist()
    return [[*f, end + float(rests[i] @ rests[j])] for f, end, (i, j) in zip(full, ends, pairs, strict=True)]


def row_products(vectors: Sequence[Tensor]) -> Array:
    """Return the inner products of T x R vectors: T matrices ``(R, n)`` to ``(T, T, R)``."""
    arrays = [vector.numpy() for vector in vectors]
    rows, width = arrays[0].shape
    whole = width // RUN * RUN
    rests = [array[:, whole:].astype(np.float64) for array in arrays]
    runs = iter(_run_products([array[:, :whole].reshape(rows, whole // RUN, RUN) for array in arrays]))

    def products(i: int, j: int) -> Array:
        found: Array = np.matmul(rests[i][:, None, :], rests[j][:, :, None])[:, 0, 0]
        found += next(runs).sum(axis=1)
        return found

    return _symmetric(len(arrays), rows, products)


def _run_products(arrays: Sequence[NDArray[Any]]) -> Array:
    """Return ⟨x_s, x_t⟩ of each run for s ≤ t: T arrays ``(..., RUN)`` to ``(T (T + 1) / 2, ...)``.

    Taken in the computing dtype, and in fp64 where fp32 cannot hold the products: then one of the norms tells.
    """
    pairs = list(itertools.combinations_with_replacement(range(len(arrays)), 2))
    runs = np.empty((len(pairs), *arrays[0].shape[:-1], 1, 1), arrays[0].dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        for (i, j), found in zip(pairs, runs, strict=True):
            np.matmul(arrays[i][..., None, :], arrays[j][..., :, None], out=found)
    sums = runs[..., 0, 0].astype(np.float64)
    if runs.dtype == np.float64:
        return sums
    squares = sums[[number for number, (i, j) in enumerate(pairs) if i == j]]
    outside = ~((squares >= _SMALLEST) & (squares <= _LARGEST))
    if not outside.any():
        return sums
    for array, here in zip(arrays, outside, strict=True):
        # Runs of zeros are common, and lose nothing.
        here[here] = array[here].any(axis=1)
    lost = outside.any(axis=0)
    if lost.any():
        exact = [array[lost].astype(np.float64) for array in arrays]
        for (i, j), found in zip(pairs, sums, strict=True):
            found[lost] = np.matmul(exact[i][:, None, :], exact[j][:, :, None])[:, 0, 0]
    return sums


def column_products(vectors: Sequence[Tensor]) -> Array:
    """Return the inner products down the columns: T matrices ``(n, R)`` to ``(T, T, R)``, added row by row in fp64."""
    arrays = [vector.numpy() for vector in vectors]
    length, columns = arrays[0].shape
    rows = max(1, GRID // max(1, columns))  # so many at once, to need little memory

    def products(i: int, j: int) -> Array:
        found = np.zeros(columns)
        for start in range(0, length, rows):
            left, right = (arrays[k][start : start + rows].astype(np.float64) for k in (i, j))
            found += (left * right).sum(axis=0)
        return found

    return _symmetric(len(arrays), columns, products)


def _symmetric(count: int, width: int, products: Callable[[int, int], Array | float]) -> Array:
    gram = np.empty((count, count, width))
    for i, j in itertools.combinations_with_replacement(range(count), 2):
        gram[i, j] = gram[j, i] = products(i, j)
    return gram


def norms(gram: Array) -> Array:
    """Return ‖x_t‖ from inner products ``(T, T, R)``, ``(T, R)``."""
    found: Array = np.sqrt(np.diagonal(gram).T)
    return found


def cosines(gram: Array) -> Array:
    """Return cos∠(x_s, x_t) from inner products ``(T, T, R)``; 0 where a vector is 0."""
    lengths = norms(gram)
    product = lengths[:, None] * lengths[None]
    found: Array = np.clip(np.divide(gram, product, out=np.zeros_like(gram), where=product > 0), -1, 1)
    diagonal = np.arange(len(gram))
    found[diagonal, diagonal] = lengths > 0  # without the rounding of the square root
    return found


def vanishes(square: Array | float, weights: float | Array = 1.0) -> Array:
    """Tell whether a sum of unit vectors, of which ``square`` is the squared norm, cancels: it has no direction."""
    return np.asarray(square <= OPPOSITE / 2 * np.square(weights))


def combine(vectors: Sequence[Tensor], coefficients: Sequence[float | Tensor]) -> Tensor:
    """Return Σ c_t x_t; a coefficient is a number, or a tensor that spreads over the vector's rows or columns."""
    total: Tensor | None = None
    first = coefficients[0]
    if len(vectors) > 1 and isinstance(first, float) and all(other == first for other in coefficients) and first:
        # Equal shares: one sum, then one product.
        total = vectors[0] + vectors[1]
        for vector in vectors[2:]:
            total += vector
        return total.mul_(first)
    term: Tensor | None = None
    for vector, coefficient in zip(vectors, coefficients, strict=True):
        if isinstance(coefficient, float) and coefficient == 0:
            continue
        if total is None:
            # The first term starts the sum: adding it to +0 would lose the sign of a −0.
            total = vector * coefficient
        else:
            # Multiplied, then added: a fused operation rounds otherwise at the end of a piece than in its middle.
            term = torch.mul(vector, coefficient, out=term)
            total += term
    return torch.zeros_like(vectors[0]) if total is None else total


@dataclass
class Combination(Context):
    """The coefficients of a tensor's models, once measured; empty where each row or column has its own."""

    models: tuple[str, ...] = ()
    coefficients: tuple[float, ...] = ()


@dataclass(frozen=True)
class GramMerge(TensorMerge):
    """A merge Σ c_t x_t, of weights or of task vectors, whose coefficients follow from inner products alone.

    A concrete merge says which vectors it combines and how coefficients follow. Vectors that are all equal merge into
    that vector to its last bit.
    """

    @property
    def extent(self) -> Extent:
        """What one vector is."""
        return "tensor"

    @property
    def layout(self) -> Literal["pieces", "rows", "tensor"]:
        """Vectors of less than a tensor are seen whole."""
        layouts: dict[Extent, Literal["pieces", "rows", "tensor"]] = {"tensor": "pieces", "column": "tensor"}
        return layouts.get(self.extent, "rows")

    @abstractmethod
    def vectors(self, view: TensorView) -> Sequence[Tensor]:
        """Return the T flat vectors of a piece that are combined."""

    @abstractmethod
    def coefficients(self, gram: Array, models: Sequence[str]) -> Array:
        """Return c ``(T, R)`` from the inner products ``(T, T, R)`` of R vectors that are merged apart."""

    def finish(self, view: TensorView, combined: Tensor) -> Tensor:
        """Turn the combination into merged weights."""
        return combined

    def begin(self, header: Header) -> Context:
        """Plan a measuring pass where a vector is a whole tensor."""
        # Single numbers and vectors are one row (and one column).
        whole = self.extent == "tensor" or all(len(info.shape) < 2 for info in header.tensors.values())
        return Combination(complete=not whole, models=header.models)

    def measure(self, view: TensorView, context: Combination) -> Partial:
        """Measure the inner products of a piece, block by block, and whether its vectors differ."""
        vectors = self.vectors(view)
        return {
            "differ": int(any(not torch.equal(vectors[0], vector) for vector in vectors[1:])),
            (view.name, view.start): block_products(vectors),
        }

    def conclude(self, partial: Partial, context: Combination) -> Context:
        """Turn inner products into coefficients."""
        pieces = [blocks for key, blocks in partial.items() if key != "differ"]
        if not pieces:
            return Combination(models=context.models)
        sums = [math.fsum(itertools.chain.from_iterable(blocks)) for blocks in zip(*pieces, strict=True)]
        count = math.isqrt(2 * len(sums))  # T (T + 1) / 2 pairs
        every = iter(sums)
        gram = _symmetric(count, 1, lambda i, j: next(every))
        found = self.coefficients(gram, context.models)[:, 0]
        if not partial["differ"]:
            found = np.append(_of_equals(found.sum()), np.zeros(count - 1))
        return Combination(models=context.models, coefficients=tuple(found.tolist()))

    def apply(self, view: TensorView, context: Combination) -> Tensor:
        """Return the combination of the piece."""
        if view.stop == view.start:
            return self.vectors(view)[0].clone()
        if context.coefficients:
            return self._combined(view, context.coefficients)
        vectors = [self._arranged(view, vector) for vector in self.vectors(view)]
        column = self.extent == "column"
        gram = column_products(vectors) if column else row_products(vectors)
        found = self.coefficients(gram, context.models)
        # Equal vectors have equal products; whether those that have are equal is seen from their entries.
        alike = (gram == gram[0, 0]).all(axis=(0, 1))
        if alike.any():
            same = np.logical_and.reduce([(vectors[0] == v).all(0 if column else 1).numpy() for v in vectors])
            found[:, same] = np.concatenate([_of_equals(found[:, same].sum(0))[None], 0 * found[1:, same]])
        spread = torch.from_numpy(np.ascontiguousarray(found)).to(vectors[0].dtype)
        combined = combine(vectors, list(spread.unsqueeze(1 if column else 2)))
        return self.finish(view, combined.reshape(-1))

    def _combined(self, view: TensorView, coefficients: Sequence[float]) -> Tensor:
        return self.finish(view, combine(self.vectors(view), coefficients))

    def _arranged(self, view: TensorView, vector: Tensor) -> Tensor:
        """Return a flat vector as a matrix whose rows (or columns) are merged apart."""
        shape = view.shape
        return vector.reshape(-1, shape[-1]) if self.extent == "last" else vector.reshape(shape[0], -1)


@dataclass(frozen=True)
class TaskVectorGramMerge(GramMerge):
    """A combination of task vectors where there is a base to add it to, else of the weights themselves."""

    def vectors(self, view: TensorView) -> Sequence[Tensor]:
        """Return τ_t, or θ_t without a base."""
        return (view.deltas if view.has_base else view.finetuned).unbind()

    def finish(self, view: TensorView, combined: Tensor) -> Tensor:
        """Add the merged task vector to the base."""
        return add_delta(view.base, combined) if view.has_base else combined

    def _combined(self, view: TensorView, coefficients: Sequence[float]) -> Tensor:
        used = [position for position, coefficient in enumerate(coefficients) if coefficient]
        # One model alone is taken as it is: θ₀ + (θ_t − θ₀) rounds.
        if len(used) == 1 and coefficients[used[0]] == 1:
            return view.finetuned[used[0]]
        return super()._combined(view, coefficients)


def _of_equals(total: Array) -> Array:
    """Return the one coefficient of equal vectors, Σ c_t, without the rounding that would part it from 1."""
    return np.where(np.abs(total - 1) < 1e-9, 1.0, total)
