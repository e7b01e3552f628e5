"""What training all weights of a merge needs: which they are, how gradients reach them, what is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
import torch.distributed
from torch import Tensor, nn

from lightning_merge import strategies
from lightning_merge.callbacks.checks import check_module
from lightning_merge.correspondence import parameter_names
from lightning_merge.errors import UserError
from lightning_merge.task_vectors import TaskVectors
from lightning_merge.weights.compatibility import ignored


def refuse_trainer(trainer: Any, who: str) -> None:
    """Refuse trainers, strategies and precisions under which all weights cannot be trained against other models.

    Raises:
        UserError: Names what was found and what works.
    """
    if not isinstance(trainer, L.Trainer):
        raise UserError(
            f"{who} is a callback of 'lightning', the Trainer is of '{type(trainer).__module__.split('.')[0]}'. "
            "Expected import lightning as L; L.Trainer."
        )
    strategies.check_trainer(trainer)
    if strategies.is_sharding(trainer):
        raise UserError(
            f"{who} does not support {type(trainer.strategy).__name__}: an individual model takes the merged one's "
            "place whole. Expected strategy='auto' or 'ddp'."
        )
    if str(getattr(trainer.precision_plugin, "precision", "")) == "bf16-true":
        raise UserError(
            f"{who} does not work with precision 'bf16-true': steps of weights would be lost in rounding. Expected "
            "precision 'bf16-mixed' or '32-true'."
        )


def trainable(
    module: L.LightningModule,
    models: TaskVectors | Mapping[str, nn.Module],
    heads: Sequence[nn.Module],
    ignore: Sequence[str],
    prefix: str | None,
) -> dict[str, nn.Parameter]:
    """Return the module's parameters, by name, that models cover and at least one has changed.

    Args:
        module: The live module.
        models: Task vectors, or modules by name.
        heads: Modules whose parameters are not trained.
        ignore: Patterns of parameters, by the module's names or the models', that are not trained.
        prefix: See :func:`lightning_merge.correspondence.parameter_names`.

    Raises:
        UserError: The module has parameters that nothing covers, or there is none to train.

    Cost: one read of all models.
    """
    if isinstance(models, TaskVectors):
        names = check_module(module, models, heads, ignore, None, prefix)
        candidates = list(models.tensor_names)
    else:
        states = [model.state_dict() for model in models.values()]
        candidates = [name for name, values in states[0].items() if values.is_floating_point()]
        names = parameter_names(module, {name: tuple(states[0][name].shape) for name in candidates}, prefix)
    named = dict(module.named_parameters(remove_duplicate=False))
    of_heads = {id(parameter) for head in heads for parameter in head.parameters()}
    found: dict[str, nn.Parameter] = {}
    for name in candidates:
        parameter = named.get(names[name])
        if parameter is None or id(parameter) in of_heads or ignored(name, ignore) or ignored(names[name], ignore):
            continue
        if _changed(models, name):
            found[names[name]] = parameter
    # Two names of a tied tensor are one parameter.
    found = {name: p for name, p in found.items() if name == next(n for n, other in found.items() if other is p)}
    if not found:
        raise UserError(
            f"{type(module).__name__} has no weights to train: no model has changed any that is not ignored. Expected "
            "fine-tuned models, and ignore=[patterns] that leave some."
        )
    return found


def carry_gradients(loss: Tensor, parameters: Mapping[str, nn.Parameter], gradients: Mapping[str, Tensor]) -> Tensor:
    """Return a loss whose backward gives parameters gradients that are there already, averaged over processes.

    Trainers clear gradients between a training step and the backward of its loss, and scale the loss; both are right
    for what is carried.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        filled = [gradients[name] if name in gradients else torch.zeros_like(p) for name, p in parameters.items()]
        flat = strategies.mean_over_processes(torch.cat([gradient.reshape(-1) for gradient in filled]))
        parts = flat.split([gradient.numel() for gradient in filled])
        gradients = {name: part.view_as(p) for (name, p), part in zip(parameters.items(), parts, strict=True)}
    return _Carry.apply(loss, [gradients[name] for name in gradients], *(parameters[name] for name in gradients))


class _Carry(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *factors: Tensor) -> Any:
        return (None, None, *(gradient * factors[0].to(gradient) for gradient in ctx.gradients))


def _changed(models: TaskVectors | Mapping[str, nn.Module], name: str) -> bool:
    """Whether models differ in a tensor, from their base where there is one, else from each other."""
    if not isinstance(models, TaskVectors):
        values = [model.state_dict()[name] for model in models.values()]
        return len(values) == 1 or any(not torch.equal(values[0].cpu(), other.cpu()) for other in values[1:])
    last = models.info(name).numel
    finetuned = (models.read_finetuned(model, name, 0, last) for model in models)
    first = next(finetuned) if models.base is None else models.read_base(name, 0, last)
    return (models.base is None and len(models) == 1) or any(not torch.equal(first, other) for other in finetuned)
