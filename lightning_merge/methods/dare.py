"""DARE (Yu et al., 2024, arXiv 2311.03099): drop entries of task vectors at random and rescale the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_merge.methods.base import Context, Header, Transform, hyperparameter
from lightning_merge.methods.random import keep_mask
from lightning_merge.tensor_view import TensorView


def drop_and_rescale(delta: Tensor, keep: Tensor, drop_rate: float) -> Tensor:
    """Return δ · m / (1 − p): what is kept grows so that the expectation stays δ."""
    return torch.where(keep, delta, 0.0) / (1.0 - drop_rate)


@dataclass
class _Seeded(Context):
    seed: int = 0


@dataclass(frozen=True)
class Dare(Transform):
    """Drop each entry of a task vector with probability p and divide the rest by 1 − p.

    The draws depend on seed, model name, tensor name and position only.

    Args:
        drop_rate: p, in [0, 1); 0.9 by default, the paper goes up to 0.99 where deltas are small.
        rescale: Divide by 1 − p, as DARE does; without it the task vector shrinks.

    Cost: no pass of its own; 16 random bits an entry.
    Reference: Yu et al., 2024, Language Models are Super Mario, arXiv 2311.03099, section 3.1. (mergekit's
        ``dare_*`` matches the tensor's L1 norm instead of dividing by 1 − p.)

    Example:
        >>> import torch
        >>> from lightning_merge import TaskVectors
        >>> base = {"weight": torch.tensor([1.0, 2.0, 3.0, 4.0])}
        >>> a = {"weight": torch.tensor([1.5, 2.0, 3.25, 3.0])}
        >>> b = {"weight": torch.tensor([0.75, 3.0, 3.5, 4.0])}
        >>> task_vectors = TaskVectors.open(base, {"a": a, "b": b})
        >>> from lightning_merge.methods import TaskArithmetic
        >>> TaskArithmetic(scale=1)(task_vectors, transforms=[Dare(drop_rate=0.5)], seed=1)["weight"]
        tensor([1.0000, 2.0000, 4.5000, 2.0000])
    """

    drop_rate: float = hyperparameter(0.9, "[0, 1)")
    rescale: bool = True

    paper: ClassVar[str] = "Language Models are Super Mario (Yu et al., 2024), arXiv 2311.03099"

    def begin(self, header: Header) -> Context:
        """Remember the seed."""
        return _Seeded(seed=header.seed)

    def apply(self, view: TensorView, context: _Seeded) -> Tensor:
        """Return the thinned task vectors ``(T, n)``."""
        if self.drop_rate == 0:
            return view.deltas
        thinned = []
        for model, delta in zip(view.models, view.deltas, strict=True):
            keep = keep_mask(1.0 - self.drop_rate, context.seed, model, view.name, view.start, view.stop)
            thinned.append(drop_and_rescale(delta, keep, self.drop_rate if self.rescale else 0.0))
        return torch.stack(thinned)
