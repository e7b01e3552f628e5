"""HuggingFaceDatasets: tasks from the ``datasets`` library (an optional extra)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from lightning_merge.data.datamodule import TaskData
from lightning_merge.data.task import OOD_PREFIX, Split, Task, philox
from lightning_merge.errors import UserError, unknown


@dataclass(frozen=True)
class HuggingFaceSource:
    """Where one task is found and what its columns mean.

    Args:
        path: a dataset's name on the Hub, or a folder.
        inputs: one column of texts or images, or two columns of texts.
        label: the column of class ids.
        kind: ``"text"`` or ``"image"``.
        config: the dataset's configuration, if it has several.
        revision: a commit, to fix the version.
        labels: class names; ``None`` takes those the label column declares.
        label_texts: one English phrase a class, or ``None``.
        train: the split to train on.
        dev: the split for validation; ``None`` sets a tenth of the training rows aside.
        test: the split to report on.
        ood: out-of-domain sets: domain to split name.
        image_size: pixels a side that images are resized to.
        color: keep three channels, or grey.
        description: one line for tables.

    Raises:
        UserError: not one or two input columns, or two for images.
    """

    path: str
    inputs: list[str] = field(default_factory=lambda: ["text"])
    label: str = "label"
    kind: Literal["text", "image"] = "text"
    config: str | None = None
    revision: str | None = None
    labels: list[str] | None = None
    label_texts: list[str] | None = None
    train: str = "train"
    dev: str | None = None
    test: str = "test"
    ood: dict[str, str] = field(default_factory=dict)
    image_size: int = 32
    color: bool = False
    description: str = ""

    def __post_init__(self) -> None:
        most = 1 if self.kind == "image" else 2
        if not 1 <= len(self.inputs) <= most:
            raise UserError(
                f"Dataset '{self.path}': inputs are {self.inputs}. Accepted: 1 to {most} {self.kind} columns."
            )


class HuggingFaceDatasets(TaskData):
    """Each entry of ``sources`` is a task. Needs ``pip install datasets``.

    Args:
        sources: task name to where it is found.
        tasks: see TaskData, as all that follow.
        task: the one to train on.
        batch_size: rows a training batch.
        eval_batch_size: rows a batch elsewhere.
        max_train: the most training rows a task.
        max_dev: the most validation rows a task.
        max_test: the most rows a test set.
        num_workers: processes a loader.
        seed: which rows are kept, and their order.

    Raises:
        UserError: no source, or what TaskData refuses; on reading: the library is missing, or a split, column or label
            is unknown.
    """

    def __init__(
        self,
        sources: Mapping[str, HuggingFaceSource],
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
        self.sources = dict(sources)
        if not self.sources:
            raise UserError("HuggingFaceDatasets: sources is empty. At least one task is needed.")
        super().__init__(tasks, task, batch_size, eval_batch_size, max_train, max_dev, max_test, num_workers, seed)

    def available(self) -> list[str]:
        """Return the names in ``sources``, in their order."""
        return list(self.sources)

    def load(self, name: str) -> Task:
        """Read the splits of one task through the ``datasets`` library."""
        try:
            import datasets
        except ImportError:
            raise UserError(
                f"Task '{name}': the package 'datasets' is not installed. Install it with: pip install datasets"
            ) from None
        source = self.sources[name]
        tables: Any = datasets.load_dataset(source.path, source.config, revision=source.revision)
        wanted = {"train": source.train, "test": source.test}
        if source.dev is not None:
            wanted["dev"] = source.dev
        wanted.update({OOD_PREFIX + domain: split for domain, split in source.ood.items()})
        splits = {}
        for split, stored in wanted.items():
            if stored not in tables:
                raise unknown(f"split of dataset '{source.path}'", stored, tables)
            splits[split] = _read(source, tables[stored])
        if source.dev is None:
            rows = len(splits["train"])
            aside = np.zeros(rows, dtype=bool)
            aside[philox("dev", name).permutation(rows)[: max(1, rows // 10)]] = True
            splits["dev"] = splits["train"].take(np.flatnonzero(aside))
            splits["train"] = splits["train"].take(np.flatnonzero(~aside))
        labels = source.labels or getattr(tables[source.train].features[source.label], "names", None)
        if not labels:
            raise UserError(f"Dataset '{source.path}': column '{source.label}' names no classes. Set labels.")
        label_texts = tuple(source.label_texts) if source.label_texts is not None else None
        return Task(name, source.kind, tuple(labels), label_texts, splits, source.description)


def _read(source: HuggingFaceSource, table: Any) -> Split:
    for column in [*source.inputs, source.label]:
        if column not in table.column_names:
            raise unknown(f"column of dataset '{source.path}'", column, table.column_names)
    labels = np.array(list(table[source.label]), dtype=np.int64)
    columns = [list(table[column]) for column in source.inputs]
    if source.kind == "image":
        size = (source.image_size, source.image_size)
        mode = "RGB" if source.color else "L"
        images = [np.asarray(image.convert(mode).resize(size), dtype=np.uint8) for image in columns[0]]
        return Split(np.stack(images) if images else np.zeros((0, *size), dtype=np.uint8), labels)
    return Split(columns[0] if len(columns) == 1 else list(zip(*columns, strict=True)), labels)
