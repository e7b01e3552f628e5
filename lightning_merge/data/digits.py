"""Digits: scikit-learn's handwritten digits seen in several domains, with no download."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import numpy as np

from lightning_merge.data.datamodule import TaskData
from lightning_merge.data.task import Split, Task, philox
from lightning_merge.errors import UserError, unknown

# What each domain does to the drawn digit (N, S, S), and where on the canvas it is put under layout "quadrants": the
# upper left corner in halves of the free room, (row, column) in {0, 1, 2}.
DOMAINS: dict[str, tuple[int, int]] = {
    "upright": (0, 0),
    "rotated": (0, 2),
    "inverted": (2, 0),
    "mirrored": (2, 2),
    "transposed": (1, 1),
    "flipped": (0, 1),
    "shifted": (2, 1),
}
DEFAULT_DOMAINS = ("upright", "rotated", "inverted", "mirrored", "transposed")
VIEWS = ("nudged", "thick", "tilted")
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PRETRAIN = "pretrain"
TRAIN_PART, DEV_PART = 0.60, 0.12


class Digits(TaskData):
    """Each domain is a task of ten classes; a digit is in the same split in every domain, so nothing leaks.

    Out-of-domain sets of each task are its own test digits in mild views that are never trained on: ``ood_tilted`` (by
    20 degrees), ``ood_thick`` (thicker strokes) and ``ood_nudged`` (moved down by a sixteenth of their size).
    ``get("pretrain")`` is a mixture of the domains with few training rows, to pretrain a base model on.

    Args:
        domains: which domains there are: ``upright``, ``rotated`` (by 90 degrees), ``inverted`` (dark for bright),
            ``mirrored``, ``transposed``, ``flipped`` (upside down), ``shifted`` (an eighth of its size, or where it
            stands). ``None`` for the first five.
        image_size: height and width in pixels, even, 16 or more.
        layout: ``"quadrants"`` draws the digits at half size, each domain in its own place on the canvas, so that tasks
            disturb each other mildly; ``"full"`` draws them over the whole canvas, where tasks conflict heavily.
        pretrain_rows: training rows the mixture takes from each domain, at least 10.
        tasks: see TaskData, as all that follow.
        task: the one to train on.
        batch_size: rows a training batch.
        eval_batch_size: rows a batch elsewhere.
        max_train: the most training rows a task.
        max_dev: the most validation rows a task.
        max_test: the most rows a test set.
        num_workers: processes a loader.
        seed: which rows are kept, and their order (the split itself is fixed).

    Raises:
        UserError: an unknown or repeated domain, a size out of range, or what TaskData refuses.
    """

    def __init__(
        self,
        domains: list[str] | None = None,
        image_size: int = 16,
        layout: Literal["quadrants", "full"] = "quadrants",
        pretrain_rows: int = 60,
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
        self.domains = list(DEFAULT_DOMAINS if domains is None else domains)
        for position, domain in enumerate(self.domains):
            if domain not in DOMAINS:
                raise unknown("domain", domain, DOMAINS)
            if domain in self.domains[:position]:
                raise UserError(f"Digits: domain '{domain}' is listed twice in domains.")
        if not self.domains:
            raise UserError(f"Digits: domains is empty. Known: {', '.join(sorted(DOMAINS))}.")
        if image_size < 16 or image_size % 2:
            raise UserError(f"Digits: image_size must be an even number of at least 16, got {image_size}.")
        if layout not in ("quadrants", "full"):
            raise unknown("layout", str(layout), ("quadrants", "full"))
        if pretrain_rows < 10:
            raise UserError(f"Digits: pretrain_rows must be at least 10, got {pretrain_rows}.")
        self.image_size = image_size
        self.layout = layout
        self.pretrain_rows = pretrain_rows
        super().__init__(tasks, task, batch_size, eval_batch_size, max_train, max_dev, max_test, num_workers, seed)

    def available(self) -> list[str]:
        """Return the domains."""
        return list(self.domains)

    def auxiliary(self) -> list[str]:
        """Return ``["pretrain"]``."""
        return [PRETRAIN]

    def load(self, name: str) -> Task:
        """Draw the digits of one domain, or the mixture."""
        rows = split_rows()
        if name == PRETRAIN:
            few = {"train": self.pretrain_rows, "dev": self.pretrain_rows // 2, "test": self.pretrain_rows // 2}
            splits = {}
            for split, count in few.items():
                # The same digits in all domains, so that the base learns to tell what they share.
                parts = [self._draw(domain, rows[split][:count], None) for domain in self.domains]
                splits[split] = Split(
                    np.concatenate([part.inputs for part in parts]), np.concatenate([part.labels for part in parts])
                )
            return Task(PRETRAIN, "image", NAMES, None, splits, "few digits of every domain")
        splits = {split: self._draw(name, rows[split], None) for split in rows}
        splits.update({f"ood_{view}": self._draw(name, rows["test"], view) for view in VIEWS})
        return Task(name, "image", NAMES, None, splits, f"handwritten digits, {name}")

    def _draw(self, domain: str, rows: np.ndarray, view: str | None) -> Split:
        images, labels = _digits()
        size = self.image_size // 2 if self.layout == "quadrants" else self.image_size
        strokes = _thicken(images[rows]) if view == "thick" else images[rows]
        drawn = _transform(_view(_resize(strokes, size), view), domain)
        canvas = np.zeros((len(rows), self.image_size, self.image_size), dtype=np.uint8)
        top, left = 0, 0
        if self.layout == "quadrants":
            top, left = (half * (self.image_size - size) // 2 for half in DOMAINS[domain])
        canvas[:, top : top + size, left : left + size] = np.clip(np.rint(drawn), 0, 255).astype(np.uint8)
        return Split(canvas, labels[rows])


def split_rows() -> dict[str, np.ndarray]:
    """Return which of the 1,797 digits are in ``train``, ``dev`` and ``test``: fixed, disjoint, 60, 12 and 28 %."""
    total = len(_digits()[1])
    order = philox("digits", "split").permutation(total)
    train, dev = round(TRAIN_PART * total), round((TRAIN_PART + DEV_PART) * total)
    return {"train": order[:train], "dev": order[train:dev], "test": order[dev:]}


@lru_cache(maxsize=1)
def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.asarray(data.images, dtype=np.float64) * (255.0 / 16.0)  # stored as 0..16
    labels = np.asarray(data.target, dtype=np.int64)
    images.setflags(write=False)
    labels.setflags(write=False)
    return images, labels


def _resize(images: np.ndarray, size: int) -> np.ndarray:
    """Return ``(N, 8, 8)`` as ``(N, size, size)`` by linear interpolation between pixel centres."""
    count = images.shape[1]
    if size == count:
        return images
    position = np.clip((np.arange(size) + 0.5) * count / size - 0.5, 0, count - 1)
    low = np.minimum(position.astype(np.int64), count - 2)
    weights = np.zeros((size, count))
    weights[np.arange(size), low] = 1.0 - (position - low)
    weights[np.arange(size), low + 1] += position - low
    return np.einsum("ia,nab,jb->nij", weights, images, weights)


def _thicken(images: np.ndarray) -> np.ndarray:
    """Return the digits ``(N, 8, 8)`` with strokes wider by half a pixel on each side."""
    side = images.shape[1]
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    near = [padded[:, top : top + side, left : left + side] for top, left in ((0, 1), (1, 0), (1, 2), (2, 1))]
    return np.maximum(images, 0.5 * np.max(near, axis=0))


def _view(images: np.ndarray, view: str | None) -> np.ndarray:
    """Return the digits moved or turned a little, as no domain trains on them."""
    if view == "nudged":
        whole, part = divmod(images.shape[1] / 16, 1.0)
        return (1.0 - part) * _move(images, int(whole)) + part * _move(images, int(whole) + 1)
    if view != "tilted":
        return images
    from scipy.ndimage import rotate

    return rotate(images, 20.0, axes=(1, 2), reshape=False, order=1, mode="constant", cval=0.0)


def _transform(images: np.ndarray, domain: str) -> np.ndarray:
    """Return the digits ``(N, S, S)`` as the domain shows them."""
    if domain == "rotated":
        return np.rot90(images, axes=(1, 2))
    if domain == "inverted":
        return 255.0 - images
    if domain == "mirrored":
        return images[:, :, ::-1]
    if domain == "transposed":
        return images.transpose(0, 2, 1)
    if domain == "flipped":
        return images[:, ::-1]
    if domain == "shifted":
        return _move(images, -round(images.shape[1] / 8))
    return images


def _move(images: np.ndarray, step: int) -> np.ndarray:
    """Return the images moved down by ``step`` pixels (up if negative); what comes in is dark."""
    moved = np.zeros_like(images)
    if step > 0:
        moved[:, step:] = images[:, :-step]
    elif step < 0:
        moved[:, :step] = images[:, -step:]
    else:
        moved[:] = images
    return moved
