"""TSV-Merge (Gargiulo et al., 2025, arXiv 2412.00081): orthogonalise the leading singular vectors of all tasks."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_merge.methods.base import PerTensor, TensorMerge, hyperparameter
from lightning_merge.methods.matrices import merge_matrices, orthogonalize, svd
from lightning_merge.tensor_view import TensorView


def merge_singular_vectors(matrices: Collection[Tensor]) -> Tensor:
    """Return U⊥ Σ V⊥ᵀ of the leading singular triplets of T matrices ``(m, n)``.

    Each task gives its share of the min(m, n) directions, rounded down, but at least one. One matrix alone is returned.
    """
    if len(matrices) == 1:
        return next(iter(matrices))
    kept = [svd(matrix, max(1, min(matrix.shape) // len(matrices))) for matrix in matrices]
    sigma = torch.cat([task.sigma for task in kept])  # (T · share,)
    left = orthogonalize(torch.cat([task.u for task in kept], 1))  # (m, T · share)
    right = orthogonalize(torch.cat([task.vh for task in kept], 0))  # (T · share, n)
    return (left * sigma) @ right


@dataclass(frozen=True)
class TsvM(TensorMerge):
    """Add up the leading singular triplets of each task matrix, with the singular vectors of all tasks made orthogonal.

    Of a matrix with min(m, n) directions each of T tasks keeps ⌊min(m, n) / T⌋ triplets U_t Σ_t V_tᵀ, at least one.
    The concatenated [U_1 … U_T] and [V_1 … V_T] are replaced by the nearest matrices with orthonormal columns, and
    θ₀ + λ · U⊥ diag(Σ_1 … Σ_T) V⊥ᵀ is the merge. One model alone comes back as it is, and task vectors that are
    orthogonal and of low enough rank as their sum. Convolutions are matrices (out, in · k · k); biases, norms and what
    has a side of 1 get λ times the mean of the task vectors. Embeddings are matrices like all others, as in the
    released code.

    Args:
        scale: λ, in [-100, 100]; the paper's 1 by default.

    Cost: one pass; for each matrix T + 2 singular value decompositions in fp64 in one thread (0.2 s for 768 x 768).
        Memory for each thread: about 30 times the largest matrix in fp32, for any number of models.
    Reference: Gargiulo et al., 2025, Task Singular Vectors: Reducing Task Interference in Model Merging,
        arXiv 2412.00081. (Where singular vectors of several tasks coincide, the nearest orthogonal matrix
        is not unique; the one without further directions is taken. The released code leaves convolutions to the mean.)

    Example:
        >>> import torch
        >>> from lightning_merge import TaskVectors
        >>> base = {"weight": torch.ones(4, 4)}
        >>> a = {"weight": base["weight"] + torch.diag(torch.tensor([0.5, 0.0, 0.0, 0.0]))}
        >>> b = {"weight": base["weight"] + torch.diag(torch.tensor([0.0, 0.25, 0.0, 0.0]))}
        >>> task_vectors = TaskVectors.open(base, {"a": a, "b": b})
        >>> TsvM()(task_vectors)["weight"].diagonal()
        tensor([1.5000, 1.2500, 1.0000, 1.0000])
    """

    scale: PerTensor = hyperparameter(1.0, "[-100, 100]")

    paper: ClassVar[str] = "Task Singular Vectors (Gargiulo et al., 2025), arXiv 2412.00081"
    device_ready: ClassVar[bool] = True
    tensor_copies: ClassVar[float] = 6.0

    @property
    def layout(self) -> Literal["pieces", "rows", "tensor"]:
        """Matrices are decomposed as a whole."""
        return "tensor"

    def apply(self, view: TensorView, context: Any) -> Tensor:
        """Return θ₀ + λ U⊥ Σ V⊥ᵀ."""
        return merge_matrices(view, merge_singular_vectors, self.scale)
