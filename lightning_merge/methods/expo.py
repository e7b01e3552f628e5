"""ExPO (Zheng et al., 2024, arXiv 2404.16792): go on in the direction in which alignment moved the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from lightning_merge.methods.base import PerTensor, TensorMerge, hyperparameter
from lightning_merge.tensor_view import TensorView, add_delta


@dataclass(frozen=True)
class Expo(TensorMerge):
    """Extrapolate from the base through the one model: θ + α (θ − θ₀).

    The base is the model before alignment (SFT), the one model the aligned one (DPO, RLHF). The same as task arithmetic
    with the scale 1 + α on that one task vector.

    Args:
        alpha: α, in [-1, 100]: 0 returns the model, −1 the base; 0.3 by default, and 0.3 to 0.5 is often good. The
            paper chooses it by a reward on validation data; far beyond 1 models break.

    Cost: one pass over the base and the model.
    Reference: Zheng et al., 2024, Model Extrapolation Expedites Alignment, arXiv 2404.16792.

    Example:
        >>> import torch
        >>> from lightning_merge import TaskVectors
        >>> sft = {"weight": torch.tensor([1.0, 2.0, 3.0, 4.0])}
        >>> aligned = {"weight": torch.tensor([1.5, 2.0, 3.25, 3.0])}
        >>> Expo(alpha=0.5)(TaskVectors.open(sft, {"aligned": aligned}))["weight"]
        tensor([1.7500, 2.0000, 3.3750, 2.5000])
    """

    alpha: PerTensor = hyperparameter(0.3, "[-1, 100]")

    paper: ClassVar[str] = "Model Extrapolation Expedites Alignment (Zheng et al., 2024), arXiv 2404.16792"
    device_ready: ClassVar[bool] = True
    max_models: ClassVar[int | None] = 1

    @property
    def reads_own_entries(self) -> bool:
        """Entries that equal one model's are that model's own."""
        return True

    def apply(self, view: TensorView, context: Any) -> Tensor:
        """Return θ + α τ, with the ends bit for bit."""
        if self.alpha == -1:
            return view.base.clone()
        finetuned = view.finetuned[0]
        return finetuned.clone() if self.alpha == 0 else add_delta(finetuned, self.alpha * view.deltas[0])
