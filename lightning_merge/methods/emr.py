"""EMR-Merging (Huang et al., 2024, arXiv 2405.17461): elect one vector, then mask and rescale it for each task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_merge.methods.base import Context, Header, Partial, TensorMerge, ordered_sum, take_selected
from lightning_merge.methods.tall_mask import position_of
from lightning_merge.tensor_view import TensorView, add_delta, block_sums


def elect(deltas: Tensor) -> Tensor:
    """Elect the unified vector: the sign of Σ τ_t, and the largest |τ_t| that agrees; ``(T, n)`` to ``(n,)``."""
    sign = torch.sign(ordered_sum(deltas))
    largest = torch.zeros_like(sign)
    along = torch.empty_like(sign)
    for delta in deltas:
        torch.maximum(largest, torch.mul(delta, sign, out=along), out=largest)  # exact, the sign is -1, 0 or 1
    return largest.mul_(sign)


def masked_for(delta: Tensor, unified: Tensor) -> Tensor:
    """Return the unified vector where it points the task's way, else 0."""
    along = unified.sign().mul_(delta)  # a sign: the product of two small numbers could be 0
    return along.gt_(0).mul_(unified)


@dataclass
class _Rescaler(Context):
    """λ_t of the one task."""

    factor: float = 0.0


@dataclass(frozen=True)
class Emr(TensorMerge):
    """Retrieve the model of one task from the elected vector: θ₀ + λ_t · M_t ⊙ τ_uni.

    τ_uni has the sign of Σ τ and the largest magnitude among the task vectors that agree with it; M_t holds where τ_t
    agrees; λ_t = Σ|τ_t| / Σ|M_t ⊙ τ_uni|. Stored for T tasks, that is one vector, T bitmaps and T numbers.

    Args:
        task: Name of the model whose task is meant.
        scope: One λ_t over all entries of the ``model`` (paper), or one for each ``tensor``. (The released code is
            between the two: it divides sums, over tensors, of each tensor's mean.)

    Raises:
        UserError: ``task`` names none of the models.

    Cost: one measuring pass over the base and the models and one to apply.
    Reference: Huang et al., 2024, EMR-Merging: Tuning-Free High-Performance Model Merging, arXiv 2405.17461, section 3.

    Example:
        >>> import torch
        >>> from lightning_merge import TaskVectors
        >>> base = {"weight": torch.tensor([1.0, 2.0, 3.0, 4.0])}
        >>> a = {"weight": torch.tensor([1.5, 2.0, 3.25, 3.0])}
        >>> b = {"weight": torch.tensor([0.75, 3.0, 3.5, 4.0])}
        >>> task_vectors = TaskVectors.open(base, {"a": a, "b": b})
        >>> Emr(task="a")(task_vectors)["weight"]  # 1.75 / 2 times the masked vector
        tensor([1.4375, 2.0000, 3.4375, 3.1250])
    """

    task: str = ""
    scope: Literal["model", "tensor"] = "model"

    paper: ClassVar[str] = "EMR-Merging (Huang et al., 2024), arXiv 2405.17461"

    @property
    def reach(self) -> Literal["tensor", "model"]:
        """Over what the rescaler goes."""
        return self.scope

    def check_models(self, models: Sequence[str]) -> None:
        """Check the models, and that one of them is the task's."""
        super().check_models(models)
        position_of("Emr", self.task, models)

    def begin(self, header: Header) -> Context:
        """Ask for the measuring pass."""
        return _Rescaler(complete=False)

    def measure(self, view: TensorView, context: _Rescaler) -> Partial:
        """Add up, block by block, |τ_t| and what the mask leaves of |τ_uni|."""
        delta = view.deltas[view.models.index(self.task)]
        masked = masked_for(delta, elect(view.deltas))
        return {
            ("task", view.name, view.start): block_sums(delta.double().abs_()),
            ("unified", view.name, view.start): block_sums(masked.double().abs_()),
        }

    def conclude(self, partial: Partial, context: _Rescaler) -> Context:
        """Divide the sums."""
        task, unified = (
            math.fsum(block for key, blocks in partial.items() if key[0] == part for block in blocks)  # type: ignore[index]
            for part in ("task", "unified")
        )
        return _Rescaler(factor=task / unified if unified else 0.0)

    def apply(self, view: TensorView, context: _Rescaler) -> Tensor:
        """Return θ₀ + λ_t · the masked unified vector."""
        position = view.models.index(self.task)
        masked = masked_for(view.deltas[position], elect(view.deltas))
        if context.factor == 1:
            return take_selected(masked, view, [position])
        return add_delta(view.base, masked.mul_(context.factor))
