"""Matrices as products of two thin factors: truncation to a rank, and a basis that several of them share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Up to this many rows or columns a matrix is decomposed whole; beyond, its leading directions are found by iteration.
LARGEST_WHOLE = 1024
_ITERATIONS = 20
_SETTLED = 1e-6


class LowRank(NamedTuple):
    """A matrix of low rank near another.

    Attributes:
        up: ``(m, r)``.
        down: ``(r, n)``.
        size: Frobenius norm of the other matrix.
        lost: Frobenius norm of the difference.
    """

    up: Tensor
    down: Tensor
    size: float
    lost: float

    @property
    def error(self) -> float:
        """The difference relative to the matrix; 0 for a matrix of zeros."""
        return self.lost / self.size if self.size else 0.0


def truncate(matrix: Tensor, rank: int) -> LowRank:
    """Return the factors ``(m, r)`` and ``(r, n)`` of the nearest matrix of a rank.

    The singular values go to both factors in equal parts. A rank beyond the matrix's smaller side means that side.

    Args:
        matrix: ``(m, n)`` in fp64.
        rank: At least 1.

    Cost: a singular value decomposition for matrices with a side of up to 1024; beyond, subspace iteration (Halko et
    al., 2011, arXiv 0909.4061) with about 6 m n r operations for each of a few steps, until a step captures less than
    a millionth more of the squared norm.

    Example:
        >>> import torch
        >>> found = truncate(torch.diag(torch.tensor([3.0, 4.0, 0.0])).double(), 1)
        >>> (found.up @ found.down)[1, 1].item(), found.error
        (4.0, 0.6)
    """
    rank = max(1, min(rank, *matrix.shape))
    left, values, right = _leading(matrix, rank) if min(matrix.shape) > LARGEST_WHOLE else _whole(matrix)
    root = values[:rank].sqrt()
    up, down = left[:, :rank] * root, root[:, None] * right[:rank]
    return LowRank(up, down, matrix.norm().item(), (matrix - up @ down).norm().item())


def rank_for_energy(matrix: Tensor, energy: float) -> int:
    """Return the smallest rank whose singular values hold a part of the sum of their squares.

    Args:
        matrix: ``(m, n)`` in fp64.
        energy: The part, in (0, 1].

    Cost: the singular values of the whole matrix.

    Example:
        >>> matrix = torch.diag(torch.tensor([4.0, 3.0])).double()
        >>> rank_for_energy(matrix, 0.64), rank_for_energy(matrix, 0.65)
        (1, 2)
    """
    squares = torch.linalg.svdvals(matrix).square()
    held = squares.cumsum(0) / squares.sum()
    # Rounding may leave the last sum a little below 1.
    return min(int((held < energy - 1e-12).sum()) + 1, len(squares))


def compress(up: Tensor, down: Tensor, rank: int) -> LowRank:
    """Truncate a product ``(m, R) @ (R, n)`` to a rank without ever forming it; see :func:`truncate`.

    Cost: two QR decompositions of the factors and a singular value decomposition of R x R.
    """
    left, core_left = torch.linalg.qr(up)
    right, core_right = torch.linalg.qr(down.T)
    inner_left, values, inner_right = _whole(core_left @ core_right.T)
    rank = max(1, min(rank, len(values)))
    root = values[:rank].sqrt()
    return LowRank(
        left @ (inner_left[:, :rank] * root),
        (root[:, None] * inner_right[:rank]) @ right.T,
        values.norm().item(),
        values[rank:].norm().item(),
    )


def shared_basis(products: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, list[Tensor]]:
    """Write several products of factors in one basis: ``[M_1 … M_T] = U S [V_1 … V_T]ᵀ`` (KnOTS, arXiv 2410.19735).

    Args:
        products: Factors ``(m, r_t)`` and ``(r_t, n)`` of each matrix.

    Returns:
        ``U S`` of shape ``(m, k)``, and for each matrix ``V_tᵀ`` of shape ``(k, n)``; k is the rank of them all.

    Cost: QR decompositions of the factors and a singular value decomposition of a matrix of Σ r_t x Σ r_t.
    """
    left, core = torch.linalg.qr(torch.cat([up for up, _ in products], dim=1))
    downs = [torch.linalg.qr(down.T) for _, down in products]
    inner = torch.block_diag(*[small.T for _, small in downs])
    rotated, values, rows = _whole(core @ inner)
    # Directions of rounding would let its noise be merged like what was learned.
    kept = max(1, int((values > values.max() * 1e-12).sum())) if len(values) else 0
    parts = rows[:kept].split([small.shape[0] for _, small in downs], dim=1)
    return left @ (rotated[:, :kept] * values[:kept]), [
        part @ basis.T for part, (basis, _) in zip(parts, downs, strict=True)
    ]


def _whole(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left, values, right


def _leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular directions, by iterating on a subspace a little larger than asked for.

    The subspace is found in fp32: what an error of it takes from the result is of second order. The result is fp64.
    """
    width = min(rank + max(8, rank // 2), *matrix.shape)
    single = matrix.float()
    start = torch.randn(matrix.shape[1], width, generator=torch.Generator().manual_seed(0))
    basis, captured = torch.linalg.qr(single @ start)[0], 0.0
    for _ in range(_ITERATIONS):
        image = basis.T @ single
        before, captured = captured, image.double().square().sum().item()
        if not math.isfinite(captured) or captured - before <= _SETTLED * captured:
            break
        basis = torch.linalg.qr(single @ torch.linalg.qr(image.T)[0])[0]
    basis = torch.linalg.qr(basis.double())[0]
    left, values, right = _whole(basis.T @ matrix)
    return basis @ left, values, right
