"""How a batch of one task becomes logits, features and labels, with a user's own module and the heads of the tasks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_merge.errors import UserError, nearest, unknown
from lightning_merge.objectives import Outputs
from lightning_merge.strategies import gathering

Part = int | str | Callable[[Any], Any] | None
# Where labels stand in a batch that is a mapping.
LABEL_KEYS = ("labels", "label", "y")


class Answers:
    """What a module answers for a batch of one task.

    Args:
        logits: The module's method that maps a batch's inputs to logits, or to features where there are heads. It is
            given the task as ``task=`` if it has a parameter of that name.
        heads: One for each task, from features to logits.
        inputs: Where the inputs stand in a batch: a position, a key, or a function of the batch; by default the first
            element of a tuple or list, else the batch itself.
        features: A method that maps inputs to features, where no heads are given.
        labels: Where the labels stand; by default the second element, or under ``labels``, ``label`` or ``y``.
    """

    def __init__(
        self,
        logits: str = "forward",
        heads: Mapping[str, nn.Module] | None = None,
        inputs: Part = None,
        features: str | None = None,
        labels: Part = None,
    ) -> None:
        self.logits, self.heads, self.features = logits, heads, features
        self._inputs, self._labels = inputs, labels
        self._takes_task: dict[str, bool] = {}

    @property
    def methods(self) -> tuple[str, ...]:
        """The module's methods that are called."""
        return tuple(filter(None, (self.logits, self.features)))

    def check(self, module: nn.Module, tasks: Sequence[str], needs: frozenset[str]) -> None:
        """Refuse what can be refused before anything is computed.

        Raises:
            UserError: A method that the module does not have, heads of other tasks, features that nothing gives.
        """
        for name in self.methods:
            if not callable(getattr(module, name, None)):
                known = [n for n in dir(type(module)) if not n.startswith("_") and n not in dir(nn.Module)]
                raise UserError(
                    f"{type(module).__name__} has no method '{name}'. Expected the name of the method that maps the "
                    f"inputs of a batch to logits.{nearest(name, [*known, 'forward'])}"
                )
            self._takes_task[name] = "task" in inspect.signature(getattr(module, name)).parameters
        if self.heads is not None:
            for task in self.heads:
                if task not in tasks:
                    raise unknown("task of a head", task, tasks)
            missing = [task for task in tasks if task not in self.heads]
            if missing:
                raise UserError(
                    f"There is no head for the task '{missing[0]}' ({len(missing)} of {len(tasks)} are missing). "
                    f"Expected one for each of: {', '.join(tasks)}."
                )
        if "features" in needs and self.heads is None and self.features is None:
            raise UserError(
                "An objective compares features, and nothing gives them. Expected features='the method that maps "
                "inputs to features', or heads={task: head} with a method that stops before them."
            )

    def __call__(self, module: nn.Module, task: str, batch: Any) -> Outputs:
        """Return what the module answers; gradients as the caller has set them."""
        inputs = self.inputs(batch)
        found = self._call(module, self.logits, inputs, task)
        found = getattr(found, "logits", found) if not isinstance(found, Tensor) else found
        labels = self.labels(batch)
        if self.heads is not None:
            return Outputs(task, self.heads[task](found), found, labels)
        features = None if self.features is None else self._call(module, self.features, inputs, task)
        return Outputs(task, found, features, labels)

    def inputs(self, batch: Any) -> Any:
        """Return the inputs of a batch."""
        if self._inputs is None:
            return batch[0] if isinstance(batch, (tuple, list)) else batch
        return _part(batch, self._inputs, "inputs")

    def labels(self, batch: Any) -> Tensor | None:
        """Return the labels of a batch, where it holds any."""
        if self._labels is not None:
            return _part(batch, self._labels, "labels")
        if isinstance(batch, Mapping):
            return next((batch[key] for key in LABEL_KEYS if key in batch), None)
        return batch[1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None

    def _call(self, module: nn.Module, name: str, inputs: Any, task: str) -> Any:
        # What wraps a module's forward (hooks, sharding, compilation) is passed by calling the module.
        method = module if name == "forward" else gathering(module, name)
        if name not in self._takes_task:
            self._takes_task[name] = "task" in inspect.signature(getattr(module, name)).parameters
        given = {"task": task} if self._takes_task[name] else {}
        if self._inputs is not None or not isinstance(inputs, Mapping):
            return method(inputs, **given)
        try:
            return method(inputs, **given)
        except (AttributeError, TypeError) as error:  # what tensors can and dicts cannot
            key = next((key for key in inputs if key not in LABEL_KEYS), "image")
            raise UserError(
                f"'{name}' was given the whole batch of the task '{task}', a dict with the keys "
                f"{', '.join(map(str, inputs))}, and failed with {type(error).__name__}: {error}. Expected inputs= "
                f"with the key of what it takes, as in inputs={key!r}, or a method that takes such a dict."
            ) from error


def check_outputs(outputs: Outputs, needs: frozenset[str], method: str) -> None:
    """Refuse what no objective can be computed of; nothing is read, so it costs nothing.

    Raises:
        UserError: No logits ``(B, C)`` of a floating dtype with C >= 2, no labels where some are needed, or an answer
            that does not depend on the merged weights.
    """
    logits, task = outputs.logits, outputs.task
    if "logits" in needs or logits is not None:
        if not isinstance(logits, Tensor):
            raise UserError(
                f"'{method}' gave {type(logits).__name__} for the task '{task}'. Expected logits: a floating-point "
                "tensor (B, C) with C >= 2."
            )
        if logits.ndim != 2 or logits.shape[1] < 2 or not logits.is_floating_point():
            raise UserError(
                f"'{method}' gave a tensor of shape {tuple(logits.shape)} and {logits.dtype} for the task '{task}'. "
                "Expected logits: a floating-point tensor (B, C) with C >= 2; for one output as the logit of two "
                "classes, a method that returns torch.stack([-z, z], -1) / 2."
            )
    if "labels" in needs:
        if not isinstance(outputs.labels, Tensor):
            raise UserError(
                f"The batch of the task '{task}' holds no labels, and an objective needs some. Expected (inputs, "
                f"labels), a key among {', '.join(LABEL_KEYS)}, or labels=... that says where they stand."
            )
        if isinstance(logits, Tensor) and outputs.labels.shape != logits.shape[:1]:
            raise UserError(
                f"The labels of the task '{task}' have shape {tuple(outputs.labels.shape)} beside logits "
                f"{tuple(logits.shape)}. Expected one label for each row."
            )
    leaves = [value for value in (logits, outputs.features) if isinstance(value, Tensor)]
    if torch.is_grad_enabled() and not any(value.requires_grad for value in leaves):
        raise UserError(
            f"What '{method}' gives for the task '{task}' does not depend on the merged weights: it was computed "
            "without gradients, or detached. Expected a method that runs the model as in training."
        )


def _part(batch: Any, where: int | str | Callable[[Any], Any], what: str) -> Any:
    if callable(where):
        return where(batch)
    try:
        return batch[where]
    except (KeyError, IndexError, TypeError) as error:
        held = f"the keys {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else type(batch).__name__
        raise UserError(
            f"A batch has no {what} at {where!r}: it is {held}. Expected {what}=... with a position, a key or a "
            "function of the batch."
        ) from error
