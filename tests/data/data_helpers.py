"""What several tests of the data room use."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np

from lightning_merge.data import Split, Task, TaskData


class Made(TaskData):
    """Two made-up tasks: ``short`` has single texts of growing length, ``pairs`` has pairs of texts."""

    def available(self) -> list[str]:
        """Return the two names."""
        return ["short", "pairs"]

    def load(self, name: str) -> Task:
        """Make the task."""
        return made_task(name)


def made_task(name: str = "short", rows: int = 100) -> Task:
    """Return a task whose input in row ``i`` tells ``i`` and the split."""
    splits = {}
    for split, count in {"train": rows, "dev": rows // 2, "test": rows // 2, "ood_far": rows // 2}.items():
        texts: list[str] | list[tuple[str, str]] = [
            f"{split} {row} " + "word " * (row * 7 % 31) for row in range(count)
        ]
        if name == "pairs":
            texts = [(text, "other") for text in texts]
        splits[split] = Split(texts, np.arange(count, dtype=np.int64) % 2)
    return Task(name, "text", ("even", "odd"), ("an even row", "an odd row"), splits)


def write_tables(root: Path, name: str = "toy", pair: bool = False, zipped: bool = True) -> Path:
    """Write a task in the layout that TextTables reads and return its folder."""
    folder = root / name
    folder.mkdir(parents=True)
    meta = {"labels": ["no", "yes"], "label_texts": ["it is not", "it is"], "description": "toy"}
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    header = "text_a\ttext_b\tlabel" if pair else "text\tlabel"
    for split, count in {"train": 6, "dev": 2, "test": 3, "ood_far": 2}.items():
        body = [f'{split} "row" {row} é\u2028x' + ("\tb" if pair else "") + f"\t{row % 2}" for row in range(count)]
        data = ("\n".join([header, *body]) + "\n").encode()
        if zipped:
            (folder / f"{split}.tsv.gz").write_bytes(gzip.compress(data, mtime=0))
        else:
            (folder / f"{split}.tsv").write_bytes(data)
    return folder
