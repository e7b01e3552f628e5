"""What is changed on somebody else's module for the time of a fit, and how it is put back."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import lightning as L
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

_ABSENT = object()
# What a user's module does for its own training, which is not what happens now.
_OPTIMIZATION = (
    "optimizer_step",
    "optimizer_zero_grad",
    "configure_gradient_clipping",
    "lr_scheduler_step",
    "backward",
)
_TRANSFER = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


class Overrides:
    """Changes to objects that are not ours, undone together, the last first; undoing twice does nothing.

    Example:
        >>> box = types.SimpleNamespace(value=1)
        >>> overrides = Overrides()
        >>> overrides.set(box, "value", 2)
        >>> box.value
        2
        >>> overrides.undo()
        >>> box.value
        1
    """

    def __init__(self) -> None:
        self._stack = ExitStack()

    def undo(self) -> None:
        """Put everything back; every step is taken, also after one has failed."""
        self._stack.close()

    def later(self, function: Callable[..., Any], *args: Any) -> None:
        """Call a function when everything is put back."""
        self._stack.callback(function, *args)

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute of one object; what its class has shows again afterwards."""
        before = vars(owner).get(name, _ABSENT)
        self.later(_put_back, owner, name, before)
        vars(owner)[name] = value

    def method(self, owner: Any, name: str, function: Callable[..., Any]) -> None:
        """Set a method of one object. Lightning looks at signatures: the function takes the object first."""
        self.set(owner, name, types.MethodType(function, owner))

    def evaluation_mode(self, modules: Iterable[nn.Module]) -> None:
        """Switch modules and their parts to evaluation, remembering the mode of each part."""
        for module in modules:
            modes = [(part, part.training) for part in module.modules()]
            self.later(_put_back_modes, modes)
            module.eval()

    def freeze(self, parameters: Iterable[nn.Parameter]) -> None:
        """Switch the gradients of parameters off."""
        for parameter in parameters:
            if parameter.requires_grad:
                self.later(parameter.requires_grad_, True)
                parameter.requires_grad_(False)

    def submodule(self, owner: nn.Module, name: str, module: nn.Module) -> None:
        """Register a module in another one."""
        self.later(owner._modules.pop, name, None)
        owner.add_module(name, module)


def _put_back(owner: Any, name: str, before: Any) -> None:
    if before is _ABSENT:
        vars(owner).pop(name, None)
    else:
        vars(owner)[name] = before


def _put_back_modes(modes: Iterable[tuple[nn.Module, bool]]) -> None:
    for part, training in modes:
        part.training = training


def take_over(
    module: L.LightningModule,
    overrides: Overrides,
    tasks: Iterable[str],
    training_step: Callable[[Any], Tensor],
    configure_optimizers: Callable[[], Any],
) -> None:
    """Put another training in the place of the module's own.

    Args:
        module: The user's.
        overrides: Where it is noted how to put everything back.
        tasks: The keys of a batch of all tasks; hooks that move or change a batch are given one task's at a time.
        training_step: Given a batch of all tasks, returns the loss.
        configure_optimizers: Returns what Lightning's hook may return.
    """

    def own_training_step(owner: L.LightningModule, batch: Any, batch_idx: int) -> Tensor:
        return training_step(batch)

    def own_configure_optimizers(owner: L.LightningModule) -> Any:
        return configure_optimizers()

    overrides.method(module, "training_step", own_training_step)
    overrides.method(module, "configure_optimizers", own_configure_optimizers)
    overrides.set(module, "_automatic_optimization", True)
    for name in _OPTIMIZATION:
        if is_overridden(name, module):
            overrides.method(module, name, getattr(L.LightningModule, name))
    for name in _TRANSFER:
        if is_overridden(name, module):
            overrides.method(module, name, per_task(getattr(module, name), tasks))


def per_task(hook: Callable[..., Any], tasks: Iterable[str]) -> Callable[..., Any]:
    """Make a hook that is given one batch work on a batch of all tasks: ``{task: batch}``.

    Args:
        hook: The user's own ``on_before_batch_transfer`` or its like, bound; it knows the batches of its own loaders.
        tasks: The keys of a batch of all tasks.
    """
    known = set(tasks)

    def apply(owner: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(batch, Mapping) and batch and set(batch) <= known:
            return {task: None if part is None else hook(part, *args, **kwargs) for task, part in batch.items()}
        return hook(batch, *args, **kwargs)

    return apply
