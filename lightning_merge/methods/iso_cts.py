"""Iso-CTS (Marczak et al., 2025, arXiv 2502.04959): Iso-C with directions of each task in place of the weakest."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_merge.methods.base import PerTensor, TensorMerge, hyperparameter, kept_count
from lightning_merge.methods.matrices import merge_matrices, orthogonalize, svd, total_of, weight_rounding
from lightning_merge.tensor_view import TensorView


def subspace_sizes(directions: int, tasks: int, common_space_fraction: float) -> tuple[int, int]:
    """Return k, the common directions, and s, those of each task, with k + T · s = r.

    Example:
        >>> subspace_sizes(768, 8, 0.8), subspace_sizes(5, 3, 0.8)
        ((616, 19), (5, 0))
    """
    left = directions - kept_count(common_space_fraction, directions)
    each = min(round(left / tasks), directions // tasks)
    return directions - tasks * each, each


def merge_common_and_specific(matrices: Collection[Tensor], common_space_fraction: float) -> Tensor:
    """Return σ̄ U* V*ᵀ over the leading directions of Σ τ_t and, orthogonal to those, of each τ_t."""
    total = total_of(matrices)
    common, each = subspace_sizes(min(total.shape), len(matrices), common_space_fraction)
    roundings = weight_rounding(matrices)
    in_total = math.hypot(*roundings)
    kept = [svd(total, common, rounding=in_total)]
    shared = kept[0].u  # (m, k)
    if each:
        weakest = float(kept[0].sigma[-1]) if len(kept[0].sigma) else math.inf
        for matrix, rounding in zip(matrices, roundings, strict=True):
            size = float(matrix.norm())
            # Rounding turns the common directions by up to its share in the weakest of them.
            rounding += in_total * size / weakest
            kept.append(svd(matrix - shared @ (shared.mT @ matrix), each, size, rounding))
    sigma = torch.cat([part.sigma for part in kept])
    left = orthogonalize(torch.cat([part.u for part in kept], 1))  # (m, k + T · s)
    right = orthogonalize(torch.cat([part.vh for part in kept], 0))  # (k + T · s, n)
    return sigma.sum() / max(1, len(sigma)) * (left @ right)


@dataclass(frozen=True)
class IsoCts(TensorMerge):
    """Flatten the spectrum over the directions that tasks share and those that each task has for itself.

    Of r = min(m, n) directions of a matrix, the leading k of Σ τ_t stay; each task adds the leading s = (r − k) / T of
    what its τ_t has orthogonal to those. All are made orthogonal together and get one singular value, the mean σ̄ of
    those they had: θ₀ + λ · σ̄ U* V*ᵀ. Where s = 0 (few directions, many tasks) this is ``IsoC``. Directions whose
    singular value is only rounding, of the θ_t too (see ``IsoC``), stay out. Convolutions are matrices
    (out, in · k · k); biases, norms and what has a side of 1 get λ times the mean of the task vectors.

    Args:
        common_space_fraction: k / r, in [0, 1]; the paper's 0.8 by default. r − k becomes the multiple of T nearest to
            what this asks for.
        scale: λ, in [-100, 100]; chosen on validation data in the paper. 1 by default.

    Cost: two passes over each matrix; T + 3 singular value decompositions in fp64 in one thread (0.2 s for 768 x 768).
        Memory for each thread: about 35 times the largest matrix in fp32, for any number of models.
    Reference: Marczak et al., 2025, No Task Left Behind: Isotropic Model Merging with Common and Task-Specific
        Subspaces, arXiv 2502.04959, algorithm 2; how s is rounded follows the released code.

    Example:
        >>> import torch
        >>> from lightning_merge import TaskVectors
        >>> base = {"weight": torch.ones(4, 4)}
        >>> a = {"weight": base["weight"] + torch.diag(torch.tensor([0.5, 0.5, 0.25, 0.0]))}
        >>> b = {"weight": base["weight"] + torch.diag(torch.tensor([0.5, 0.5, 0.0, 0.25]))}
        >>> task_vectors = TaskVectors.open(base, {"a": a, "b": b})
        >>> IsoCts(common_space_fraction=0.5)(task_vectors)["weight"].diagonal()
        tensor([1.6250, 1.6250, 1.6250, 1.6250])
    """

    common_space_fraction: PerTensor = hyperparameter(0.8, "[0, 1]")
    scale: PerTensor = hyperparameter(1.0, "[-100, 100]")

    paper: ClassVar[str] = "Isotropic Model Merging (Marczak et al., 2025), arXiv 2502.04959"
    device_ready: ClassVar[bool] = True
    tensor_copies: ClassVar[float] = 8.0

    @property
    def layout(self) -> Literal["pieces", "rows", "tensor"]:
        """Matrices are decomposed as a whole."""
        return "tensor"

    def apply(self, view: TensorView, context: Any) -> Tensor:
        """Return θ₀ + λ σ̄ U* V*ᵀ."""

        def kernel(matrices: Collection[Tensor]) -> Tensor:
            return merge_common_and_specific(matrices, self.common_space_fraction)

        return merge_matrices(view, kernel, self.scale)
