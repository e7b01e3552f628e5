"""ImageArrays: tasks as ``.npz`` files of uint8 images."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lightning_merge.data.datamodule import TaskData
from lightning_merge.data.task import OOD_PREFIX, REQUIRED_SPLITS, Split, Task
from lightning_merge.errors import UserError, nearest, unknown


class ImageArrays(TaskData):
    """Every file ``root/<task>.npz`` is a task.

    It holds ``x_train y_train x_dev y_dev x_test y_test`` (images uint8 ``(N, H, W)`` or ``(N, H, W, 3)``, integer
    labels ``(N,)``), ``classes`` (names in the order of the ids) and, for each out-of-domain set,
    ``x_ood_<domain> y_ood_<domain>``. Other arrays are not read.

    Args:
        root: the folder of ``.npz`` files.
        ood: further out-of-domain sets: for a task, other tasks of equal classes whose test rows serve as
            ``ood_<other>``, such as ``{"mnist": ["usps"]}``.
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
        UserError: no such folder, no task in it, an unknown name in ``ood``, or what TaskData refuses; on reading: a
            file that is no archive of arrays, a missing array, or another task with other classes.
    """

    def __init__(
        self,
        root: str | Path,
        ood: Mapping[str, list[str]] | None = None,
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
            raise UserError(f"ImageArrays: root '{root}' is not a folder. Accepted: a folder of .npz files.")
        self._available = sorted(path.stem for path in self.root.glob("*.npz"))
        if not self._available:
            raise UserError(f"ImageArrays: no .npz file in '{root}'. Each task is one .npz file.")
        self.ood = {name: list(others) for name, others in (ood or {}).items()}
        for name in [*self.ood, *(other for others in self.ood.values() for other in others)]:
            if name not in self._available:
                raise unknown("task in ood", name, self._available)
        super().__init__(tasks, task, batch_size, eval_batch_size, max_train, max_dev, max_test, num_workers, seed)

    def available(self) -> list[str]:
        """Return the names of the ``.npz`` files, sorted."""
        return list(self._available)

    def load(self, name: str) -> Task:
        """Read the arrays of one task."""
        classes, splits = self._read(name, None)
        for other in self.ood.get(name, []):
            other_classes, other_splits = self._read(other, "test")
            if other_classes != classes:
                raise UserError(
                    f"ImageArrays: classes of '{other}' are {list(other_classes)}, so it is no out-of-domain set of "
                    f"'{name}'. Accepted: {list(classes)}."
                )
            splits[OOD_PREFIX + other] = other_splits["test"]
        return Task(name, "image", classes, None, splits)

    def _read(self, name: str, only: str | None) -> tuple[tuple[str, ...], dict[str, Split]]:
        path = self.root / f"{name}.npz"
        try:
            # Pickled arrays could run code, so they are refused.
            with np.load(path, allow_pickle=False) as archive:
                keys = archive.files
                found = [key[2:] for key in keys if key.startswith("x_" + OOD_PREFIX)]
                wanted = [*REQUIRED_SPLITS, *sorted(found)] if only is None else [only]
                for key in ["classes", *(axis + split for split in wanted for axis in ("x_", "y_"))]:
                    if key not in keys:
                        raise UserError(
                            f"ImageArrays: array '{key}' is missing in '{path}', which holds {', '.join(keys)}."
                            f"{nearest(key, keys)}"
                        )
                classes = tuple(str(entry) for entry in archive["classes"])
                splits = {split: Split(archive["x_" + split], _ids(archive["y_" + split], path)) for split in wanted}
        except UserError:
            raise
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(
                f"ImageArrays: '{path}' cannot be read ({error}). Accepted: a .npz archive of plain arrays."
            ) from None
        return classes, splits


def _ids(labels: np.ndarray, path: Path) -> np.ndarray:
    if not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"ImageArrays: labels in '{path}' are {labels.dtype}. Accepted: integers.")
    return labels.astype(np.int64)
