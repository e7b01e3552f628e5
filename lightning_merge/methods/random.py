"""Random decisions that depend on seed, model, tensor and position only: never on order, chunks or processes."""

from __future__ import annotations

import hashlib
from typing import Literal

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
        # About one entry of a block is left open; its second word is reached directly.
        for at in np.flatnonzero(first == threshold).tolist():
            place = here[0] + at
            keep[at] = _words(seed, model, tensor, block, place, place + 1, plane=1)[0] < remainder
        blocks.append(keep)
    return torch.from_numpy(np.concatenate(blocks) if blocks else np.zeros(0, dtype=bool))


def uniform(
    seed: int, model: str, tensor: str, start: int, stop: int, bits: Literal[16, 32] = 16, plane: int = 0
) -> Tensor:
    """Draw for each flat index in ``start:stop`` a number in [0, 1), a multiple of 2⁻¹⁶ plus half of that.

    The same streams as :func:`keep_mask`: an entry is kept with probability p where its number is below p, to 2⁻¹⁷.

    Args:
        seed: The merge's seed.
        model: The model's name.
        tensor: The tensor's name.
        start: First index.
        stop: One past the last index.
        bits: 32 for probabilities so small that 16 bits would round them; the numbers are then fp64.
        plane: Of independent streams of the same names; 1 completes words to 32 bits.

    Returns:
        ``(stop - start,)``.
    """
    if bits == 32:
        high, low = (uniform(seed, model, tensor, start, stop, plane=which).double() for which in (plane, plane + 1))
        return high.sub_(2.0**-17).add_(low.mul_(2.0**-16))
    blocks = []
    for block in range(start // GRID, -(-stop // GRID)):
        here = max(start - block * GRID, 0), min(stop - block * GRID, GRID)
        blocks.append(_words(seed, model, tensor, block, *here, plane=plane).astype(np.float32))
    words = torch.from_numpy(np.concatenate(blocks) if blocks else np.zeros(0, dtype=np.float32))
    return words.add_(0.5).mul_(2.0**-16)


def _words(seed: int, model: str, tensor: str, block: int, start: int, stop: int, plane: int = 0) -> np.ndarray:
    """Return the 16-bit words ``start:stop`` of one grid block.

    Every (seed, model, tensor, plane) has a stream of its own, in which any position is reached at once, as if the
    position were counted up and hashed; a true hash of counters costs three times as much.
    """
    name = f"{seed}\x00{model}\x00{tensor}\x00{plane}".encode()
    first = start // 4
    stream = np.random.PCG64DXSM(int.from_bytes(hashlib.blake2b(name, digest_size=32).digest(), "little"))
    stream.advance(block * (GRID // 4) + first)
    numbers = stream.random_raw(-(-stop // 4) - first).astype("<u8", copy=False)
    return numbers.view("<u2")[start - 4 * first : stop - 4 * first]


def seed_of_step(seed: int, drawn_before: int) -> int:
    """Return the seed of a step by how many earlier steps of its chain draw: two thinnings must not agree."""
    if not drawn_before:
        return seed
    digest = hashlib.blake2b(f"{seed}\x00step\x00{drawn_before}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "little")
