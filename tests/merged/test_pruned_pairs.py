"""Coefficients of what a pruning left nothing of: found, and 0 for good."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from component_models import SHAPES, TASKS, Bag, loss_of, vectors

from lightning_merge import TaskVectors
from lightning_merge.coefficients import Coefficients
from lightning_merge.errors import UserError
from lightning_merge.merged_weights import MergedWeights
from lightning_merge.methods import Dare, LwPTV, TaskArithmetic
from lightning_merge.pruned_pairs import pruned_pairs
from lightning_merge.rank_masks import RankMasks


def test_pruned_pairs_are_those_that_lose_everything() -> None:
    base, models, _ = vectors()
    models["b"]["norm.weight"] = base["norm.weight"].clone()  # never changed: no pruning took it
    task_vectors = TaskVectors.open(base, models)
    steps = [LwPTV(eta=0.5, granularity="tensor"), Dare(drop_rate=0.5)]
    pairs = pruned_pairs(task_vectors, steps, seed=3)
    expected = []
    for name in sorted(SHAPES):
        for task in TASKS:
            only = {t: float(t == task) for t in TASKS}
            alone = TaskArithmetic(scale=only)(task_vectors, transforms=steps, seed=3)
            if torch.equal(alone[name], base[name]) and not torch.equal(models[task][name], base[name]):
                expected.append((task, name))
    assert pairs == expected and len(pairs) >= 6
    assert pruned_pairs(task_vectors, []) == []


@pytest.mark.parametrize("by", ["tensor", "task"])
@pytest.mark.parametrize("constraint", ["free", "clamp", "softmax"])
def test_pruned_coefficients_stay_zero(by: Any, constraint: Any) -> None:
    """Under Adam with weight decay, in every table, and the merge is that of the other pairs alone."""
    base, models, task_vectors = vectors()
    transforms = [LwPTV(eta=0.5, granularity="tensor")]
    pairs = pruned_pairs(task_vectors, transforms)
    assert len(pairs) == 3 * 3
    scalars = Coefficients(TASKS, task_vectors.tensor_names, by=by, constraint=constraint, zero=pairs)
    first = scalars.raw.detach().clone()
    module = Bag()
    merged = MergedWeights(module, task_vectors, scalars, transforms=transforms)
    optimizer = torch.optim.AdamW(scalars.parameters(), lr=0.03, weight_decay=0.1)
    merged.attach()
    for _ in range(5):
        loss_of(dict(module.named_parameters())).backward()
        optimizer.zero_grad()
        merged.backward()
        if by == "tensor":
            for task, name in pairs:
                assert scalars.raw.grad[TASKS.index(task), scalars.groups.index(name)] == 0, "is not trained"
        optimizer.step()
        merged.materialise()
    values = scalars().detach()
    assert not torch.equal(scalars.raw, first) and scalars.drift() > 0
    for task, name in pairs:
        assert values[scalars.span(name)][TASKS.index(task)] == 0.0
        if by == "tensor":
            assert scalars.table()[task][name] == 0.0
        assert scalars.schedule().values[name][task] == 0.0
    for name, parameter in module.named_parameters():
        expected = base[name].clone()
        for row, task in enumerate(TASKS):
            if (task, name) not in pairs:
                expected += values[scalars.span(name)][row] * (models[task][name] - base[name])
        torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=2e-6)
    if constraint == "softmax" and by == "tensor":
        sums = scalars.by_group().sum(dim=0).detach()
        assert all(np.isclose(value, 1, atol=1e-6) or value == 0 for value in sums.tolist())


def test_masks_take_the_pruned_pairs_of_their_coefficients() -> None:
    _, _, task_vectors = vectors()
    own = Coefficients(TASKS, task_vectors.tensor_names, zero=[("b", "tall.weight")])
    masks = RankMasks.of(task_vectors, coefficients=own)
    values = masks()[masks.span("tall.weight")].reshape(3, -1)
    assert (values[1] == 0).all() and (values[0] != 0).all()
    masks().sum().backward()
    assert masks.raw.grad.reshape(-1)[:].count_nonzero() == masks.raw.numel() - 4


def test_pruned_names_must_exist() -> None:
    with pytest.raises(UserError, match=r"tensor of a coefficient that is 0 'wieght'.*mean 'weight'"):
        Coefficients(["a"], ["weight"], zero=[("a", "wieght")])
    with pytest.raises(UserError, match="model of a coefficient that is 0 'x'"):
        Coefficients(["a"], ["weight"], zero=[("x", "weight")])
