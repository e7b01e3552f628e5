"""Merge methods: one published method, one file. A new file's classes are found here, and by ``--method NAME``."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from importlib.metadata import entry_points
from typing import Any

from lightning_merge.methods.base import MergeMethod as MergeMethod
from lightning_merge.methods.base import ModelMerge as ModelMerge
from lightning_merge.methods.base import Refinement as Refinement
from lightning_merge.methods.base import Step as Step
from lightning_merge.methods.base import TensorMerge as TensorMerge
from lightning_merge.methods.base import Transform as Transform
from lightning_merge.methods.schedule import ByTensor as ByTensor

for _file in pkgutil.iter_modules(__path__):
    for _name, _kind in vars(importlib.import_module(f"{__name__}.{_file.name}")).items():
        if inspect.isclass(_kind) and issubclass(_kind, MergeMethod) and not _name.startswith("_"):
            globals()[_name] = _kind

__all__ = sorted(
    {"ByTensor", "MergeMethod", "ModelMerge", "Refinement", "Step", "TensorMerge", "Transform", "available_methods"}
    | {name for name, kind in globals().items() if inspect.isclass(kind) and issubclass(kind, MergeMethod)}
)


def __getattr__(name: str) -> Any:
    # Reached for unknown names only; tells type checkers that names are found, not listed.
    from lightning_merge.errors import nearest

    raise AttributeError(f"module '{__name__}' has no attribute '{name}'.{nearest(name, __all__)}")


def available_methods() -> dict[str, type[MergeMethod]]:
    """Return every concrete method by name: those of this folder, and those that installed packages register."""
    for plugin in entry_points(group="lightning_merge.methods"):
        plugin.load()
    found: dict[str, type[MergeMethod]] = {}
    waiting = MergeMethod.__subclasses__()
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        if not inspect.isabstract(kind):
            found[kind.__name__] = kind
    return dict(sorted(found.items()))
