"""DARE (Yu et al., 2024, arXiv 2311.03099): drop entries of task vectors at random and rescale the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_merge.methods.base import Context, Header, Partial, PerModel, Transform, hyperparameter, per_model
from lightning_merge.methods.random import keep_mask
from lightning_merge.methods.rescale import Thinning, as_stored, blocks, keep_only, norms
from lightning_merge.tensor_view import TensorView


def drop_and_rescale(delta: Tensor, keep: Tensor, drop_rate: float, out: Tensor | None = None) -> Tensor:
    """Return δ · m / (1 − p), in ``out`` if given: what is kept grows so that the expectation stays δ."""
    return keep_only(torch.div(delta, 1.0 - drop_rate, out=out) if drop_rate else delta, keep.numpy(), out)


@dataclass(frozen=True)
class Dare(Transform):
    """Drop each entry of a task vector with probability p and divide the rest by 1 − p.

    The draws depend on seed, model name, tensor name and position only.

    ``compat="mergekit"`` is the thinning of mergekit's ``dare_linear`` and ``dare_ties``: task vectors are rounded to
    the dtype of the base, and what is kept grows to the L1 norm that the tensor had, not by 1 / (1 − p); a norm below
    1e-7 stays as it is.

    Args:
        drop_rate: p, in [0, 1), for all models or one for each by name; mergekit's density is 1 − p. 0.9 by default,
            the paper goes up to 0.99 where deltas are small.
        rescale: Divide by 1 − p, as DARE does; without it the task vector shrinks.
        compat: The ``paper``'s form, or ``mergekit``'s.

    Cost: no pass of its own; 16 random bits an entry. In mergekit's form one for the norms, and one bit of memory for
        each entry of a tensor in each model.
    Reference: Yu et al., 2024, Language Models are Super Mario, arXiv 2311.03099, section 3.1.

    Example:
        >>> import torch
        >>> from lightning_merge import TaskVectors
        >>> base = {"weight": torch.tensor([1.0, 2.0, 3.0, 4.0])}
        >>> a = {"weight": torch.tensor([1.5, 2.0, 3.25, 3.0])}
        >>> b = {"weight": torch.tensor([0.75, 3.0, 3.5, 4.0])}
        >>> task_vectors = TaskVectors.open(base, {"a": a, "b": b})
        >>> from lightning_merge.methods import TaskArithmetic
        >>> TaskArithmetic(scale=1)(task_vectors, transforms=[Dare(drop_rate=0.5)], seed=1)["weight"]
        tensor([1.0000, 4.0000, 4.5000, 2.0000])
    """

    drop_rate: PerModel = hyperparameter(0.9, "[0, 1)")
    rescale: bool = True
    compat: Literal["paper", "mergekit"] = "paper"

    paper: ClassVar[str] = "Language Models are Super Mario (Yu et al., 2024), arXiv 2311.03099"
    draws: ClassVar[bool] = True

    @property
    def elementwise(self) -> bool:
        """Only mergekit's form measures."""
        return not self._matches_norms

    def begin(self, header: Header) -> Context:
        """Remember the seed."""
        return Thinning(complete=not self._matches_norms, seed=header.seed)

    def measure(self, view: TensorView, context: Thinning) -> Partial:
        """Drop, and sum the norms before and after."""
        thinned = self._thinned(view, context.seed)
        return {**norms(view, self._deltas(view), thinned), **context.record(view, thinned)}

    def conclude(self, partial: Partial, context: Thinning) -> Context:
        """Find the factors that restore the norms."""
        return context.conclude(partial)

    def apply(self, view: TensorView, context: Thinning) -> Tensor:
        """Return the thinned task vectors ``(T, n)``."""
        return context.restored(view, self._deltas(view)) if context.kept else self._thinned(view, context.seed)

    def _thinned(self, view: TensorView, seed: int) -> Tensor:
        rates = per_model("Dare: drop_rate", self.drop_rate, view.models)
        deltas = self._deltas(view)
        if not any(rates):
            return deltas
        thinned = torch.empty_like(deltas)
        for task, (model, rate) in enumerate(zip(view.models, rates, strict=True)):
            if not rate:
                thinned[task] = deltas[task]
                continue
            divided = rate if self.rescale and self.compat == "paper" else 0.0
            for here in blocks(view):
                at = (view.start + here.start, view.start + here.stop)
                keep = keep_mask(1.0 - rate, seed, model, view.name, *at)
                drop_and_rescale(deltas[task, here], keep, divided, out=thinned[task, here])
        return thinned

    @property
    def _matches_norms(self) -> bool:
        return self.rescale and self.compat == "mergekit"

    def _deltas(self, view: TensorView) -> Tensor:
        return view.deltas if self.compat == "paper" else as_stored(view.deltas, view.info.dtype)
