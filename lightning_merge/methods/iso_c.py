"""Iso-C (Marczak et al., 2025, arXiv 2502.04959): give the summed task matrix one singular value in all directions."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from lightning_merge.methods.base import PerTensor, TensorMerge, hyperparameter
from lightning_merge.methods.matrices import merge_matrices, svd, total_of, weight_rounding
from lightning_merge.tensor_view import TensorView


def flatten_spectrum(matrices: Collection[Tensor]) -> Tensor:
    """Return σ̄ U Vᵀ of Σ τ_t = U diag(σ) Vᵀ, where σ̄ is the mean singular value."""
    total = total_of(matrices)
    u, sigma, vh = svd(total, rounding=math.hypot(*weight_rounding(matrices)))
    return sigma.sum() / max(1, len(sigma)) * (u @ vh)


@dataclass(frozen=True)
class IsoC(TensorMerge):
    """Add the task vectors up and make the spectrum of each matrix flat: θ₀ + λ · σ̄ U Vᵀ.

    With Σ τ_t = U diag(σ_1 … σ_r) Vᵀ, every singular value becomes their mean σ̄, so that no direction that many tasks
    share outweighs the others; the nuclear norm and the singular vectors stay. Directions that the sum does not have
    stay out: those with σ up to what rounding the θ_t to the computing dtype can make, about
    2⁻²⁴ · rms(θ) · (√m + √n) · √T in fp32 (2⁻⁵³ where the base is fp64). Convolutions are matrices (out, in · k · k);
    biases, norms and what has a side of 1 get λ times the mean of the task vectors. Embeddings are matrices like all
    others, as in the released code.

    Args:
        scale: λ, in [-100, 100]; chosen on validation data in the paper. 1 by default.

    Cost: one pass; for each matrix one singular value decomposition in fp64 in one thread (0.2 s for 768 x 768).
        Memory for each thread: about 15 times the largest matrix in fp32, for any number of models.
    Reference: Marczak et al., 2025, No Task Left Behind: Isotropic Model Merging with Common and Task-Specific
        Subspaces, arXiv 2502.04959, algorithm 1. (The released code leaves convolutions to the mean.)

    Example:
        >>> import torch
        >>> from lightning_merge import TaskVectors
        >>> base = {"weight": torch.ones(3, 3)}
        >>> a = {"weight": base["weight"] + torch.diag(torch.tensor([0.5, 0.0, 0.0]))}
        >>> b = {"weight": base["weight"] + torch.diag(torch.tensor([0.5, 0.5, 0.0]))}
        >>> task_vectors = TaskVectors.open(base, {"a": a, "b": b})
        >>> IsoC()(task_vectors)["weight"].diagonal()
        tensor([1.7500, 1.7500, 1.0000])
    """

    scale: PerTensor = hyperparameter(1.0, "[-100, 100]")

    paper: ClassVar[str] = "Isotropic Model Merging (Marczak et al., 2025), arXiv 2502.04959"
    device_ready: ClassVar[bool] = True
    tensor_copies: ClassVar[float] = 3.5

    @property
    def layout(self) -> Literal["pieces", "rows", "tensor"]:
        """Matrices are decomposed as a whole."""
        return "tensor"

    def apply(self, view: TensorView, context: Any) -> Tensor:
        """Return θ₀ + λ σ̄ U Vᵀ."""
        return merge_matrices(view, flatten_spectrum, self.scale)
