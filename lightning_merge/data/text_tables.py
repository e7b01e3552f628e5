"""TextTables: tasks as folders of tab-separated tables."""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from lightning_merge.data.datamodule import TaskData
from lightning_merge.data.task import OOD_PREFIX, REQUIRED_SPLITS, Split, Task, accepted_ids
from lightning_merge.errors import UserError, nearest

HEADERS = (["text", "label"], ["text_a", "text_b", "label"])
SUFFIXES = (".tsv", ".tsv.gz")


class TextTables(TaskData):
    """Every folder ``root/<task>`` that holds ``meta.json`` is a task.

    ``train``, ``dev``, ``test`` and any number of ``ood_<domain>`` tables stand beside it, each ``.tsv`` or
    ``.tsv.gz``: UTF-8, one header line (``text label`` or ``text_a text_b label``), tab-separated, no quoting, integer
    labels. ``meta.json`` has ``labels`` (names in the order of the ids) and may have ``label_texts`` and
    ``description``.

    Args:
        root: the folder of task folders.
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
        UserError: no such folder, no task in it, or what TaskData refuses; on reading: a file that is missing, empty,
            malformed or has an unknown label id (names file and line).
    """

    def __init__(
        self,
        root: str | Path,
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
        self.root = Path(root)
        if not self.root.is_dir():
            raise UserError(f"TextTables: root '{root}' is not a folder. Accepted: a folder of task folders.")
        self._available = sorted(path.parent.name for path in self.root.glob("*/meta.json"))
        if not self._available:
            raise UserError(f"TextTables: no task in '{root}'. A task is a folder with meta.json and its tables.")
        super().__init__(tasks, task, batch_size, eval_batch_size, max_train, max_dev, max_test, num_workers, seed)

    def available(self) -> list[str]:
        """Return the names of the task folders, sorted."""
        return list(self._available)

    def load(self, name: str) -> Task:
        """Read the tables of one task."""
        folder = self.root / name
        meta = _read_meta(folder / "meta.json")
        labels = tuple(meta["labels"])
        files: dict[str, Path] = {}
        for split in REQUIRED_SPLITS:
            found = [folder / (split + suffix) for suffix in SUFFIXES if (folder / (split + suffix)).is_file()]
            if not found:
                there = sorted(path.name for path in folder.glob("*.tsv*"))
                raise UserError(
                    f"TextTables: '{folder / split}.tsv' (or .tsv.gz) is missing. The folder holds "
                    f"{', '.join(there) or 'no table'}.{nearest(split + '.tsv', there)}"
                )
            files[split] = found[0]
        for path in sorted(folder.glob(OOD_PREFIX + "*")):
            split = path.name.removesuffix(".gz").removesuffix(".tsv")
            if path.name.endswith(SUFFIXES) and split != OOD_PREFIX:
                files.setdefault(split, path)
        splits = {split: read_table(path, labels) for split, path in files.items()}
        label_texts = meta.get("label_texts")
        return Task(
            name,
            "text",
            labels,
            tuple(label_texts) if label_texts is not None else None,
            splits,
            str(meta.get("description", "")),
        )


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"TextTables: '{path}' cannot be read ({error}). Accepted: a JSON object with labels."
        ) from None
    for key in ("labels", "label_texts"):
        value = meta.get(key) if isinstance(meta, dict) else None
        if key == "label_texts" and isinstance(meta, dict) and value is None:
            continue
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            raise UserError(f"TextTables: {key} in '{path}' is {value!r}. Accepted: a list of names.")
    return meta


def read_table(path: Path, labels: tuple[str, ...]) -> Split:
    """Read one table.

    Args:
        path: a ``.tsv`` or ``.tsv.gz`` file.
        labels: the label names; ids run from 0 to their number less one.

    Raises:
        UserError: unreadable, a wrong header, no rows, a wrong number of columns, or an unknown label id.
    """
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(
            f"TextTables: '{path}' cannot be read ({error}). Accepted: UTF-8 text, plain or gzip."
        ) from None
    # Only "\n" ends a row: splitlines() would also cut at the form feeds and line separators that web text holds.
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    header = lines[0].split("\t")
    if header not in HEADERS:
        raise UserError(
            f"TextTables: the header of '{path}' is {header}. Accepted, tab-separated: "
            f"{' or '.join(str(known) for known in HEADERS)}."
        )
    inputs: list[Any] = []
    ids: list[int] = []
    for number, line in enumerate(lines[1:], start=2):
        if not line:
            continue
        fields = line.split("\t")
        if len(fields) != len(header):
            raise UserError(
                f"TextTables: line {number} of '{path}' has {len(fields)} columns. Accepted: {len(header)} ({header})."
            )
        label = fields[-1].strip()
        if not label.isdecimal() or int(label) >= len(labels):
            raise UserError(
                f"TextTables: unknown label id '{label}' in line {number} of '{path}'. "
                f"Accepted: {accepted_ids(labels)}."
            )
        inputs.append(fields[0] if len(header) == 2 else (fields[0], fields[1]))
        ids.append(int(label))
    if not inputs:
        raise UserError(f"TextTables: '{path}' has no rows. At least one row below the header is needed.")
    return Split(inputs, np.array(ids, dtype=np.int64))
