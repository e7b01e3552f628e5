"""NearSwap: swap in the entries that lie near the base's, and move the others a little; mergekit's ``nearswap``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_merge.methods.base import PerTensor, TensorMerge, hyperparameter
from lightning_merge.methods.magmax import mask_for, put_where
from lightning_merge.tensor_view import TensorView, add_delta


@dataclass(frozen=True)
class NearSwap(TensorMerge):
    """Move each entry of the base towards the one model, by at most t: θ₀ + clip(τ, −t, t).

    Mergekit writes it as w θ + (1 − w) θ₀ with w = min(t / |τ|, 1): the nearer two entries lie, the more of the model
    is taken, and all of it, bit for bit, where they differ by no more than t. (It also sets differences below 1e-6 to
    that, which shows only where t is smaller.)

    Args:
        t: How far an entry may move, in units of the weights, in [0, 100]; 0.0001 by default, as in the model that
            introduced it.

    Cost: one pass over the base and the model.
    Reference: mergekit's ``nearswap``, from the model alchemonaut/QuartetAnemoi-70B-t0.0001; there is no paper.

    Example:
        >>> import torch
        >>> from lightning_merge import TaskVectors
        >>> base = {"weight": torch.tensor([1.0, 2.0, 3.0, 4.0])}
        >>> model = {"weight": torch.tensor([1.5, 2.0, 3.25, 3.0])}
        >>> NearSwap(t=0.25)(TaskVectors.open(base, {"model": model}))["weight"]
        tensor([1.2500, 2.0000, 3.2500, 3.7500])
    """

    t: PerTensor = hyperparameter(0.0001, "[0, 100]")

    paper: ClassVar[str] = "no paper; mergekit's nearswap"
    device_ready: ClassVar[bool] = True
    max_models: ClassVar[int | None] = 1

    @property
    def reads_own_entries(self) -> bool:
        """Entries that equal one model's are that model's own."""
        return True

    def apply(self, view: TensorView, context: Any) -> Tensor:
        """Return the model's entry where it is near, else the base's moved by t."""
        delta = view.deltas[0]
        moved = add_delta(view.base, delta.clamp(-self.t, self.t))
        return put_where(moved, view.finetuned[0], torch.le(delta.abs(), self.t, out=mask_for(delta)))
