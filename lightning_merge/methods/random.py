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
        start: First index; streams begin on a grid of 2¹⁶.
        stop: One past the last index.

    Returns:
        Boolean ``(stop - start,)``.

    Cost: about 1 ns an entry; one Philox stream for every 2¹⁶ entries.
    """
    threshold, remainder = divmod(round(probability * (1 << 32)), 1 << 16)
    blocks = []
    for block in range(start // GRID, -(-stop // GRID)):
        here = max(start - block * GRID, 0), min(stop - block * GRID, GRID)
        first = _words(seed, model, tensor, block, *here)
        keep = first < threshold
        undecided = first == threshold
        if undecided.any():
            keep[undecided] = _words(seed, model, tensor, block, *here, plane=1)[undecided] < remainder
        blocks.append(keep)
    return torch.from_numpy(np.concatenate(blocks) if blocks else np.zeros(0, dtype=bool))


def uniform(seed: int, model: str, tensor: str, start: int, stop: int) -> Tensor:
    """Draw for each flat index in ``start:stop`` a number in [0, 1), a multiple of 2⁻¹⁶ plus half of that.

    The same streams as :func:`keep_mask`: an entry is kept with probability p where its number is below p, to 2⁻¹⁷.

    Returns:
        fp32 ``(stop - start,)``.
    """
    blocks = []
    for block in range(start // GRID, -(-stop // GRID)):
        here = max(start - block * GRID, 0), min(stop - block * GRID, GRID)
        blocks.append(_words(seed, model, tensor, block, *here).astype(np.float32))
    words = torch.from_numpy(np.concatenate(blocks) if blocks else np.zeros(0, dtype=np.float32))
    return words.add_(0.5).mul_(2.0**-16)


def _words(seed: int, model: str, tensor: str, block: int, start: int, stop: int, plane: int = 0) -> np.ndarray:
    """Return the 16-bit words ``start:stop`` of one stream of one grid block."""
    name = f"{seed}\x00{model}\x00{tensor}".encode()
    key = np.frombuffer(hashlib.blake2b(name, digest_size=16).digest(), dtype="<u8")
    # Block and plane go into the counter's top words, so that streams of one key never meet.
    # One step of the counter makes four numbers of 64 bits, which are sixteen words.
    first = start // 16
    stream = np.random.Philox(key=key, counter=[first, 0, plane, block])
    numbers = stream.random_raw((stop - 16 * first + 3) // 4).astype("<u8", copy=False)
    return numbers.view("<u2")[start - 16 * first : stop - 16 * first]
