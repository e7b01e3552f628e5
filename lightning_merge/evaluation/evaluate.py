"""Models on data: what was predicted for each row, and which rows were right."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor, nn

from lightning_merge.errors import UserError, nearest, unknown
from lightning_merge.evaluation.records import TEST, Score

Precision = Literal["32-true", "bf16-mixed"]


class EvaluationData(Protocol):
    """What evaluation needs of a data module."""

    def loader(self, name: str, split: str, *, corruption: Any = None) -> Iterable[Mapping[str, Any]]:
        """Batches of ``inputs`` (raw), ``labels`` (B,) and ``index`` (B,), the row of the split."""

    def ood_names(self, name: str) -> list[str]:
        """Names of the task's out-of-domain splits."""


def predict(
    encoder: nn.Module,
    head: nn.Module,
    loader: Iterable[Mapping[str, Any]],
    device: str | torch.device = "cpu",
    precision: Precision = "32-true",
) -> tuple[np.ndarray, np.ndarray]:
    """Predict the class of every row, in the order of the rows whatever the order of the batches.

    Args:
        encoder: has ``preprocess(inputs) -> dict of tensors`` and maps them to features (B, d).
        head: maps features (B, d) to logits (B, C).
        loader: batches with ``inputs``, ``labels`` (B,) and ``index`` (B,). A row that comes twice (a distributed
            sampler pads so) counts once.
        device: where to compute. Modules are moved there and back, and every submodule's training mode is restored.
        precision: of the encoder: ``32-true``, or ``bf16-mixed`` for speed.

    Returns:
        Predictions (N,) int64 and labels (N,) int64, sorted by ``index``.

    Raises:
        UserError: no rows, or logits that are not finite (argmax would answer class 0 or worse in silence).
    """
    if precision not in get_args(Precision):
        raise unknown("precision", precision, get_args(Precision))
    predictions, labels, indices = [], [], []
    with _evaluating([encoder, head], torch.device(device)), torch.inference_mode():
        for batch in loader:
            tensors: dict[str, Tensor] = encoder.preprocess(batch["inputs"])  # type: ignore[operator]
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16-mixed"):
                features = encoder(**{name: tensor.to(device) for name, tensor in tensors.items()})  # (B, d)
            # The head answers in fp32: in bf16 many of 77 classes would tie.
            logits = head(features.float())  # (B, C)
            if not bool(torch.isfinite(logits).all()):
                raise UserError("The model's logits hold NaN or infinity, so its answers mean nothing.")
            predictions.append(logits.argmax(dim=-1).cpu().numpy())
            labels.append(torch.as_tensor(batch["labels"]).cpu().numpy())
            indices.append(torch.as_tensor(batch["index"]).cpu().numpy())
    if not predictions:
        raise UserError("There is nothing to predict: the loader gave no batch.")
    _, first = np.unique(np.concatenate(indices), return_index=True)  # sorted by row, each row once
    return np.concatenate(predictions)[first].astype(np.int64), np.concatenate(labels)[first].astype(np.int64)


def score_model(
    name: str,
    encoder: nn.Module,
    heads: Mapping[str, nn.Module],
    data: EvaluationData,
    tasks: Sequence[str],
    corruptions: Sequence[Any] | Mapping[str, Sequence[Any]] = (),
    on_progress: Callable[[str, str, int, int], None] | None = None,
    device: str | torch.device = "cpu",
    precision: Precision = "32-true",
) -> list[Score]:
    """Score a model on the test rows of tasks, on their out-of-domain sets and on corrupted test rows.

    What is kept is whether each row was right. Accuracy is its mean; a running metric would forget which rows the
    model missed, and with them the paired difference to another model.

    Args:
        name: name of the model in the results; ``"individual"`` for each fine-tuned model on its own task.
        encoder: see `predict`.
        heads: head of each task.
        data: the data module.
        tasks: names of the tasks to score.
        corruptions: applied to the test rows; ``str(corruption)`` names the data set. A sequence for all tasks or a
            sequence for each task.
        on_progress: called with (task, data set, sets done, sets in all) after each data set.
        device: where to compute.
        precision: see `predict`.

    Raises:
        UserError: a task without a head, or logits that are not finite (names model and data set).
    """
    plan: list[tuple[str, str, str, Any]] = []  # task, split, data set, corruption
    for task in tasks:
        if task not in heads:
            raise UserError(
                f"There is no head for the task '{task}'. Heads are given for: {', '.join(sorted(heads)) or 'none'}."
                f"{nearest(task, heads)}"
            )
        plan.append((task, "id", TEST, None))
        plan.extend((task, "ood", dataset, None) for dataset in data.ood_names(task))
        chosen = corruptions.get(task, ()) if isinstance(corruptions, Mapping) else corruptions
        plan.extend((task, "corrupted", str(corruption), corruption) for corruption in chosen)
    scores = []
    with _evaluating([encoder, *(heads[task] for task in tasks)], torch.device(device)):  # move once, not per set
        for done, (task, split, dataset, corruption) in enumerate(plan, start=1):
            rows = dataset if split == "ood" else TEST
            try:
                predictions, labels = predict(
                    encoder, heads[task], data.loader(task, rows, corruption=corruption), device, precision
                )
            except UserError as error:
                raise UserError(f"'{name}' on {task}/{dataset}: {error}") from error
            scores.append(Score(name, task, split, dataset, predictions == labels))  # type: ignore[arg-type]
            if on_progress is not None:
                on_progress(task, dataset, done, len(plan))
    return scores


@contextmanager
def _evaluating(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Put modules into eval mode on a device, and back: each submodule's own mode, each module's own device."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    homes = []
    for module in modules:
        devices = {tensor.device for tensor in (*module.parameters(), *module.buffers())}
        if len(devices) == 1 and devices != {device}:  # a module spread over devices knows better than we do
            homes.append((module, devices.pop()))
    try:
        for module, _ in homes:
            module.to(device)
        for module in modules:
            module.eval()
        yield
    finally:
        for module, home in homes:
            module.to(home)
        for part, mode in modes:
            part.training = mode
