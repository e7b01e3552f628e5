"""What the tests of AdaMerging share: a trainer that says nothing, streams, and the merge by hand."""

from __future__ import annotations

from typing import Any

import adamerging_job as job
import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_merge.coefficients import Coefficients

Checkpoints = tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]


def streams(rows: int = 64, batch_size: int = 16) -> dict[str, DataLoader]:
    return {
        task: DataLoader(TensorDataset(*(part[:rows] for part in job.rows(task))), batch_size=batch_size)
        for task in job.TASKS
    }


def trainer(*callbacks: L.Callback, **settings: Any) -> L.Trainer:
    defaults: dict[str, Any] = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return L.Trainer(callbacks=list(callbacks), **{**defaults, **settings})


def state_of(module: L.LightningModule) -> dict[str, Any]:
    """Everything of a module that a callback might leave changed, but for its weights."""
    return {
        "attributes": {name for name in vars(module) if name not in ("_trainer", "_fabric")},
        "methods": [getattr(module, name).__func__ for name in ("training_step", "configure_optimizers", "backward")],
        "flags": [parameter.requires_grad for parameter in module.parameters()],
        "gradients": [parameter.grad is None for parameter in module.parameters()],
        "hooks": [len(parameter._post_accumulate_grad_hooks or ()) for parameter in module.parameters()],
        "modes": [part.training for part in module.modules()],
        "modules": [name for name, _ in module.named_modules()],
        "automatic": module.automatic_optimization,
    }


def weights_of(checkpoints: Checkpoints, scalars: Coefficients) -> dict[str, Tensor]:
    base, models = checkpoints
    values = scalars()
    return {
        name: base[name]
        + sum(values[scalars.span(name)][place] * (models[m][name] - base[name]) for place, m in enumerate(models))
        for name in sorted(base)
    }


def forward(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    return torch.func.functional_call(job.UsersModule().eval(), weights, (x,))
