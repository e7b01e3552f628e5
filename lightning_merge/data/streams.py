"""TaskStreams: the rows of several tasks as an unlabeled stream, for merges that learn while they see it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import lightning as L
import numpy as np
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader

from lightning_merge.data.corruptions import Corruption
from lightning_merge.data.datamodule import Row, Rows, TaskData, collate, row_lengths
from lightning_merge.data.sampler import LengthGroupedSampler
from lightning_merge.data.task import Split, Task, philox
from lightning_merge.errors import UserError, unknown

Mode = Literal["max_size_cycle", "min_size"]
MODES = ("max_size_cycle", "min_size")
# Batches that are grouped by length together: more would pad less, but a small task would always see the same batches.
POOL = 4


class StreamRows(Rows):
    """Some rows of a split, known by their numbers in the whole split and corrupted as those are.

    Args:
        split: the whole split.
        rows: the numbers of the rows that are used, int64, in order.
        corruption: applied to the inputs on reading, or ``None``.
    """

    def __init__(self, split: Split, rows: np.ndarray, corruption: Corruption | None = None) -> None:
        super().__init__(split, corruption)
        self.rows = rows

    def __len__(self) -> int:
        """Return the number of rows that are used."""
        return len(self.rows)

    def __getitems__(self, indices: list[int]) -> list[Row]:
        return super().__getitems__(self.rows[np.asarray(indices, dtype=np.int64)].tolist())


class StreamSampler(LengthGroupedSampler):
    """A new order at each pass: of each epoch, and of each repetition of a small task within an epoch."""

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int, epoch: int = 0) -> None:
        super().__init__(lengths, batch_size, shuffle=True, seed=seed, pool=POOL)
        self.epoch, self._passes = epoch, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the coming pass; Lightning's loops call this before each epoch."""
        if epoch != self.epoch:
            self.epoch, self._passes = epoch, 0

    def __iter__(self) -> Iterator[int]:
        """Yield each row number once."""
        passes, self._passes = self._passes, self._passes + 1
        # The order within a pass of an epoch is drawn from one stream for each pair of the two.
        seed, self.seed = self.seed, int(philox("pass", self.seed, passes).integers(2**62)) if passes else self.seed
        try:
            order = list(super().__iter__())
        finally:
            self.seed = seed
        yield from order


class TaskStreams(L.LightningDataModule):
    """The rows of one split of several tasks as a stream of batches ``{task: {"inputs", "index"}}``, without labels.

    A training batch holds ``batch_size`` rows of every task (Lightning's ``CombinedLoader``). By default an epoch is as
    long as the largest task's rows last, and smaller tasks start again in a new order (``max_size_cycle``); with
    ``min_size`` it is as long as the smallest's. The order depends on seed and epoch only, so that a run that was
    stopped after an epoch goes on as it would have. Under several devices Lightning deals the rows out in its own
    order, and does so anew at each epoch.

    Validation and test loaders are the data's own, with labels, one task after another: they score and teach nothing.

    Args:
        data: the tasks; none may be singled out (``data.task``).
        split: the rows that are streamed: ``test`` (adaptation is then transductive), ``dev``, ``train`` or
            ``ood_<domain>`` where every task has it.
        batch_size: rows of each task in a batch, at least 1.
        labels: give labels too, for ``Supervised``; refused on ``test``, whose labels score what is learned.
        max_rows: the most rows of each task that are streamed (drawn by ``seed``), or ``None`` for all.
        corruption: changes the inputs, such as ``typos-3``: a stream of another domain.
        mode: ``max_size_cycle`` or ``min_size``.
        num_workers: processes a loader.
        seed: of the order of rows, and of which they are.

    Raises:
        UserError: an unknown split, mode or corruption, a size below 1, or labels of test rows.
    """

    def __init__(
        self,
        data: TaskData,
        split: str = "test",
        batch_size: int = 16,
        labels: bool = False,
        max_rows: int | None = None,
        corruption: str | None = None,
        mode: Literal["max_size_cycle", "min_size"] = "max_size_cycle",
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("max_rows", max_rows, 1),
            ("num_workers", num_workers, 0),
        ):
            if value is not None and value < least:
                raise UserError(f"TaskStreams: {name} must be at least {least}, got {value}.")
        if mode not in MODES:
            raise unknown("mode of TaskStreams", str(mode), MODES)
        if data.task is not None:
            raise UserError(
                f"TaskStreams: the data singles out the task '{data.task}'. Expected data.task: null, and data.tasks "
                "for fewer tasks."
            )
        if split not in ("train", "dev", "test") and not split.startswith("ood_"):
            raise unknown("split of TaskStreams", split, ("train", "dev", "test", "ood_<domain>"))
        if labels and split not in ("train", "dev"):
            raise UserError(
                f"TaskStreams: labels of '{split}' rows would teach what they are to score. "
                "Expected split: dev or train."
            )
        self.data, self.split, self.batch_size, self.labels = data, split, batch_size, labels
        self.max_rows, self.mode, self.num_workers, self.seed = max_rows, mode, num_workers, seed
        self.corruption = None if corruption is None else Corruption.parse(corruption)

    @property
    def task_names(self) -> list[str]:
        """The tasks, which are the keys of the stream."""
        return self.data.task_names

    def get(self, name: str) -> Task:
        """Return a task; see :meth:`TaskData.get`."""
        return self.data.get(name)

    def stream(self, name: str, epoch: int = 0) -> DataLoader[Row]:
        """Return the shuffled loader of one task, its batches without labels unless they were asked for.

        Args:
            name: the task.
            epoch: the first epoch of its order.

        Raises:
            UserError: an unknown task, a split that it lacks, or a corruption of another kind of input.
        """
        task = self.data.get(name)
        if self.split not in task.splits:
            raise unknown(f"split of task '{name}'", self.split, task.splits)
        if self.corruption is not None and self.corruption.kind != task.kind:
            raise UserError(
                f"Corruption '{self.corruption}' is for {self.corruption.kind} inputs, but task '{name}' has "
                f"{task.kind} inputs."
            )
        split = task.splits[self.split]
        rows = np.arange(len(split), dtype=np.int64)
        if self.max_rows is not None and self.max_rows < len(rows):
            drawn = philox("stream", self.seed, name, self.split).permutation(len(rows))
            rows = np.sort(drawn[: self.max_rows])
        sampler = StreamSampler(row_lengths(split)[rows], self.batch_size, self.seed, epoch)
        return DataLoader(
            StreamRows(split, rows, self.corruption),
            batch_size=self.batch_size,
            sampler=sampler,
            collate_fn=collate if self.labels else unlabeled,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )

    def train_dataloader(self) -> CombinedLoader:
        """Return the stream: one shuffled loader for each task, drawn from side by side."""
        epoch = 0 if self.trainer is None else self.trainer.current_epoch
        return CombinedLoader({name: self.stream(name, epoch) for name in self.task_names}, mode=self.mode)

    def val_dataloader(self) -> CombinedLoader:
        """Return the labeled validation rows, one task after another."""
        return self._labeled("dev")

    def test_dataloader(self) -> CombinedLoader:
        """Return the labeled test rows, one task after another."""
        return self._labeled("test")

    def predict_dataloader(self) -> CombinedLoader:
        """Return the test rows, one task after another."""
        return self._labeled("test")

    def _labeled(self, split: str) -> CombinedLoader:
        return CombinedLoader({name: self.data.loader(name, split) for name in self.task_names}, mode="sequential")


def unlabeled(rows: list[Row]) -> dict[str, Any]:
    """Return the rows as a raw batch ``{"inputs", "index"}``; see :func:`lightning_merge.data.collate`."""
    batch = collate(rows)
    del batch["labels"]
    return batch
