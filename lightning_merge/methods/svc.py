"""Singular Value Calibration (Li et al., 2026, arXiv 2602.05536): shrink what several tasks have added up twice."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_merge.methods.base import MergeMethod, PerTensor, Refinement, hyperparameter
from lightning_merge.methods.matrices import Svd, TaskMatrices, matrix_shape, reproducibly, require_finite, svd
from lightning_merge.methods.task_arithmetic import TaskArithmetic
from lightning_merge.tensor_view import TensorView, add_delta


def calibration_factors(merged: Svd, matrices: Collection[Tensor], alpha: float) -> Tensor:
    """Return γ_r = K / Σ_i max(α, s_{r,i}) for each left singular direction u_r of the merged matrix, ``(r,)``.

    s_{r,i} = ⟨u_rᵀ D, u_rᵀ D_i⟩ / ‖u_rᵀ D_i‖² is how many times the merged matrix D holds what task i has along u_r.
    A task that has nothing there is left out of sum and count: s is 0 / 0, and nothing of it can be counted twice.
    """
    response = merged.sigma[:, None] * merged.vh  # u_rᵀ D
    total = torch.zeros_like(merged.sigma)
    count = torch.zeros_like(merged.sigma)
    for matrix in matrices:
        own = merged.u.mT @ matrix
        norm = own.norm(dim=1)
        present = norm > max(matrix.shape) * torch.finfo(matrix.dtype).eps * matrix.norm()
        share = (response * own).sum(1) / norm.square()
        total += torch.where(present, share.clamp(min=alpha), 0.0)
        count += present
    return torch.where(count > 0, count / total, 1.0)


@dataclass(frozen=True)
class Svc(Refinement):
    """Rescale the singular values of what another method merged, where tasks share directions and were added up.

    With D = θ_merged − θ₀ = Σ_r σ_r u_r v_rᵀ, each σ_r is multiplied by γ_r = K / Σ_i max(α, s_{r,i}), where
    s_{r,i} = ⟨u_rᵀ D, u_rᵀ D_i⟩ / ‖u_rᵀ D_i‖² compares D with task i along u_r: above 1 it holds more than the task put
    there. K counts the tasks that have anything along u_r, so a sum of orthogonal task vectors stays as it is. A factor
    on all of D cancels as long as no s falls below α. Works on matrices, with convolutions as (out, in · k · k); other
    tensors stay as the method merged them. After ``IsoC`` all σ are equal, so that the u_r, and with them this
    correction, depend on rounding.

    Args:
        method: The merge to correct, task arithmetic by default; transforms go before it.
        alpha: α, in (0, 1]: the least that a task is taken to be held. A γ is at most 1 / α; with 1, singular values
            only shrink. 0.1 by default, as in the released code.

    Cost: what the method costs, and for each matrix one singular value decomposition and T products in fp64 in one
        thread. Memory for each thread: about 25 times the largest matrix in fp32, and what the method holds.
    Reference: Li et al., 2026, When Shared Knowledge Hurts: Spectral Over-Accumulation in Model Merging,
        arXiv 2602.05536.

    Example:
        >>> import torch
        >>> from lightning_merge import TaskVectors
        >>> from lightning_merge.methods import TaskArithmetic
        >>> base = {"weight": torch.ones(3, 3)}
        >>> a = {"weight": base["weight"] + torch.diag(torch.tensor([0.5, 0.25, 0.0]))}
        >>> b = {"weight": base["weight"] + torch.diag(torch.tensor([0.5, 0.0, 0.125]))}
        >>> task_vectors = TaskVectors.open(base, {"a": a, "b": b})
        >>> TaskArithmetic(scale=1)(task_vectors)["weight"].diagonal()
        tensor([2.0000, 1.2500, 1.1250])
        >>> Svc(method=TaskArithmetic(scale=1))(task_vectors)["weight"].diagonal()
        tensor([1.5000, 1.2500, 1.1250])
    """

    method: MergeMethod = TaskArithmetic()
    alpha: PerTensor = hyperparameter(0.1, "(0, 1]")

    paper: ClassVar[str] = "Singular Value Calibration (Li et al., 2026), arXiv 2602.05536"
    device_ready: ClassVar[bool] = True
    tensor_copies: ClassVar[float] = 8.0

    @property
    def layout(self) -> Literal["pieces", "rows", "tensor"]:
        """Matrices are decomposed as a whole."""
        return "tensor"

    def apply(self, view: TensorView, context: Any) -> Tensor:
        """Return θ_merged + Σ_r (γ_r − 1) σ_r u_r v_rᵀ."""
        assert view.merged is not None, "a refinement comes after a method"
        shape = matrix_shape(view.info.shape)
        if shape is None:
            return view.merged
        with reproducibly(view):
            delta = view.merged.double() - view.base.double()
            merged = svd(require_finite(delta, view, "that was merged").reshape(shape))
            factors = calibration_factors(merged, TaskMatrices(view, shape), self.alpha)
            change = (merged.u * ((factors - 1) * merged.sigma)) @ merged.vh
        # Added as a difference: where nothing is rescaled the merge stays as it is, bit for bit.
        return add_delta(view.merged, change.reshape(-1).to(view.merged.dtype))
