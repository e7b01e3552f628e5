"""AdaRank (Lee et al., 2025, arXiv 2503.22178): learn which singular components of each task vector to merge.

The leading components of one task can cost other tasks more than they give to their own, so that no fixed rank is right
for all tasks and layers. Masks over components are learned without labels, by entropy or any other objective.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_merge.coefficients import Coefficients
from lightning_merge.components import Components
from lightning_merge.directions import Directions, TaskDirections
from lightning_merge.errors import UserError, unknown

Mode = Literal["hard", "soft"]


def singular_factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the leading components of X as two factors, X ≈ Σ_i left[:, i] right[i, :], the largest σ first.

    Args:
        matrix: X, ``(m, n)``, of any dtype.
        rank: How many components; min(m, n) of them are X to rounding.

    Returns:
        ``(m, rank)`` and ``(rank, n)`` in fp64. Those on the shorter side of X are orthonormal, the others carry σ.

    Cost: an eigendecomposition of the shorter side's Gram matrix in fp64: several times less than X's own
        decomposition. Components below 1e-8 of the largest are only orthogonal on the shorter side, and rounding.
    """
    # Not every accelerator has fp64.
    exact = matrix.to(matrix.device if matrix.device.type in ("cpu", "cuda") else "cpu").to(torch.float64)
    wide = exact.shape[0] < exact.shape[1]
    tall = exact.mT if wide else exact
    _, basis = torch.linalg.eigh(tall.mT @ tall)
    basis = basis.flip(1)[:, :rank]  # (shorter side, rank)
    return (basis, basis.mT @ exact) if wide else (exact @ basis, basis.mT)


class SingularDirections(Directions):
    """r components of each of T matrices, as two factors: D_{t,i} = left[t, :, i] right[t, i, :].

    Args:
        left: ``(T, m, r)``, m the rows that this process holds; in the dtype and on the device where it is kept.
        right: ``(T, r, n)``.

    Cost: T · r · (m + n) numbers, for a square matrix of full rank twice the task vectors. Each call multiplies
        matrices, 2 T · r · m · n operations, and holds one task's factors in the computing dtype.
    """

    def __init__(self, left: Tensor, right: Tensor) -> None:
        self.left, self.right = left, right
        self.count = left.shape[0] * left.shape[2]
        self.nbytes = sum(factor.numel() * factor.element_size() for factor in (left, right))

    def add_to(self, out: Tensor, values: Tensor) -> None:
        """Add Σ_t left_t diag(values_t) right_t, one product of matrices for each task."""
        matrix = out.view(self.left.shape[1], self.right.shape[2])
        for left, right, mine in zip(self.left, self.right, values.view(len(self.left), -1), strict=True):
            left, right = (factor.to(out.device, out.dtype) for factor in (left, right))
            matrix.addmm_(left * mine.to(out.dtype), right)

    def contract(self, gradient: Tensor) -> Tensor:
        """Return diag(leftᵀ G rightᵀ) for each task, through the smaller of the two products with G."""
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        matrix = gradient.to(dtype).view(self.left.shape[1], self.right.shape[2])
        found: list[Tensor] = []
        for left, right in zip(self.left, self.right, strict=True):
            left, right = (factor.to(gradient.device, dtype) for factor in (left, right))
            if matrix.shape[0] < matrix.shape[1]:
                found.append((matrix @ right.mT).mul_(left).sum(dim=0))
            else:
                found.append((left.mT @ matrix).mul_(right).sum(dim=1))
        return torch.cat(found).double()


class LeadingAndRest(Directions):
    """The leading components of T matrices, and of each what they leave as one direction more, the last.

    Args:
        leading: The components.
        rest: ``(T, n)``, flat, for the rows that this process holds.

    Cost: that of both.
    """

    def __init__(self, leading: SingularDirections, rest: Tensor) -> None:
        self.leading, self.rest = leading, TaskDirections(rest)
        self.count = leading.count + len(rest)
        self.nbytes = leading.nbytes + self.rest.nbytes

    def add_to(self, out: Tensor, values: Tensor) -> None:
        """Add both sums."""
        mine = values.view(self.rest.count, -1)
        self.leading.add_to(out, mine[:, :-1].reshape(-1))
        self.rest.add_to(out, mine[:, -1])

    def contract(self, gradient: Tensor) -> Tensor:
        """Return the inner products with both."""
        found = self.leading.contract(gradient).view(self.rest.count, -1)
        return torch.cat([found, self.rest.contract(gradient)[:, None]], dim=1).view(-1)


class RankMasks(Components):
    """A keep-mask over the singular components of each task vector, learned together with λ.

    θ₀ + Σ_t λ_t Σ_i m_{t,i} σ_i u_i v_iᵀ for each matrix; convolutions are read as (out, in · k · k). A mask is 1 where
    its score s is above 0, and passes the gradient of sigmoid(s / margin) straight through. Biases and norms have no
    mask, only λ. With all masks 1 and full rank, as it starts by default, the merge is task arithmetic.

    Args:
        models: The models, in the order of the task vectors (sorted names).
        shapes: The tensors that are merged, with their shapes; :meth:`of` takes both from task vectors.
        rank: How many components of each matrix are candidates: all (``None``), so many, or a share in (0, 1]. The
            others are dropped, as if masked for good, unless there is a ``rest``.
        rest: Beyond ``rank``, keep what is left of each task vector as one component more: the merge then starts where
            coefficients would, at a low rank's cost in time.
        keep: Share of the candidates, the leading ones, whose mask starts at 1, in [0, 1].
        mode: ``hard`` masks (AdaRank), or ``soft``: a free coefficient for each component, from 1 or 0.
        margin: How far from the threshold hard scores start: Adam with learning rate η can flip a mask after
            margin / η steps.
        coefficients: λ; by default one for each model and tensor, from ``initial``.
        initial: Where λ starts: a number, one for each model, or a file that :meth:`save` wrote.
        learn_coefficients: Learn λ too; otherwise only the masks.
        whole: Patterns of matrices that are not taken apart; of an embedding, for example, whose rows are words.
        prior: Strength of ½ · prior · Σ (s − s₀)², added to what is minimised.

    Raises:
        UserError: No tensor is a matrix, coefficients of other models or tensors, a setting out of range.

    Cost: T decompositions of each matrix at the start (see :func:`singular_factors`); memory and time of a step are
        those of :class:`SingularDirections`, more than for coefficients: a lower ``rank`` saves in proportion.
    Reference: Lee et al., 2025, AdaRank, arXiv 2503.22178.

    Example:
        >>> masks = RankMasks(["cars", "sun"], {"proj.weight": (4, 3), "proj.bias": (4,)}, keep=0.5, initial=0.3)
        >>> masks()[masks.span("proj.weight")].reshape(2, 3)  # two of three components to begin with
        tensor([[0.3000, 0.3000, 0.0000],
                [0.3000, 0.3000, 0.0000]], grad_fn=<ViewBackward0>)
    """

    def __init__(
        self,
        models: Sequence[str],
        shapes: Mapping[str, Sequence[int]],
        rank: int | float | None = None,
        rest: bool = False,
        keep: float = 1.0,
        mode: Mode = "hard",
        margin: float = 0.05,
        coefficients: Coefficients | None = None,
        initial: float | Mapping[str, float] | str | os.PathLike[str] = 0.3,
        learn_coefficients: bool = True,
        whole: Sequence[str] = (),
        prior: float = 0.0,
    ) -> None:
        if mode not in get_args(Mode):
            raise unknown("mode of rank masks", str(mode), get_args(Mode))
        share = isinstance(rank, float)
        if rank is not None and not (0 < rank <= 1 if share else rank >= 1):
            raise UserError(f"A rank must be at least 1, or a share in (0, 1], got {rank}. Expected None for all.")
        if not 0 <= keep <= 1:
            raise UserError(f"RankMasks: keep must be in [0, 1], got {keep}.")
        if not (math.isfinite(margin) and margin > 0):
            raise UserError(f"RankMasks: margin must be above 0, got {margin}.")
        self.rank, self.rest, self.keep, self.mode, self.margin = rank, rest, keep, mode, margin
        super().__init__(models, shapes, coefficients, initial, learn_coefficients, whole, prior)

    def count(self, rows: int, columns: int) -> int:
        """Return how many components of a matrix are candidates, the rest among them."""
        leading = self._leading(rows, columns)
        return leading + int(self.rest and leading < min(rows, columns))

    def start(self, count: int) -> Tensor:
        """Keep the leading components."""
        kept = torch.arange(count) < math.ceil(self.keep * count - 1e-9)
        return kept.float() if self.mode == "soft" else torch.where(kept, self.margin, -self.margin)

    def link(self, raw: Tensor) -> Tensor:
        """Return masks: 1 above the threshold, else 0, with the gradient of a sigmoid; or free factors."""
        if self.mode == "soft":
            return raw
        smooth = torch.sigmoid(raw / self.margin)
        # The difference is exactly 0 and carries the gradient.
        return (raw > 0).to(raw.dtype) + (smooth - smooth.detach())

    def take_apart(self, matrices: Tensor, count: int, rows: slice) -> Directions:
        """Decompose each task vector; of the left factors keep this process's rows."""
        tasks, height, width = matrices.shape
        mine, rank = len(range(height)[rows]), self._leading(height, width)
        left, right = matrices.new_empty(tasks, mine, rank), matrices.new_empty(tasks, rank, width)
        rest = matrices.new_empty(tasks, mine * width) if count > rank else None
        for task, matrix in enumerate(matrices):
            own, other = singular_factors(matrix, rank)
            left[task], right[task] = own[rows], other
            if rest is not None:
                # Of the factors as they are stored: the sum is the task vector, whatever they are rounded to.
                rest[task] = (matrix[rows].to(own) - left[task].to(own) @ right[task].to(own)).reshape(-1)
        leading = SingularDirections(left, right)
        return leading if rest is None else LeadingAndRest(leading, rest)

    def kept(self) -> dict[str, dict[str, int]]:
        """Return by model and matrix how many components are merged: whose factor is not 0."""
        values = torch.zeros(len(self._of), device=self.raw.device)
        values[self._at] = self.link(self.raw.detach())
        counts = {
            name: values[self.span(name)].reshape(len(self.models), -1).count_nonzero(dim=1).tolist()
            for name, count in self.counts.items()
            if count
        }
        return {model: {name: counts[name][row] for name in counts} for row, model in enumerate(self.models)}

    def _leading(self, rows: int, columns: int) -> int:
        full = min(rows, columns)
        if self.rank is None:
            return full
        return max(1, math.ceil(self.rank * full - 1e-9)) if isinstance(self.rank, float) else min(self.rank, full)

    def _described(self) -> dict[str, Any]:
        return {**super()._described(), "mode": self.mode, "rest": self.rest}
