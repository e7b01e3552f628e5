"""Fine-tune, merge, adapt, evaluate and serve models, as stages of PyTorch Lightning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_merge.merged_model import MergedModel, load
    from lightning_merge.merging import merge
    from lightning_merge.task_vectors import TaskVector, TaskVectors
    from lightning_merge.weights import open_weights

__version__ = "0.1.0"

__all__ = ["MergedModel", "TaskVector", "TaskVectors", "load", "merge", "open_weights"]

_HOME = {
    "MergedModel": "merged_model",
    "TaskVector": "task_vectors",
    "TaskVectors": "task_vectors",
    "load": "merged_model",
    "merge": "merging",
    "open_weights": "weights",
}


def __getattr__(name: str) -> Any:
    # Names are imported on first use, so that `import lightning_merge` costs nothing by itself.
    if name in _HOME:
        import importlib

        return getattr(importlib.import_module(f"lightning_merge.{_HOME[name]}"), name)
    raise AttributeError(f"module 'lightning_merge' has no attribute '{name}'")
