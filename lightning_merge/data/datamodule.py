"""TaskData: several classification tasks as one LightningDataModule that gives raw batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, Dataset

from lightning_merge.data.corruptions import Corruption
from lightning_merge.data.sampler import LengthGroupedSampler
from lightning_merge.data.task import Split, Task, check_task, fingerprint, subsample
from lightning_merge.errors import UserError, unknown

Row = tuple[Any, int, int]


class Rows(Dataset[Row]):
    """The rows of a split as ``(input, label, row number)``, corrupted when read.

    Args:
        split: the rows.
        corruption: applied to the inputs on reading, or ``None``.
    """

    def __init__(self, split: Split, corruption: Corruption | None = None) -> None:
        self.split = split
        self.corruption = corruption

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.split)

    def __getitem__(self, index: int) -> Row:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[Row]:
        # PyTorch's loaders ask for a whole batch by this name.
        part = self.split.take(np.asarray(indices, dtype=np.int64))
        inputs = part.inputs if self.corruption is None else self.corruption(part.inputs, indices)
        return [(inputs[row], int(part.labels[row]), int(index)) for row, index in enumerate(indices)]


def collate(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the rows as a raw batch.

    Args:
        rows: ``B`` triples of input, label and row number.

    Returns:
        ``inputs``: a list of texts or pairs, or a uint8 tensor ``(B, H, W[, 3])``; ``labels`` and ``index``: int64
        tensors ``(B,)``.
    """
    inputs: Any = [row[0] for row in rows]
    if isinstance(inputs[0], np.ndarray):
        inputs = torch.from_numpy(np.stack(inputs))
    return {
        "inputs": inputs,
        "labels": torch.tensor([row[1] for row in rows], dtype=torch.int64),
        "index": torch.tensor([row[2] for row in rows], dtype=torch.int64),
    }


class TaskData(L.LightningDataModule, ABC):
    """Several tasks, one of which may be singled out for fine-tuning.

    With ``task`` the loaders are that task's. Without, they are one a task: training gives a dict keyed by task
    (Lightning's ``CombinedLoader``, ``max_size_cycle``), validation, test and prediction go through the tasks one after
    another. Batches are raw (texts, uint8 images): the LightningModule tokenizes or normalises them.

    Args:
        tasks: the tasks to use, in this order; ``None`` for all there are.
        task: the one to train on, or ``None`` for all.
        batch_size: rows a training batch, at least 1.
        eval_batch_size: rows a batch elsewhere, at least 1.
        max_train: the most training rows a task (fixed by ``seed``), or ``None`` for all.
        max_dev: the same for validation rows.
        max_test: the same for test rows and the rows of each out-of-domain set.
        num_workers: processes a loader.
        seed: which rows are kept, and the order of training rows.

    Raises:
        UserError: an unknown or repeated task, or a size below 1.
    """

    def __init__(
        self,
        tasks: list[str] | None = None,
        task: str | None = None,
        batch_size: int = 32,
        eval_batch_size: int = 64,
        max_train: int | None = None,
        max_dev: int | None = None,
        max_test: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        sizes = {"batch_size": batch_size, "eval_batch_size": eval_batch_size}
        limits = {"max_train": max_train, "max_dev": max_dev, "max_test": max_test}
        for name, value in {**sizes, **{key: value for key, value in limits.items() if value is not None}}.items():
            if value < 1:
                raise UserError(f"{type(self).__name__}: {name} must be at least 1, got {value}.")
        if num_workers < 0:
            raise UserError(f"{type(self).__name__}: num_workers must be at least 0, got {num_workers}.")
        self.tasks = None if tasks is None else list(tasks)
        self.task = task
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.limits = {"train": max_train, "dev": max_dev, "test": max_test}
        self.num_workers = num_workers
        self.seed = seed
        self._tasks: dict[str, Task] = {}
        self._fingerprints: dict[tuple[str, ...], str] = {}
        self._check_names()

    @abstractmethod
    def available(self) -> list[str]:
        """Return the names of all tasks there are; called once while the object is made, so keep it cheap."""

    @abstractmethod
    def load(self, name: str) -> Task:
        """Read one task, all rows; it is checked, cut to size and kept by ``get``."""

    def auxiliary(self) -> list[str]:
        """Return names that ``get`` knows but that are not part of a run's tasks, such as ``pretrain``."""
        return []

    @property
    def task_names(self) -> list[str]:
        """The chosen tasks, in the given order."""
        return self.available() if self.tasks is None else list(self.tasks)

    def get(self, name: str) -> Task:
        """Return a task, checked and cut to size; read once.

        Raises:
            UserError: an unknown name, or data that cannot be used (names file or split).
        """
        if name not in self._tasks:
            if name not in self.available() and name not in self.auxiliary():
                raise unknown("task", name, [*self.available(), *self.auxiliary()])
            self._tasks[name] = subsample(check_task(self.load(name)), self.limits, self.seed)
        return self._tasks[name]

    def fingerprint(self, name: str, *splits: str) -> str:
        """Return the SHA-256 (hex) over the rows of a task that are actually used, its labels and label texts.

        Args:
            name: the task.
            splits: what to look at, such as ``"train"``; all splits by default.
        """
        key = (name, *splits)
        if key not in self._fingerprints:
            self._fingerprints[key] = fingerprint(self.get(name), splits or None)
        return self._fingerprints[key]

    def ood_names(self, name: str) -> list[str]:
        """Return the names of a task's out-of-domain splits, such as ``["ood_yelp"]``, sorted."""
        return self.get(name).ood_names

    def loader(
        self, name: str, split: str, shuffle: bool = False, corruption: Corruption | str | None = None
    ) -> DataLoader[Row]:
        """Return a loader over one split of one task.

        Args:
            name: the task.
            split: ``"train"``, ``"dev"``, ``"test"`` or ``"ood_<domain>"``.
            shuffle: a new order each epoch (``batch_size`` rows a batch), or a fixed one (``eval_batch_size``).
            corruption: changes the inputs, such as ``Corruption("typos", 3)`` or ``"typos-3"``.

        Raises:
            UserError: an unknown task, split or corruption, or a corruption of another kind of input.
        """
        task = self.get(name)
        if split not in task.splits:
            raise unknown(f"split of task '{name}'", split, task.splits)
        if isinstance(corruption, str):
            corruption = Corruption.parse(corruption)
        if corruption is not None and corruption.kind != task.kind:
            raise UserError(
                f"Corruption '{corruption}' is for {corruption.kind} inputs, but task '{name}' has {task.kind} inputs."
            )
        rows = task.splits[split]
        batch_size = self.batch_size if shuffle else self.eval_batch_size
        sampler = LengthGroupedSampler(row_lengths(rows), batch_size, shuffle, self.seed)
        return DataLoader(
            Rows(rows, corruption),
            batch_size=batch_size,
            sampler=sampler,
            collate_fn=collate,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )

    def train_dataloader(self) -> Any:
        """Return the shuffled training loader, or a dict of them keyed by task."""
        if self.task is not None:
            return self.loader(self.task, "train", shuffle=True)
        return {name: self.loader(name, "train", shuffle=True) for name in self.task_names}

    def val_dataloader(self) -> Any:
        """Return the validation loader, or all tasks' one after another."""
        return self._evaluation_loader("dev")

    def test_dataloader(self) -> Any:
        """Return the test loader, or all tasks' one after another."""
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> Any:
        """Return the test loader, or all tasks' one after another."""
        return self._evaluation_loader("test")

    def _evaluation_loader(self, split: str) -> Any:
        if self.task is not None:
            return self.loader(self.task, split)
        return CombinedLoader({name: self.loader(name, split) for name in self.task_names}, mode="sequential")

    def _check_names(self) -> None:
        """Called by ``__init__``; subclasses set what ``available`` needs before they call ``super().__init__``."""
        available = self.available()
        known = [*available, *self.auxiliary()]
        if self.tasks is not None and not self.tasks:
            raise UserError(f"{type(self).__name__}: tasks is empty. Known: {', '.join(available)}.")
        for position, name in enumerate(self.tasks or []):
            if name not in known:
                raise unknown("task", name, known)
            if name in (self.tasks or [])[:position]:
                raise UserError(f"{type(self).__name__}: task '{name}' is listed twice in tasks.")
        if self.task is not None and self.task not in known:
            raise unknown("task", self.task, known)


def row_lengths(rows: Split) -> np.ndarray:
    """Return how long each input is, in characters: what a sampler groups by. 0 for images."""
    if isinstance(rows.inputs, np.ndarray):
        return np.zeros(len(rows), dtype=np.int64)
    # Characters stand in for tokens: data knows of no tokenizer, and the two go together closely enough for padding.
    return np.array([len(value) if isinstance(value, str) else sum(map(len, value)) for value in rows.inputs])
