"""A merge as plain data: the recipe that every output carries and that runs again, and the same in one line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch

from lightning_merge.methods import MergeMethod, Transform
from lightning_merge.methods.base import Step
from lightning_merge.task_vectors import TaskVectors

# What a recipe names in place of a file where algebra in Python made the task vector: such a merge cannot be read back.
COMPUTED = "(a task vector computed in Python)"


def resolved_recipe(
    method: MergeMethod,
    task_vectors: TaskVectors,
    transforms: Sequence[Transform],
    seed: int,
    dtype: torch.dtype | None,
) -> dict[str, Any]:
    """Return the whole recipe as plain data, in the form that ``lightning-merge merge --config`` reads."""
    sources = [source for source in [task_vectors.base, *task_vectors.models.values()] if source]
    return {
        "method": as_config(method),
        "transforms": [as_config(step) for step in transforms],
        "base": task_vectors.base.label if task_vectors.base else None,
        "models": {
            name: COMPUTED if vector.finetuned is None else task_vectors.models[name].label
            for name, vector in task_vectors.items()
        },
        "ignore": list(task_vectors.ignore),
        "prefix": next((source.prefix for source in sources if source.prefix), ""),
        "batch_norm": task_vectors.batch_norm,
        "seed": seed,
        "dtype": str(dtype).removeprefix("torch.") if dtype else None,
    }


def as_config(step: Step) -> dict[str, Any]:
    """Return a method or transform as ``{class_path, init_args}``."""
    values = {spec.name: getattr(step, spec.name) for spec in fields(step)} if is_dataclass(step) else {}
    kind = type(step)
    ours = kind.__module__.startswith("lightning_merge.methods.")
    return {"class_path": kind.__name__ if ours else f"{kind.__module__}.{kind.__qualname__}", "init_args": values}


def describe(method: MergeMethod, transforms: Sequence[Transform] = ()) -> str:
    """Return a merge in one line: ``LwPTV(eta=0.2, ...) → TaskArithmetic(scale=0.3)``."""
    parts = []
    for step in [*transforms, method]:
        settings = ", ".join(f"{name}={value}" for name, value in as_config(step)["init_args"].items())
        parts.append(f"{type(step).__name__}({settings})")
    return " → ".join(parts)
