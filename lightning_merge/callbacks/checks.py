"""What is refused before a merge is learned in somebody's trainer, with the remedy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
from torch import nn

from lightning_merge import strategies
from lightning_merge.adaptation import Remember
from lightning_merge.correspondence import parameter_names
from lightning_merge.errors import UserError, nearest
from lightning_merge.merged_pieces import statistics
from lightning_merge.task_vectors import TaskVectors
from lightning_merge.weights.compatibility import ignored


def check_setting(trainer: L.Trainer, module: L.LightningModule, callback: Any) -> None:
    """Refuse objects of another Lightning, a second callback of the kind, and task vectors without a base.

    Raises:
        UserError: Any of them.
    """
    check_objects(trainer, module, callback)
    if callback.task_vectors.base is None:
        raise UserError(
            "AdaMerging moves from a pretrained base, and the task vectors have none. Expected "
            "TaskVectors.open(base=..., models=...)."
        )
    strangers = [finding.message for finding in callback.task_vectors.findings if finding.about == "base"]
    if strangers:
        raise UserError(
            f"{strangers[0]} Task vectors over another base lead nowhere; TaskVectors.open(..., check=False) says that "
            "you know better."
        )


def check_objects(trainer: L.Trainer, module: L.LightningModule, callback: L.Callback) -> None:
    """Refuse objects of another Lightning, and a second callback of the kind.

    Raises:
        UserError: Either of them.
    """
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for what, thing in (
        ("trainer", trainer),
        ("module", module),
        ("datamodule", getattr(trainer, "datamodule", None)),
        *(("callback", other) for other in callbacks),
    ):
        if any(kind.__module__.split(".")[0] == "pytorch_lightning" for kind in type(thing).__mro__):
            raise UserError(
                f"The {what} {type(thing).__name__} is one of 'pytorch_lightning', whose classes are not those of "
                "'lightning', although nothing else says so. Expected one package: 'import lightning as L' everywhere."
            )
    own = [other for other in callbacks if isinstance(other, _root(type(callback)))]
    if len(own) > 1:
        raise UserError(
            f"There are {len(own)} callbacks {type(callback).__name__} in one trainer, and a module holds one merge. "
            "Expected one callback, with all tasks."
        )


def check_stream(trainer: L.Trainer, tasks: Sequence[str], loaded: bool = False) -> None:
    """Refuse a training stream whose keys are not the tasks.

    Args:
        trainer: With loaders given to ``fit``, or, once it trains, with those that a hook made.
        tasks: The tasks.
        loaded: Whether the trainer has asked for its loaders.

    Raises:
        UserError: Lists both.
    """
    if loaded:
        stream = trainer.train_dataloader
    else:
        source = trainer.fit_loop._data_source
        if not source.is_defined() or source.is_module():
            return  # asked for once, by the trainer
        stream = source.instance
    stream = getattr(stream, "iterables", stream)
    if not isinstance(stream, Mapping):
        raise UserError(
            f"The training data is one {type(stream).__name__}, and a merge learns from a batch of each task. Expected "
            f"a dict of loaders with the keys {', '.join(tasks)}."
        )
    strange, missing = [str(k) for k in stream if k not in tasks], [task for task in tasks if task not in stream]
    if strange or missing:
        hint = nearest(strange[0], missing or tasks) if strange else ""
        raise UserError(
            f"The keys of the training stream are {', '.join(map(str, stream)) or 'none'}; the tasks are "
            f"{', '.join(tasks)}. Expected one loader for each task, under its name; or "
            f"models={{task: model}} where tasks are called otherwise than models.{hint}"
        )


def check_remembered(trainer: L.Trainer, remember: Remember) -> None:
    """Refuse answers that are remembered by row where all processes have to ask together.

    Raises:
        UserError: The module is sharded, and answers of the individual models are cached.
    """
    if remember == "cached" and strategies.is_sharding(trainer):
        raise UserError(
            f"Individual answers cannot be cached under {type(trainer.strategy).__name__}: a process that knows its "
            "rows would not join the others in gathering the shards. Expected individuals='computed'."
        )


def check_module(
    module: L.LightningModule,
    task_vectors: TaskVectors,
    covered_by: Sequence[nn.Module],
    ignore: Sequence[str],
    names: Mapping[str, str] | None,
    prefix: str | None,
) -> dict[str, str]:
    """Return the module's parameter for each tensor, and refuse a module that the merge does not cover.

    Args:
        module: The user's, with all its parameters.
        task_vectors: The models.
        covered_by: Modules whose parameters are accounted for: heads, and what is learned.
        ignore: Patterns of parameters that stay as they are.
        names: The module's parameter for each tensor, where the user says so.
        prefix: What stands before the tensors' names, where the user says so.

    Raises:
        UserError: A tensor without counterpart; trainable parameters that are neither merged nor heads nor ignored.
    """
    if names is None:
        shapes = {name: task_vectors.shape(name) for name in [*task_vectors.tensor_names, *statistics(task_vectors)]}
        names = parameter_names(module, shapes, prefix)
    named = dict(module.named_parameters(remove_duplicate=False))
    covered = {id(named[target]) for target in names.values() if target in named}
    covered |= {id(parameter) for part in covered_by for parameter in part.parameters()}
    rest = [
        name
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and id(parameter) not in covered and not ignored(name, ignore)
    ]
    if rest:
        listed = ", ".join(rest[:8]) + (f" and {len(rest) - 8} more" if len(rest) > 8 else "")
        raise UserError(
            f"{len(rest)} trainable parameters of {type(module).__name__} are neither in the task vectors nor in "
            f"heads nor ignored: {listed}. Expected heads={{task: head}} where they are heads, ignore=[patterns] "
            "where they shall stay as they are, or requires_grad_(False)."
        )
    return dict(names)


def check_ignored(module: nn.Module, taken: Sequence[nn.Parameter], ignore: Sequence[str]) -> None:
    """Refuse patterns of parameters to leave as they are that leave none so: a slip, or tensors that are merged.

    Args:
        module: The user's.
        taken: Its merged parameters, and those of heads.
        ignore: The patterns.

    Raises:
        UserError: Names the pattern.
    """
    held = {id(parameter) for parameter in taken}
    for pattern in ignore:
        fitting = [parameter for name, parameter in module.named_parameters() if ignored(name, [pattern])]
        if all(id(parameter) in held for parameter in fitting):
            raise UserError(
                f"The pattern '{pattern}' to ignore fits {'only merged parameters or heads' if fitting else 'none'} of "
                f"the parameters of {type(module).__name__}. Expected patterns of parameters that stay as they are; "
                "what the task vectors hold is left out with TaskVectors.open(..., ignore=[...])."
            )


def _root(kind: type) -> type:
    """The first class of ours in a class's ancestry: a subclass is one of its kind."""
    return next(part for part in kind.__mro__ if part.__module__.startswith("lightning_merge."))
