"""Which models a pruning has left nothing of, tensor by tensor: LwPTV (arXiv 2506.09093) prunes whole layers of a task.

A coefficient of such a pair multiplies 0: it would wander under weight decay and noise, and mislead whoever reads it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightning_merge.methods.base import Transform
from lightning_merge.methods.streaming import Chain
from lightning_merge.task_vectors import TaskVectors


def pruned_pairs(
    task_vectors: TaskVectors, transforms: Sequence[Transform], seed: int = 0, threads: int | None = None
) -> list[tuple[str, str]]:
    """Return the pairs (model, tensor) of which transforms leave nothing, though the model has changed the tensor.

    Args:
        task_vectors: The models, over their base.
        transforms: Applied in order, as the merge will apply them.
        seed: Of transforms that draw at random.
        threads: How many work side by side; as many as there are cores by default.

    Raises:
        UserError: A transform does not go with these models.

    Cost: the passes of the transforms, and one more over tensors of which something is left of no model or of some.
        Nothing is kept.

    Example:
        >>> import torch
        >>> from lightning_merge.methods import LwPTV
        >>> base = {"layer.0.weight": torch.zeros(2), "layer.1.weight": torch.zeros(2)}
        >>> model = {"layer.0.weight": torch.tensor([0.1, -0.1]), "layer.1.weight": torch.tensor([0.5, 0.25])}
        >>> pruned_pairs(TaskVectors.open(base, {"a": model}), [LwPTV(eta=0.5)])
        [('a', 'layer.0.weight')]
    """
    if not transforms:
        return []
    for transform in transforms:
        transform.check(task_vectors)
    names = sorted(task_vectors.tensor_names)
    left = {name: torch.zeros(len(task_vectors), dtype=torch.bool) for name in names}
    for name, _, values in Chain(list(transforms), task_vectors, seed, threads).run(names):
        left[name] |= values.any(dim=1)
    pairs: list[tuple[str, str]] = []
    for name in names:
        if bool(left[name].all()):
            continue
        changed = torch.zeros_like(left[name])
        for start, stop in task_vectors.chunks(name):
            changed |= task_vectors.view(name, start, stop).deltas.any(dim=1)
        gone = (changed & ~left[name]).tolist()
        pairs += [(model, name) for model, nothing in zip(task_vectors.names, gone, strict=True) if nothing]
    return pairs
