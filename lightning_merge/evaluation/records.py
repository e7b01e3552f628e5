"""What is recorded of one model: its answers row by row, what it is, and what it cost."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from lightning_merge.errors import UserError, unknown

PRETRAINED = "pretrained"
INDIVIDUAL = "individual"
TEST = "test"
SPLITS = ("id", "ood", "corrupted")
KINDS = (PRETRAINED, INDIVIDUAL, "merged")


@dataclass(frozen=True, eq=False)
class Score:
    """The answers of one model on one data set of one task.

    Args:
        model: name of the model.
        task: name of the task.
        split: ``"id"`` (the task's own test rows), ``"ood"`` (another domain) or ``"corrupted"``.
        dataset: ``"test"`` for ``"id"``; otherwise such as ``"ood_yelp"`` or ``"typos-3"``.
        correct: (n,) bool, n >= 1, in the order of the data set's rows; kept whole so that two models can be
            compared on the same rows.

    Raises:
        UserError: an unknown split, an ``"id"`` data set that is not ``"test"``, or ``correct`` of another form.
    """

    model: str
    task: str
    split: Literal["id", "ood", "corrupted"]
    dataset: str
    correct: np.ndarray

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise unknown("split", self.split, SPLITS)
        if self.split == "id" and self.dataset != TEST:
            raise UserError(f"Score: an in-domain data set is called '{TEST}', got '{self.dataset}'.")
        correct = np.array(self.correct)  # a copy: the caller's array stays writable and may change
        if correct.dtype != np.bool_ or correct.ndim != 1 or correct.size == 0:
            raise UserError(
                f"Score: correct of '{self.model}' on {self.task}/{self.dataset} has shape {correct.shape} and dtype "
                f"{correct.dtype}. Accepted is a non-empty (n,) array of bool."
            )
        correct.setflags(write=False)
        object.__setattr__(self, "correct", correct)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Score):
            return NotImplemented
        return self.key == other.key and self.model == other.model and np.array_equal(self.correct, other.correct)

    __hash__ = None  # type: ignore[assignment]

    @property
    def key(self) -> tuple[str, str, str]:
        """Task, split and data set: what two models are compared on."""
        return self.task, self.split, self.dataset

    @property
    def n(self) -> int:
        """Number of rows."""
        return int(self.correct.size)

    @property
    def value(self) -> float:
        """Accuracy in [0, 1]."""
        return int(self.correct.sum()) / self.n

    @property
    def stderr(self) -> float:
        """Binomial standard error of the accuracy, sqrt(p (1 - p) / n)."""
        return math.sqrt(self.value * (1.0 - self.value) / self.n)


class Difference(NamedTuple):
    """Accuracy of one model minus that of another over the same rows.

    ``value`` is the mean of d, d in {-1, 0, 1} per row; ``stderr`` is sqrt((mean(d^2) - mean(d)^2) / n), which is
    smaller than the unpaired one where the models answer alike. ``gained`` rows only the model has right, ``lost``
    only the reference.
    """

    value: float
    stderr: float
    n: int
    gained: int
    lost: int


@dataclass(frozen=True)
class ModelFacts:
    """What a model is and what it cost; one row of the summary.

    Args:
        name: unique name; the kinds ``"pretrained"`` and ``"individual"`` carry their kind as their name.
        kind: ``"pretrained"``, ``"individual"`` (each task by the model fine-tuned on it) or ``"merged"``.
        method: class name of the merge method.
        parameters: its hyper-parameters, as given.
        selection: the data that chose anything: ``"none"``, ``"validation labels"``, ``"unlabeled test"`` (of another
            split ``"unlabeled dev"``), ``"training labels"``, or several of them with ``" + "`` between.
        selected: the hyper-parameters that this data chose, with their values.
        seed: seed of whatever is random.
        trained_parameters: parameters that received gradients.
        stored_parameters: parameters that must be kept to answer all tasks.
        active_parameters: parameters that take part in answering one input.
        seconds: wall time it took to make the model.
        peak_memory_bytes: peak memory while making it; 0 where it was not measured.
        error: why there is no model; such a row stays in every table.
        needs_task: whether the task must be named for the features already, not for the head alone.

    Raises:
        UserError: an unknown kind, or a name that does not go with it.
    """

    name: str
    kind: Literal["pretrained", "individual", "merged"] = "merged"
    method: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)
    selection: str = "none"
    selected: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    trained_parameters: int = 0
    stored_parameters: int = 0
    active_parameters: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    error: str | None = None
    needs_task: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown("kind of model", self.kind, KINDS)
        if (self.kind != "merged") != (self.name in (PRETRAINED, INDIVIDUAL)) or (
            self.kind != "merged" and self.name != self.kind
        ):
            raise UserError(
                f"ModelFacts: the name '{self.name}' does not go with the kind '{self.kind}'. The names "
                f"'{PRETRAINED}' and '{INDIVIDUAL}' belong to the models of that kind alone."
            )
        # Plain values, so that what is read back from results.json equals what was written.
        object.__setattr__(self, "parameters", _plain(self.parameters))
        object.__setattr__(self, "selected", _plain(self.selected))


def _plain(value: Any) -> Any:
    """Turn a value into what JSON holds without loss of type: dict, list, str, finite number, bool, None."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {"class": type(value).__name__, **_plain(dataclasses.asdict(value))}
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return str(value)
