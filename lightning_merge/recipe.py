"""A merge as plain data: the recipe that every output carries and that runs again, and the same in one line."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
import yaml

from lightning_merge.methods import MergeMethod, Transform
from lightning_merge.methods.base import Step
from lightning_merge.methods.schedule import ByTensor, numbers_in
from lightning_merge.task_vectors import TaskVectors

# What a recipe names in place of a file where algebra in Python made the task vector: such a merge cannot be read back.
COMPUTED = "(a task vector computed in Python)"


def resolved_recipe(
    method: MergeMethod,
    task_vectors: TaskVectors,
    transforms: Sequence[Transform],
    seed: int,
    dtype: torch.dtype | None,
    rounding: str = "nearest",
    max_shard_size: int | str | None = None,
) -> dict[str, Any]:
    """Return the whole recipe as plain data, in the form that ``lightning-merge merge --config`` reads."""
    sources = [source for source in [task_vectors.base, *task_vectors.models.values()] if source]
    return {
        "method": as_config(method),
        "transforms": [as_config(step) for step in transforms],
        "base": task_vectors.base.label if task_vectors.base else None,
        "models": {
            name: task_vectors.models[name].label if name in task_vectors.models else COMPUTED for name in task_vectors
        },
        "ignore": list(task_vectors.ignore),
        "prefix": next((source.prefix for source in sources if source.prefix), ""),
        "batch_norm": task_vectors.batch_norm,
        "seed": int(seed),
        "dtype": str(dtype).removeprefix("torch.") if dtype else None,
        "rounding": rounding,
        "max_shard_size": max_shard_size,
    }


def as_config(step: Step) -> dict[str, Any]:
    """Return a method or transform as ``{class_path, init_args}``."""
    values = {spec.name: _plain(getattr(step, spec.name)) for spec in fields(step)} if is_dataclass(step) else {}
    kind = type(step)
    ours = kind.__module__.startswith("lightning_merge.methods.")
    return {"class_path": kind.__name__ if ours else f"{kind.__module__}.{kind.__qualname__}", "init_args": values}


def _plain(value: Any) -> Any:
    """Return a setting as YAML holds it."""
    if isinstance(value, Step):
        return as_config(value)
    if isinstance(value, ByTensor):
        return [{"tensors": f"^{re.escape(name)}$", "value": _plain(entry)} for name, entry in value.values.items()]
    if isinstance(value, Mapping):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value.item() if hasattr(value, "item") else value  # a number of numpy, from a loop over linspace


def _shown(value: Any) -> str:
    """Return a setting in a few words."""
    if isinstance(value, MergeMethod):
        return describe(value)
    if isinstance(value, ByTensor):
        numbers = [float(number) for number in numbers_in("", "", value)]
        return f"{min(numbers):g} to {max(numbers):g}, by tensor"
    return str(value)


def to_yaml(content: dict[str, Any]) -> str:
    """Return plain data as YAML, texts of several lines as they are."""

    class Readable(yaml.SafeDumper):
        pass

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)

    Readable.add_representer(str, text)
    return yaml.dump(content, Dumper=Readable, sort_keys=False, allow_unicode=True)


def describe(method: MergeMethod, transforms: Sequence[Transform] = ()) -> str:
    """Return a merge in one line: ``LwPTV(eta=0.2, ...) → TaskArithmetic(scale=0.3)``."""
    parts = []
    for step in [*transforms, method]:
        settings = ", ".join(
            f"{spec.name}={_shown(getattr(step, spec.name))}" for spec in (fields(step) if is_dataclass(step) else ())
        )
        parts.append(f"{type(step).__name__}({settings})")
    return " → ".join(parts)
