"""Passthrough: one model as it is, or times a number; mergekit's ``passthrough``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from lightning_merge.methods.base import PerTensor, TensorMerge, hyperparameter
from lightning_merge.tensor_view import TensorView


@dataclass(frozen=True)
class Passthrough(TensorMerge):
    """Copy the weights of the one model, times a scale; the way layers are stacked from several models.

    Args:
        scale: What the weights are multiplied by, in [-100, 100]; 1 by default, which copies bit for bit.

    Cost: one pass over the model.
    Reference: mergekit's ``passthrough``; there is no paper.

    Example:
        >>> import torch
        >>> from lightning_merge import TaskVectors
        >>> model = {"weight": torch.tensor([1.0, 2.0, 3.0, 4.0])}
        >>> Passthrough(scale=0.5)(TaskVectors.open(None, {"model": model}))["weight"]
        tensor([0.5000, 1.0000, 1.5000, 2.0000])
    """

    scale: PerTensor = hyperparameter(1.0, "[-100, 100]")

    paper: ClassVar[str] = "no paper; mergekit's passthrough"
    needs_base: ClassVar[bool] = False
    max_models: ClassVar[int | None] = 1

    @property
    def reads_base(self) -> bool:
        """The base takes no part."""
        return False

    def apply(self, view: TensorView, context: Any) -> Tensor:
        """Return the model's entries, scaled."""
        return view.finetuned[0] * self.scale
