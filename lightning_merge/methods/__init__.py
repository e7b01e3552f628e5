"""Merge methods: one published method, one file. Every class here is found by ``--method NAME``."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from importlib.metadata import entry_points

from lightning_merge.methods.average import SimpleAverage, WeightedAverage
from lightning_merge.methods.base import MergeMethod, ModelMerge, Step, TensorMerge, Transform
from lightning_merge.methods.breadcrumbs import Breadcrumbs
from lightning_merge.methods.dare import Dare
from lightning_merge.methods.greedy_soup import GreedySoup
from lightning_merge.methods.lwptv import LwPTV
from lightning_merge.methods.task_arithmetic import TaskArithmetic
from lightning_merge.methods.ties import Ties
from lightning_merge.methods.wise_ft import WiseFT

__all__ = [
    "Breadcrumbs",
    "Dare",
    "GreedySoup",
    "LwPTV",
    "MergeMethod",
    "ModelMerge",
    "SimpleAverage",
    "Step",
    "TaskArithmetic",
    "TensorMerge",
    "Ties",
    "Transform",
    "WeightedAverage",
    "WiseFT",
    "available_methods",
]


def available_methods() -> dict[str, type[MergeMethod]]:
    """Return every concrete method by name: those of this folder, and those that installed packages register."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
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
