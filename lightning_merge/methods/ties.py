"""TIES-Merging (Yadav et al., 2023, arXiv 2306.01708).

Trim each task vector to its largest entries, elect one sign for each entry, merge what agrees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_merge.errors import UserError
from lightning_merge.methods.base import (
    Context,
    Header,
    Partial,
    PerModel,
    PerTensor,
    TensorMerge,
    hyperparameter,
    kept_count,
    ordered_sum,
    per_model,
    take_selected,
)
from lightning_merge.methods.rescale import as_stored, blocks, norm_factors, norms
from lightning_merge.methods.top_k import LargestEntries
from lightning_merge.tensor_view import TensorView, add_delta


def elect_sign(deltas: Tensor, majority: float = 0.0) -> Tensor:
    """Elect the sign of the summed trimmed task vectors, ``(T, n)`` to ``(n,)`` with entries in {−1, 0, 1}.

    Where the sum is 0 the ``majority`` sign of all entries is taken (paper, section 3, and its released code).
    """
    total = ordered_sum(deltas).numpy()
    # In bytes: choosing by a mask costs more than all of this where the mask is random.
    sign = np.greater(total, 0).view(np.int8) - np.less(total, 0).view(np.int8)
    if majority:
        sign += np.equal(sign, 0).view(np.int8) * np.int8(majority)
    return torch.from_numpy(sign).to(deltas.dtype)


def disjoint_merge(
    deltas: Tensor,
    sign: Tensor,
    operation: Literal["mean", "sum"],
    weights: Sequence[float] | None = None,
    smallest: float | None = None,
) -> Tensor:
    """Sum, or average over those that agree, the entries whose sign is the elected one; ``(T, n)`` to ``(n,)``.

    Args:
        deltas: The trimmed task vectors; with ``weights``, w_t τ_t.
        sign: The elected sign of each entry.
        operation: ``sum``, or ``mean``: the sum by how many agree.
        weights: One for each task; the mean then divides by the sum of the weights that agree, or by 1 where that is 0.
        smallest: What the mean divides by where the sum of the weights is smaller.
    """
    agreeing = torch.zeros_like(sign)
    along = torch.empty_like(sign)
    # Counting in bytes is the cheapest that holds.
    count = np.zeros(sign.shape, dtype=np.uint8 if len(deltas) < 256 else np.int32)
    divisor = torch.zeros_like(sign)
    for task, delta in enumerate(deltas):
        torch.mul(delta, sign, out=along).clamp_(min=0)  # exact, since the sign is -1, 0 or 1
        agreeing += along
        if operation == "mean":
            agrees = np.greater(along.numpy(), 0).view(np.uint8)
            if weights is None:
                count += agrees
            else:
                divisor.add_(torch.from_numpy(agrees).to(sign.dtype), alpha=weights[task])
    agreeing *= sign
    if operation == "sum":
        return agreeing
    if weights is None:
        divisor = torch.from_numpy(np.maximum(count, 1)).to(sign.dtype)
    elif smallest is None:
        divisor += torch.from_numpy(np.equal(divisor.numpy(), 0).view(np.uint8)).to(sign.dtype)
    else:
        divisor.clamp_(min=smallest)
    return agreeing.div_(divisor)


@dataclass
class _Election(Context):
    """The trim's thresholds, then the factors that restore norms, or the majority sign."""

    largest: LargestEntries | None = None
    factors: list[float] | None = None
    majority: float = 0.0
    models: int = 1


@dataclass(frozen=True)
class Ties(TensorMerge):
    """Trim, elect sign, merge: θ₀ + λ · (disjoint merge of the largest entries of each task vector).

    Trimming keeps exactly ⌊density · D⌋ entries (at least one); among equal magnitudes the first by tensor name and
    flat index stay. An entry whose trimmed sum is exactly 0 takes the sign that most entries elected.

    ``compat="mergekit"`` is the ``ties`` of mergekit 0.1.5, and with density 1 the sign election of its other methods:
    task vectors rounded to the dtype of the base, trimmed tensor by tensor and weighted before the election, where a
    sum of 0 elects +; the mean divides by the sum of the agreeing weights, or by 1 where that is 0.

    Args:
        density: Fraction of each task vector kept, in (0, 1]; for all models or one for each by name; the paper's 20 %
            by default.
        scale: λ, in [-100, 100]; 1 in the paper with ``mean``; about 0.3 goes with ``sum``.
        operation: ``mean`` over the agreeing entries (paper) or their ``sum`` (used for CLIP by AdaMerging); mergekit's
            ``normalize: true`` and ``false``.
        scope: Trim over the whole ``model`` (paper) or over each ``tensor`` (peft, and always with ``compat``).
        weights: With ``compat="mergekit"``, what each task vector is multiplied by, in [-100, 100]; 1 by default.
        rescale: With ``compat="mergekit"``, give each trimmed tensor back its L1 norm.
        compat: The ``paper``'s form, or ``mergekit``'s.

    Raises:
        UserError: ``weights`` or ``rescale`` without ``compat="mergekit"``.

    Cost: a small sampling pass and one counting pass for the trim (a further one where rare ties are broken), one for
        the signs (or for the norms), one to merge; no sorting. Extra memory: about 1 % of the entries for each task,
        and some pieces of 2¹⁷ entries of T models.
    Reference: Yadav et al., 2023, TIES-Merging, arXiv 2306.01708, algorithm 1. (The released code keeps one entry
        more and fails at density 1.)

    Example:
        >>> import torch
        >>> from lightning_merge import TaskVectors
        >>> base = {"weight": torch.tensor([1.0, 2.0, 3.0, 4.0])}
        >>> a = {"weight": torch.tensor([1.5, 2.0, 3.25, 3.0])}
        >>> b = {"weight": torch.tensor([0.75, 3.0, 3.5, 4.0])}
        >>> task_vectors = TaskVectors.open(base, {"a": a, "b": b})
        >>> Ties(density=0.5)(task_vectors)["weight"]
        tensor([1.5000, 3.0000, 3.5000, 3.0000])
    """

    density: PerModel = hyperparameter(0.2, "(0, 1]")
    scale: PerTensor = hyperparameter(1.0, "[-100, 100]")
    operation: Literal["mean", "sum"] = "mean"
    scope: Literal["model", "tensor"] = "model"
    weights: PerModel = hyperparameter(1.0, "[-100, 100]")
    rescale: bool = False
    compat: Literal["paper", "mergekit"] = "paper"

    paper: ClassVar[str] = "TIES-Merging (Yadav et al., 2023), arXiv 2306.01708"

    @property
    def reads_own_entries(self) -> bool:
        """Entries that equal one model's are that model's own."""
        return self.scale == 1 and self.compat == "paper"

    @property
    def measuring_passes(self) -> float:
        """One for the trim, and in the paper's form one for the majority sign."""
        return float(self.density != 1) + float(self.compat == "paper")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, given in (("weights", self.weights != 1.0), ("rescale", self.rescale)):
            if given and self.compat == "paper":
                raise UserError(f"Ties: {name} is a setting of mergekit's form. Expected compat: mergekit beside it.")

    @property
    def reach(self) -> Literal["tensor", "model"]:
        """Over what entries are trimmed."""
        return self.scope if self.compat == "paper" else "tensor"

    def begin(self, header: Header) -> Context:
        """Plan how many entries each task vector keeps."""
        densities = per_model("Ties: density", self.density, header.models)
        election = _Election(complete=False, models=len(header.models))
        if all(density == 1 for density in densities):
            return self._next(election)

        def ranks(count: int) -> list[list[int]]:
            if self.compat == "mergekit":
                return [[max(1, int(density * count))] for density in densities]
            return [[max(1, kept_count(density, count))] for density in densities]

        dtypes = {info.dtype for info in header.tensors.values()}
        score = (lambda rows: as_stored(rows, *dtypes)) if self.compat == "mergekit" else None
        return replace(election, largest=LargestEntries(tensors=header.tensors, ranks=ranks, score=score))

    def measure(self, view: TensorView, context: _Election) -> Partial:
        """Count magnitudes until the trim is known, then the signs that entries elect, or what the trim took."""
        if context.largest is not None and not context.largest.complete:
            return context.largest.measure(view)
        if self.rescale:
            return norms(view, self._deltas(view), self._trimmed(view, context))
        trimmed = self._trimmed(view, context)
        majority = 0
        for here in blocks(view):
            total = ordered_sum(trimmed[:, here]).numpy()
            majority += int(np.count_nonzero(total > 0)) - int(np.count_nonzero(total < 0))
        return {"majority": majority}

    def conclude(self, partial: Partial, context: _Election) -> Context:
        """Narrow the trim, then settle the majority sign or the factors."""
        if context.largest is not None and not context.largest.complete:
            largest = context.largest.conclude(partial)
            return self._next(replace(context, largest=largest)) if largest.complete else context
        if self.rescale:
            return replace(context, complete=True, factors=norm_factors(partial))
        return replace(context, complete=True, majority=float(np.sign(partial.get("majority", 0))))

    def apply(self, view: TensorView, context: _Election) -> Tensor:
        """Return θ₀ + λ · the disjoint merge."""
        assert isinstance(self.scale, (int, float)), "schedules are settled before"
        trimmed = self._trimmed(view, context)
        merged = torch.empty(view.stop - view.start, dtype=trimmed.dtype)
        weights = per_model("Ties: weights", self.weights, view.models)
        factors = [w * f for w, f in zip(weights, context.factors or [1.0] * len(weights), strict=True)]
        plain = all(value == 1 for value in [*weights, *factors])
        column = torch.tensor(factors, dtype=trimmed.dtype)[:, None]
        majority = context.majority if self.compat == "paper" else 1.0
        for here in blocks(view):
            rows = trimmed[:, here] if plain else trimmed[:, here] * column
            sign = elect_sign(rows, majority)
            merged[here] = disjoint_merge(rows, sign, self.operation, None if plain else weights)
        if self.scale == 1 and self.compat == "paper":
            return take_selected(merged, view)
        return add_delta(view.base, merged.mul_(self.scale))

    def _next(self, context: _Election) -> _Election:
        """Go on after the trim: one model elects its own signs, and mergekit's form needs no majority."""
        return replace(context, complete=not self.rescale and (context.models == 1 or self.compat == "mergekit"))

    def _deltas(self, view: TensorView) -> Tensor:
        return view.deltas if self.compat == "paper" else as_stored(view.deltas, view.info.dtype)

    def _trimmed(self, view: TensorView, context: _Election) -> Tensor:
        deltas = self._deltas(view)
        return deltas if context.largest is None else context.largest.trim(view, values=deltas)
