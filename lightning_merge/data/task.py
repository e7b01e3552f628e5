"""What a classification task is: named splits of raw inputs with labels, checked, cut to size and hashed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from lightning_merge.errors import UserError

REQUIRED_SPLITS = ("train", "dev", "test")
OOD_PREFIX = "ood_"


@dataclass(frozen=True)
class Split:
    """Rows of one split, in a fixed order.

    Args:
        inputs: ``N`` raw inputs: a list of ``str``, a list of ``(str, str)`` pairs, or a uint8 array of shape
            ``(N, H, W)`` or ``(N, H, W, 3)`` with values in 0..255.
        labels: class ids, int64, shape ``(N,)``, in ``0..C-1``.
    """

    inputs: Sequence[Any] | np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.labels)

    def take(self, rows: np.ndarray) -> Split:
        """Return the rows whose positions are ``rows`` (int64, any order), as a new split."""
        inputs = self.inputs[rows] if isinstance(self.inputs, np.ndarray) else [self.inputs[int(row)] for row in rows]
        return Split(inputs, self.labels[rows])


@dataclass(frozen=True)
class Task:
    """One classification task.

    Args:
        name: how the task is called.
        kind: ``"text"`` or ``"image"``.
        labels: the ``C >= 2`` class names, in the order of the class ids.
        label_texts: one English phrase a class for a frozen text head, or ``None``.
        splits: ``"train"``, ``"dev"``, ``"test"`` and any number of ``"ood_<domain>"`` (out-of-domain test sets).
        description: one line for tables and reports.
    """

    name: str
    kind: Literal["text", "image"]
    labels: tuple[str, ...]
    label_texts: tuple[str, ...] | None
    splits: Mapping[str, Split] = field(repr=False)
    description: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "splits", MappingProxyType(dict(self.splits)))

    def __reduce__(self) -> tuple[Any, ...]:
        # A mapping proxy cannot be pickled, and data workers need to.
        return Task, (self.name, self.kind, self.labels, self.label_texts, dict(self.splits), self.description)

    @property
    def ood_names(self) -> list[str]:
        """The names of the out-of-domain splits, sorted."""
        return sorted(name for name in self.splits if name.startswith(OOD_PREFIX))


def check_task(task: Task) -> Task:
    """Return ``task`` unchanged if it can be used.

    Args:
        task: the task as it was loaded.

    Raises:
        UserError: fewer than two or repeated labels, a wrong number of label texts, a missing, empty or unknown split,
            inputs of a wrong type, or a label id outside ``0..C-1``; names the task and the split.
    """
    count = len(task.labels)
    if count < 2 or len(set(task.labels)) != count:
        raise UserError(f"Task '{task.name}': labels are {list(task.labels)}. At least two different names are needed.")
    if task.label_texts is not None and len(task.label_texts) != count:
        raise UserError(
            f"Task '{task.name}': {len(task.label_texts)} label_texts for {count} labels. One phrase a label is needed."
        )
    for name in REQUIRED_SPLITS:
        if name not in task.splits:
            raise UserError(f"Task '{task.name}': split '{name}' is missing. Needed: {', '.join(REQUIRED_SPLITS)}.")
    for name, split in task.splits.items():
        if name not in REQUIRED_SPLITS and not (name.startswith(OOD_PREFIX) and len(name) > len(OOD_PREFIX)):
            raise UserError(f"Task '{task.name}': split '{name}' is unknown. Known: train, dev, test, ood_<domain>.")
        _check_split(task, name, split)
    return task


def _check_split(task: Task, name: str, split: Split) -> None:
    where = f"Task '{task.name}', split '{name}'"
    if len(split) == 0:
        raise UserError(f"{where}: empty. At least one row is needed.")
    if len(split.inputs) != len(split.labels):
        raise UserError(
            f"{where}: {len(split.inputs)} inputs but {len(split.labels)} labels. One label a row is needed."
        )
    if split.labels.ndim != 1 or split.labels.dtype != np.int64:
        raise UserError(
            f"{where}: labels are {split.labels.dtype} of shape {split.labels.shape}. Accepted: int64, (N,)."
        )
    wrong = np.flatnonzero((split.labels < 0) | (split.labels >= len(task.labels)))
    if len(wrong):
        raise UserError(
            f"{where}: unknown label id {int(split.labels[wrong[0]])} in row {int(wrong[0])}. "
            f"Accepted: {accepted_ids(task.labels)}."
        )
    if task.kind == "image":
        inputs = split.inputs
        shaped = isinstance(inputs, np.ndarray) and (inputs.ndim == 3 or (inputs.ndim == 4 and inputs.shape[-1] == 3))
        if not shaped or inputs.dtype != np.uint8:  # type: ignore[union-attr]
            shape = getattr(inputs, "shape", None)
            raise UserError(
                f"{where}: images are {getattr(inputs, 'dtype', type(inputs).__name__)} of shape {shape}. "
                "Accepted: uint8 of shape (N, H, W) or (N, H, W, 3)."
            )
        return
    for row, value in enumerate(split.inputs):
        pair = isinstance(value, tuple) and len(value) == 2 and all(isinstance(part, str) for part in value)
        if not (isinstance(value, str) or pair):
            raise UserError(f"{where}: row {row} is {type(value).__name__}. Accepted: text, or a pair of texts.")


def accepted_ids(labels: tuple[str, ...]) -> str:
    """Return the accepted label ids with their names, for a message."""
    shown = ", ".join(labels[:12]) + (", …" if len(labels) > 12 else "")
    return f"0 to {len(labels) - 1} ({shown})"


def philox(*key: object) -> np.random.Generator:
    """Return the random stream that belongs to ``key``, the same on every machine and in every process.

    Args:
        key: anything whose ``str`` is stable, such as a seed and names; different keys give independent streams.
    """
    digest = hashlib.blake2b("\x1f".join(str(part) for part in key).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "big")))


def subsample(task: Task, limits: Mapping[str, int | None], seed: int) -> Task:
    """Return ``task`` with at most so many rows a split, drawn without replacement and kept in file order.

    Args:
        task: a checked task.
        limits: the most rows for ``"train"``, ``"dev"`` and ``"test"`` (which holds for each out-of-domain split
            too); ``None`` keeps all.
        seed: which rows; a smaller limit draws a subset of what a larger one draws.
    """
    splits = {}
    for name, split in task.splits.items():
        limit = limits["test" if name.startswith(OOD_PREFIX) else name]
        if limit is not None and limit < len(split):
            order = philox("subsample", seed, task.name, name).permutation(len(split))
            split = split.take(np.sort(order[:limit]))
        splits[name] = split
    return replace(task, splits=splits)


def fingerprint(task: Task, splits: Sequence[str] | None = None) -> str:
    """Return the SHA-256 (hex) over kind, labels, label texts and every row of every split (or of some), in order.

    Equal data give an equal string whatever they were read from and whatever the task is called.
    """
    digest = hashlib.sha256()

    def add(tag: str, value: bytes) -> None:
        # Length-prefixed, so that no two different sequences of fields share their bytes.
        digest.update(f"{tag}:{len(value)}:".encode() + value)

    add("kind", task.kind.encode())
    for label in task.labels:
        add("label", label.encode())
    for phrase in task.label_texts or ():
        add("label_text", phrase.encode())
    for name in sorted(task.splits if splits is None else splits):
        split = task.splits[name]
        add("split", name.encode())
        add("ids", np.ascontiguousarray(split.labels, dtype="<i8").tobytes())
        if isinstance(split.inputs, np.ndarray):
            add("shape", str(split.inputs.shape).encode())
            add("images", np.ascontiguousarray(split.inputs).tobytes())
            continue
        for value in split.inputs:
            for part in (value,) if isinstance(value, str) else value:
                add("text" if isinstance(value, str) else "pair", part.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
