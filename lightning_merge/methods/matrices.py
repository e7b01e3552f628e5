"""Weights as matrices and their singular value decomposition, for the merges that work on whole matrices.

A tensor of two dimensions is a matrix (out, in); one of more is read as a convolution and becomes (out, in · k · k).
A side of length 1 leaves nothing to decompose: such tensors, and biases and norms, get the mean of the task vectors,
as in the released code of TSV-M and Iso, whose papers speak of matrices only.

Decompositions are taken in fp64: they cost 1.5 times as much as in fp32 (measured on 768 x 768 to 3072 x 768), and the
orthogonal factors, which divide by singular values, then keep fp32's accuracy. They run in one thread, so that the
result does not depend on how many there are. Directions whose singular value is only rounding are left out: they are
arbitrary, differ between libraries, and a method that raises all singular values alike would turn them into noise.
Rounding is that of the decomposition and, for such methods, that of the weights: θ_t in fp32 gives τ_t a full rank.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_merge.errors import UserError
from lightning_merge.methods.base import PerTensor, take_selected
from lightning_merge.tensor_view import TensorView, add_delta

# From the matrices τ_t, each (m, n) in fp64, to the merged one; they can be gone through more than once.
Kernel = Callable[[Collection[Tensor]], Tensor]


class Svd(NamedTuple):
    """X = U diag(σ) Vᵀ with the directions that X has: ``(m, r)``, ``(r,)`` falling, ``(r, n)``."""

    u: Tensor
    sigma: Tensor
    vh: Tensor


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Return how a tensor is read as a matrix, or ``None`` where it is none.

    Example:
        >>> matrix_shape((64, 32, 3, 3)), matrix_shape((64, 1)), matrix_shape((64,))
        ((64, 288), None, None)
    """
    if len(shape) < 2:
        return None
    rows, columns = shape[0], math.prod(shape[1:])
    return (rows, columns) if rows > 1 and columns > 1 else None


def svd(matrix: Tensor, most: int | None = None, size: float = 0.0, rounding: float = 0.0) -> Svd:
    """Decompose a matrix, without the directions whose singular value is only rounding.

    Args:
        matrix: X, ``(m, n)``.
        most: How many of the leading directions are wanted; all by default.
        size: Norm of what X was computed from, where that is larger than X itself.
        rounding: Singular values that the rounding of X's entries can have; see :func:`weight_rounding`.

    Returns:
        As many directions as the numerical rank: those with σ above ``rounding``, and above max(m, n) · ε times the
        larger of σ₁ and ``size``.
    """
    rows, columns = matrix.shape
    # LAPACK is faster on tall matrices; without entries there is nothing that it would accept.
    if not matrix.numel():
        u, sigma, vh = matrix.new_zeros(rows, 0), matrix.new_zeros(0), matrix.new_zeros(0, columns)
    elif rows >= columns:
        u, sigma, vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        v, sigma, uh = torch.linalg.svd(matrix.mT, full_matrices=False)
        u, vh = uh.mT, v.mT
    largest = max([size, *sigma[:1].tolist()])
    rank = int((sigma > max(rounding, max(rows, columns) * torch.finfo(sigma.dtype).eps * largest)).sum())
    if most is not None and most < len(sigma):
        # Copies: a slice would keep the whole decomposition in memory.
        u, sigma, vh = u[:, :most].clone(), sigma[:most].clone(), vh[:most].clone()
    return Svd(u[:, :rank], sigma[:rank], vh[:rank])


def orthogonalize(factor: Tensor) -> Tensor:
    """Return the nearest matrix with orthonormal columns, P Qᵀ of X = P D Qᵀ (orthogonal Procrustes, "whitening").

    For a wide X the rows are orthonormal. Where columns depend on each other any completion is as near; the one
    without is returned, so that k equal columns x become k times x / √k.
    """
    u, _, vh = svd(factor)
    return u @ vh


def total_of(matrices: Collection[Tensor]) -> Tensor:
    """Return Σ τ_t, added in the order of the models."""
    return functools.reduce(torch.add, matrices)


class TaskMatrices(Collection[Tensor]):
    """The matrices τ_t of one tensor in fp64, one after another; goes through the models anew each time."""

    def __init__(self, view: TensorView, shape: tuple[int, int]) -> None:
        self.view, self.shape = view, shape
        self.lengths: dict[str, tuple[Tensor, Tensor]] = {}  # ‖·‖ of the rows and the columns of τ_t, once read

    def __len__(self) -> int:
        return len(self.view.models)

    def __iter__(self) -> Iterator[Tensor]:
        for model, row in zip(self.view.models, self.view.delta_rows(), strict=True):
            matrix = require_finite(row.to(torch.float64, copy=True), self.view, f"of '{model}'").reshape(self.shape)
            if model not in self.lengths:
                self.lengths[model] = _lengths(matrix)
            yield matrix

    def __contains__(self, item: object) -> bool:
        return any(item is matrix for matrix in self)


def weight_rounding(matrices: Collection[Tensor]) -> list[float]:
    """Return for each τ_t how large a singular value can be that comes of rounding θ_t to the computing dtype.

    Entries of θ_t are off by up to u |θ_t|, with u = 2⁻²⁴ in fp32 and 2⁻⁵³ in fp64. Independent errors of that size
    have singular values up to u (max_i ‖row i‖ + max_j ‖column j‖) of θ_t, which is u · rms(θ_t) · (√m + √n) where rows
    are alike; that of rounding, whose errors are 0.58 of their bound at most, stay below by a factor of 1.7. Matrices
    that come without weights have none.
    """
    if not isinstance(matrices, TaskMatrices):
        return [0.0] * len(matrices)
    unit = torch.finfo(matrices.view.base.dtype).eps / 2
    base = _lengths(matrices.view.base.reshape(matrices.shape))
    found = []
    for model in matrices.view.models:
        if model not in matrices.lengths:
            for _ in matrices:
                pass
        # ‖θ₀‖² + ‖τ_t‖² for ‖θ_t‖²: also τ_t, a difference, is rounded.
        sides = zip(base, matrices.lengths[model], strict=True)
        found.append(unit * sum(float(torch.hypot(*side).max()) for side in sides))
    return found


def _lengths(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return ‖·‖ of the rows ``(m,)`` and the columns ``(n,)``, in fp64."""
    rows, columns = (torch.linalg.vector_norm(matrix, dim=dim, dtype=torch.float64) for dim in (1, 0))
    return rows, columns


def require_finite(values: Tensor, view: TensorView, whose: str) -> Tensor:
    """Return fp64 values if they are finite.

    Raises:
        UserError: They hold NaN or infinity, which no decomposition survives.
    """
    if not math.isfinite(values.sum().item()) and not values.isfinite().all():
        raise UserError(
            f"The task vector {whose} in tensor '{view.name}' holds NaN or infinity, which cannot be decomposed. "
            "Expected finite weights; leave a tensor out of the merge with --ignore REGEX."
        )
    return values


def merge_matrices(view: TensorView, kernel: Kernel, scale: PerTensor = 1.0, excluded: bool = False) -> Tensor:
    """Return θ₀ + λ · what ``kernel`` makes of the matrices τ_t, or λ · their mean where there are none.

    Args:
        view: A whole tensor.
        kernel: The merge of matrices.
        scale: λ.
        excluded: Take the mean though the tensor is a matrix.

    Raises:
        UserError: A task vector is not finite, or its decomposition does not converge.
    """
    shape = None if excluded else matrix_shape(view.info.shape)
    with reproducibly(view):
        matrices = TaskMatrices(view, shape or (1, view.info.numel))
        if shape:
            merged = kernel(matrices)
        else:
            merged = total_of(matrices) / len(matrices)
    factor = float(scale)
    delta = (factor * merged).reshape(-1).to(view.base.dtype)
    return take_selected(delta, view) if factor == 1 and len(view.models) == 1 else add_delta(view.base, delta)


@contextmanager
def reproducibly(view: TensorView) -> Iterator[None]:
    """Run linear algebra in one thread, where the number of threads cannot change a bit, and name what fails.

    Raises:
        UserError: A decomposition of the tensor does not converge.
    """
    threads = torch.get_num_threads()
    if threads > 1:
        torch.set_num_threads(1)
    try:
        yield
    except torch.linalg.LinAlgError as error:
        raise UserError(
            f"A decomposition of tensor '{view.name}' {view.info.shape} does not converge. "
            "Expected finite weights of moderate size; leave a tensor out of the merge with --ignore REGEX."
        ) from error
    finally:
        if threads > 1:
            torch.set_num_threads(threads)
