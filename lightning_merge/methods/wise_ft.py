"""WiSE-FT (Wortsman et al., 2022, arXiv 2109.01903): interpolate between the pretrained and the fine-tuned weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_merge.methods.average import weighted_average
from lightning_merge.methods.base import PerTensor, TensorMerge, hyperparameter, ordered_sum
from lightning_merge.tensor_view import TensorView


@dataclass(frozen=True)
class WiseFT(TensorMerge):
    """Interpolate linearly: (1 − α) θ₀ + α θ₁; what fine-tuning gained is kept in part, and robustness returns.

    With one model this is WiSE-FT, and linear interpolation of any two models (one given as the base). With several,
    the fine-tuned end of the line is their average.

    Args:
        alpha: Share of the fine-tuned end, in [0, 1]; 0.5 is the paper's choice without tuning.

    Cost: one pass over the base and the models.
    Reference: Wortsman et al., 2022, Robust fine-tuning of zero-shot models, arXiv 2109.01903, equation 1.

    Example:
        >>> import torch
        >>> from lightning_merge import TaskVectors
        >>> base = {"weight": torch.tensor([1.0, 2.0, 3.0, 4.0])}
        >>> a = {"weight": torch.tensor([1.5, 2.0, 3.25, 3.0])}
        >>> b = {"weight": torch.tensor([0.75, 3.0, 3.5, 4.0])}
        >>> task_vectors = TaskVectors.open(base, {"a": a, "b": b})
        >>> WiseFT(alpha=0.5)(task_vectors.subset(["a"]))["weight"]
        tensor([1.2500, 2.0000, 3.1250, 3.5000])
    """

    alpha: PerTensor = hyperparameter(0.5, "[0, 1]")

    paper: ClassVar[str] = "Robust fine-tuning of zero-shot models (Wortsman et al., 2022), arXiv 2109.01903"
    device_ready: ClassVar[bool] = True

    def apply(self, view: TensorView, context: Any) -> Tensor:
        """Return (1 − α) θ₀ + α · mean of θ_t."""
        base = view.base.double()
        end = ordered_sum(view.finetuned.double()) / len(view.models)
        line = weighted_average(torch.stack([base, end]), [1 - self.alpha, self.alpha])
        return torch.where(end == base, base, line).to(view.base.dtype)
