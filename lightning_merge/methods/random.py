"""Random decisions that depend on seed, model, tensor and position only: never on order, chunks or processes."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from lightning_merge.tensor_view import GRID


def keep_mask(probability: float, seed: int, model: str, tensor: str, start: int, stop: int) -> Tensor:
    """Draw for each flat index in ``start:stop`` whether it is kept.

    A 16-bit word decides; only where it equals the leading 16 bits of the probability does a second word decide, so
    that the probability holds to 32 bits.

    Args:
        probability: Of being kept, in [0, 1].
        seed: The merge's seed.
        model: The model's name.
        tensor: The tensor's name.
        start: A multiple of 2¹⁶, the grid on which streams begin.
        stop: One past the last index.

    Returns:
        Boolean ``(stop - start,)``.

    Cost: about 1 ns an entry; one Philox stream for every 2¹⁶ entries.
    """
    threshold, remainder = divmod(round(probability * (1 << 32)), 1 << 16)
    blocks = []
    for block_start in range(start, stop, GRID):
        count = min(GRID, stop - block_start)
        words = _words(seed, model, tensor, block_start // GRID, 2 * count)
        first, second = words[:count], words[count:]
        keep = first < threshold
        undecided = first == threshold
        keep[undecided] = second[undecided] < remainder
        blocks.append(keep)
    return torch.from_numpy(np.concatenate(blocks) if blocks else np.zeros(0, dtype=bool))


def _words(seed: int, model: str, tensor: str, block: int, count: int) -> np.ndarray:
    """Return ``count`` 16-bit words of the stream of one grid block."""
    name = f"{seed}\x00{model}\x00{tensor}".encode()
    key = np.frombuffer(hashlib.blake2b(name, digest_size=16).digest(), dtype="<u8")
    # The block number goes into the counter's top word, so that streams of one key never meet.
    stream = np.random.Philox(key=key, counter=[0, 0, 0, block])
    return stream.random_raw((count + 3) // 4).astype("<u8").view("<u2")[:count]
