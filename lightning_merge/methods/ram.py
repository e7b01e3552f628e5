"""Reinforced Agent Merging, RAM (Yuan et al., 2026, arXiv 2601.13572): keep what one model changed, average the rest.

Reinforcement learning changes few entries, and others in each model: an average over all models would dilute them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_merge.methods.base import Context, Header, Partial, PerTensor, TensorMerge, hyperparameter, take_selected
from lightning_merge.tensor_view import TensorView, block_sums


def active(delta: Tensor, floor: float) -> Tensor:
    """Return 1 where a model changed the entry, |τ_t| > ε, else 0."""
    return delta.abs().gt_(floor)


def count_active(deltas: Tensor, floor: float) -> Tensor:
    """Count the models that changed each entry, ``(T, n)`` to ``(n,)``."""
    count = torch.zeros_like(deltas[0])
    for delta in deltas:
        count += active(delta, floor)
    return count


def merge_active(deltas: Tensor, floor: float, factors: Sequence[float] | None = None) -> Tensor:
    """Take what one model changed whole, times its factor, and average what several changed; ``(T, n)`` to ``(n,)``."""
    count = count_active(deltas, floor)
    unique = count.eq(1).to(count.dtype)
    total = torch.zeros_like(count)
    for position, delta in enumerate(deltas):
        change = active(delta, floor).mul_(delta)
        if factors is not None and factors[position] != 1:
            change *= unique.mul(factors[position] - 1).add_(1)
        total += change
    return total / count.clamp_(min=1)


def square_sums(view: TensorView) -> list[float]:
    """Sum Σ_t τ_t² over each grid block."""
    total = torch.zeros(view.stop - view.start, dtype=torch.float64)
    for delta in view.delta_rows():
        total += delta.double().square_()
    return block_sums(total)


def typical_change(squares: Sequence[float], entries: int) -> float:
    """Return the root mean square of τ over a tensor's entries in all models."""
    return math.sqrt(math.fsum(squares) / entries) if entries else 0.0


@dataclass
class _Floor(Context):
    """ε in units of this tensor's weights."""

    entries: int = 0
    floor: float = 0.0


@dataclass(frozen=True)
class Ram(TensorMerge):
    """Add whole what only one model changed, and the average of what several changed.

    A model changed an entry where |τ_t| > ε times the root mean square of all task vectors in that tensor; ``mergekit``
    compares with ε itself, so that models with small changes lose them.

    Args:
        epsilon: ε, in [0, 1]; 1e-5 in the paper.
        compat: ``paper``, with ε relative to the tensor's own scale, or ``mergekit``'s ``ram``, with ε absolute.

    Cost: one measuring pass over the base and the models and one to apply; with ``mergekit`` one in all.
    Reference: Yuan et al., 2026, Behavior Knowledge Merge in Reinforced Agentic Models, arXiv 2601.13572. (The scale
        of ε is ours: the paper has a constant.)

    Example:
        >>> import torch
        >>> from lightning_merge import TaskVectors
        >>> base = {"weight": torch.tensor([1.0, 2.0, 3.0, 4.0])}
        >>> a = {"weight": torch.tensor([1.5, 2.0, 3.25, 3.0])}
        >>> b = {"weight": torch.tensor([0.75, 3.0, 3.5, 4.0])}
        >>> task_vectors = TaskVectors.open(base, {"a": a, "b": b})
        >>> Ram()(task_vectors)["weight"]
        tensor([1.1250, 3.0000, 3.3750, 3.0000])
    """

    epsilon: PerTensor = hyperparameter(1e-5, "[0, 1]")
    compat: Literal["paper", "mergekit"] = "paper"

    paper: ClassVar[str] = "Behavior Knowledge Merge in Reinforced Agentic Models (Yuan et al., 2026), arXiv 2601.13572"

    @property
    def measuring_passes(self) -> float:
        """The floor; mergekit's is given."""
        return 1.0 if self.compat == "paper" else 0.0

    @property
    def reads_own_entries(self) -> bool:
        """Entries that equal one model's are that model's own."""
        return True

    def begin(self, header: Header) -> Context:
        """Ask for the tensor's scale, where ε goes by that."""
        if self.compat == "mergekit":
            return _Floor(floor=self.epsilon)
        entries = sum(info.numel for info in header.tensors.values()) * len(header.models)
        return _Floor(complete=False, entries=entries)

    def measure(self, view: TensorView, context: _Floor) -> Partial:
        """Add up the squares of the task vectors."""
        return {(view.name, view.start): square_sums(view)}

    def conclude(self, partial: Partial, context: _Floor) -> Context:
        """Set ε in units of the tensor's weights."""
        squares = [block for blocks in partial.values() for block in blocks]
        return _Floor(floor=self.epsilon * typical_change(squares, context.entries))

    def apply(self, view: TensorView, context: _Floor) -> Tensor:
        """Return θ₀ + unique changes + the mean of shared ones."""
        return take_selected(merge_active(view.deltas, context.floor), view)
