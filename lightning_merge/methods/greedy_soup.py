"""Greedy model soup (Wortsman et al., 2022, arXiv 2203.05482, recipe 1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lightning_merge.methods.average import SimpleAverage
from lightning_merge.methods.base import ModelMerge, TensorMerge, Transform
from lightning_merge.task_vectors import TaskVectors


@dataclass(frozen=True)
class GreedySoup(ModelMerge):
    """Average the models that help: taken from best to worst, a model stays if validation does not suffer.

    Args:
        accept_ties: Also keep a model that leaves the score as it is, as in the paper's recipe (≥); the released code
            asks for an improvement (>).

    Raises:
        UserError: No ``score`` is given.

    Cost: one average and one scoring for each model, besides scoring each alone.
    Reference: Wortsman et al., 2022, Model soups, arXiv 2203.05482, recipe 1.

    Example:
        >>> import torch
        >>> from lightning_merge import TaskVectors
        >>> base = {"weight": torch.tensor([1.0, 2.0, 3.0, 4.0])}
        >>> a = {"weight": torch.tensor([1.5, 2.0, 3.25, 3.0])}
        >>> b = {"weight": torch.tensor([0.75, 3.0, 3.5, 4.0])}
        >>> task_vectors = TaskVectors.open(base, {"a": a, "b": b})
        >>> def score(state_dict):  # validation accuracy, say
        ...     return -float((state_dict["weight"] - 3).abs().sum())
        >>> GreedySoup()(task_vectors, score=score)["weight"]
        tensor([1.5000, 2.0000, 3.2500, 3.0000])
    """

    accept_ties: bool = True

    paper: ClassVar[str] = "Model soups (Wortsman et al., 2022), arXiv 2203.05482"
    needs_base: ClassVar[bool] = False
    needs_score: ClassVar[bool] = True

    def plan(
        self,
        task_vectors: TaskVectors,
        transforms: Sequence[Transform],
        score: Callable[[dict[str, Tensor]], float],
        seed: int,
    ) -> tuple[TensorMerge, TaskVectors]:
        """Choose the soup's ingredients; what remains is their simple average."""

        def score_of(names: list[str]) -> float:
            value = float(score(SimpleAverage()(task_vectors.subset(sorted(names)), transforms, seed)))
            # A model that diverged scores NaN, which compares with nothing: it comes last and never helps.
            return -math.inf if math.isnan(value) else value

        alone = {name: score_of([name]) for name in task_vectors.names}
        # Equal scores are taken in order of name, so that the listing order changes nothing.
        ranked = sorted(task_vectors.names, key=lambda name: (-alone[name], name))
        soup, best = [ranked[0]], alone[ranked[0]]
        for name in ranked[1:]:
            candidate = score_of([*soup, name])
            if candidate > best or (self.accept_ties and candidate == best):
                soup, best = [*soup, name], candidate
        return SimpleAverage(), task_vectors.subset(sorted(soup))
