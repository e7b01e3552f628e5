"""The order of rows: rows of like length side by side, so that a batch of texts is padded little."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from lightning_merge.data.task import philox


class LengthGroupedSampler(Sampler[int]):
    """Gives row numbers so that consecutive batches hold rows of like length.

    Not a batch sampler, so Lightning may replace it by its distributed sampler; then only the grouping is lost. With
    ``shuffle`` the rows are permuted, cut into pools of ``pool`` batches, sorted by length within a pool, and the
    batches of a pool are permuted. Without, all rows are sorted by length, longest first.

    Args:
        lengths: length of each row in any unit, shape ``(N,)``; constant for images.
        batch_size: rows a batch, at least 1.
        shuffle: a new order each epoch, or the sorted one.
        seed: with the epoch, what the order depends on.
        pool: batches a pool, at least 1.
    """

    def __init__(
        self, lengths: Sequence[int] | np.ndarray, batch_size: int, shuffle: bool = False, seed: int = 0, pool: int = 16
    ) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.pool = pool
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the coming pass; Lightning's loops call this before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        """Yield each row number once."""
        if not self.shuffle:
            yield from np.argsort(-self.lengths, kind="stable").tolist()
            return
        generator = philox("order", self.seed, self.epoch)
        order = generator.permutation(len(self.lengths))
        step = self.pool * self.batch_size
        for start in range(0, len(order), step):
            rows = order[start : start + step]
            rows = rows[np.argsort(-self.lengths[rows], kind="stable")]
            full = len(rows) // self.batch_size
            # The incomplete batch stays last: moved forward it would shift the edges of the batches after it.
            for batch in generator.permutation(full):
                yield from rows[batch * self.batch_size : (batch + 1) * self.batch_size].tolist()
            yield from rows[full * self.batch_size :].tolist()
