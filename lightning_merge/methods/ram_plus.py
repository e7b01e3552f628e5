"""RAM+ (Yuan et al., 2026, arXiv 2601.13572): as RAM, with a model's unique changes made larger as it shares more."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_merge.methods.base import Context, Header, Partial, PerTensor, TensorMerge, hyperparameter, take_selected
from lightning_merge.methods.ram import active, count_active, merge_active, square_sums, typical_change
from lightning_merge.tensor_view import TensorView


def factor_of(shared: int, unique: int, r: float, alpha: float) -> float:
    """Return 1 + r · min(shared / unique, α), the factor on what only this model changed."""
    # Without a unique entry there is nothing that the factor would go on.
    return 1.0 + r * min(shared / max(unique, 1), alpha)


@dataclass
class _Overlap(Context):
    """ε of each tensor in units of its weights, then each model's factor."""

    entries: dict[str, int] = field(default_factory=dict)
    floors: dict[str, float] | None = None
    factors: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class RamPlus(TensorMerge):
    """Add what only one model changed, times 1 + r · min(ρ_t, α), and the average of what several changed.

    ρ_t is the number of entries that model t changed together with others over those it changed alone, counted over the
    whole model; ``mergekit`` counts each tensor by itself. What counts as changed: see :class:`Ram`.

    Args:
        r: How strongly sharing makes up for dilution, in [0, 100]; 0.1 by default.
        alpha: α, the largest ratio that counts, in [0, 100]; 0.2 by default.
        epsilon: ε, in [0, 1]; 1e-5 in the paper.
        compat: ``paper``, with ε relative to the tensor's scale and ρ_t over the model, or ``mergekit``'s
            ``ramplus_tl``, with ε absolute and ρ_t of each tensor.

    Cost: two measuring passes over the base and the models and one to apply; with ``mergekit`` one and one.
    Reference: Yuan et al., 2026, Behavior Knowledge Merge in Reinforced Agentic Models, arXiv 2601.13572. (The scale
        of ε is ours; that ρ_t goes over the whole model is read from mergekit's calling its own form tensor-local.)

    Example:
        >>> import torch
        >>> from lightning_merge import TaskVectors
        >>> base = {"weight": torch.tensor([1.0, 2.0, 3.0, 4.0])}
        >>> a = {"weight": torch.tensor([1.5, 2.0, 3.25, 3.0])}
        >>> b = {"weight": torch.tensor([0.75, 3.0, 3.5, 4.0])}
        >>> task_vectors = TaskVectors.open(base, {"a": a, "b": b})
        >>> RamPlus(r=0.5, alpha=1)(task_vectors)["weight"]  # each changed two entries with the other, one alone
        tensor([1.1250, 3.5000, 3.3750, 2.5000])
    """

    r: PerTensor = hyperparameter(0.1, "[0, 100]")
    alpha: PerTensor = hyperparameter(0.2, "[0, 100]")
    epsilon: PerTensor = hyperparameter(1e-5, "[0, 1]")
    compat: Literal["paper", "mergekit"] = "paper"

    paper: ClassVar[str] = "Behavior Knowledge Merge in Reinforced Agentic Models (Yuan et al., 2026), arXiv 2601.13572"

    @property
    def measuring_passes(self) -> float:
        """The floor, then the share that is unique; mergekit's floor is given."""
        return 2.0 if self.compat == "paper" else 1.0

    @property
    def reads_own_entries(self) -> bool:
        """Entries that equal one model's are that model's own."""
        return True

    @property
    def reach(self) -> Literal["tensor", "model"]:
        """Over what shared and unique entries are counted."""
        return "model" if self.compat == "paper" else "tensor"

    def begin(self, header: Header) -> Context:
        """Ask for the tensors' scales where ε goes by them, then for the counts."""
        entries = {name: info.numel * len(header.models) for name, info in header.tensors.items()}
        floors = dict.fromkeys(entries, self.epsilon) if self.compat == "mergekit" else None
        return _Overlap(complete=False, entries=entries, floors=floors)

    def measure(self, view: TensorView, context: _Overlap) -> Partial:
        """Add up squares, or count what each model changed with others and alone."""
        if context.floors is None:
            return {(view.name, view.start): square_sums(view)}
        floor = context.floors[view.name]
        deltas = view.deltas
        unique = count_active(deltas, floor).eq_(1)
        partial: Partial = {}
        for position, delta in enumerate(deltas):
            changed = active(delta, floor)
            partial["changed", position] = int(torch.count_nonzero(changed))
            partial["unique", position] = int(torch.count_nonzero(changed.mul_(unique)))
        return partial

    def conclude(self, partial: Partial, context: _Overlap) -> Context:
        """Set ε for each tensor, then the factor of each model."""
        if context.floors is None:
            squares: dict[str, list[float]] = {name: [] for name in context.entries}
            for where, blocks in partial.items():
                squares[where[0]] += blocks  # type: ignore[index]
            floors = {
                name: self.epsilon * typical_change(squares[name], entries) for name, entries in context.entries.items()
            }
            return _Overlap(complete=False, entries=context.entries, floors=floors)
        counts = [(partial["changed", model], partial["unique", model]) for model in range(len(partial) // 2)]
        factors = [factor_of(changed - unique, unique, self.r, self.alpha) for changed, unique in counts]
        return _Overlap(floors=context.floors, factors=factors)

    def apply(self, view: TensorView, context: _Overlap) -> Tensor:
        """Return θ₀ + rescaled unique changes + the mean of shared ones."""
        assert context.floors is not None
        return take_selected(merge_active(view.deltas, context.floors[view.name], context.factors), view)
