"""The directions D_i in which a learned merge may move one tensor, W(λ) = θ₀ + Σ_i λ_i D_i.

For most merges the directions of a tensor are its T task vectors. What holds them decides what a step costs: fp32 or
bf16 in memory, on the parameter's device or the host's, or read again from the models' files each time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_merge.tensor_view import CHUNK, GRID

if TYPE_CHECKING:
    from lightning_merge.task_vectors import TaskVectors

# Entries handled at once: on a processor what fits into its cache, on an accelerator what keeps it busy. Short sums in
# fp32 are also exact ones: at this length the gradient is nearer to fp64 than autograd's; below it calls cost more.
CHUNK_ON_HOST = GRID // 4
CHUNK_ON_DEVICE = 1 << 22


class Directions(ABC):
    """The directions of one tensor, or of the shard of it that this process holds (n entries, flat).

    Attributes:
        count: How many there are, one for each scalar of the tensor.
        nbytes: What they hold in memory.
    """

    count: int
    nbytes: int = 0

    @abstractmethod
    def add_to(self, out: Tensor, values: Tensor) -> None:
        """Add Σ_i values_i · D_i to ``out``, in place.

        Args:
            out: Flat ``(n,)``, fp32 or fp64.
            values: ``(count,)``, fp32, on the same device.
        """

    @abstractmethod
    def contract(self, gradient: Tensor) -> Tensor:
        """Return ⟨gradient, D_i⟩ for each i, ``(count,)`` in fp64, for a flat ``(n,)`` gradient of any dtype."""


class TaskDirections(Directions):
    """T task vectors in memory.

    Args:
        deltas: ``(T, n)``, in the dtype and on the device where they are kept. Those on the host are brought to the
            parameter's device piece by piece.

    Cost: one pass over the T · n numbers for each call, and a piece of them in fp32.
    """

    def __init__(self, deltas: Tensor) -> None:
        self.deltas = deltas
        self.count = len(deltas)
        self.nbytes = deltas.numel() * deltas.element_size()

    def add_to(self, out: Tensor, values: Tensor) -> None:
        """Add the weighted sum."""
        for start, stop in chunks(out.numel(), out.device.type):
            piece = self.deltas[:, start:stop].to(out.device, out.dtype, non_blocking=True)  # (T, chunk)
            out[start:stop].addmv_(piece.t(), values.to(out.dtype))

    def contract(self, gradient: Tensor) -> Tensor:
        """Return the inner products; sums over pieces are added in fp64."""
        total = torch.zeros(self.count, dtype=torch.float64, device=gradient.device)
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        for start, stop in chunks(gradient.numel(), gradient.device.type):
            piece = self.deltas[:, start:stop].to(gradient.device, dtype, non_blocking=True)  # (T, chunk)
            total += torch.mv(piece, gradient[start:stop].to(dtype))
        return total


class FileDirections(Directions):
    """T task vectors that stay in the models' files and are read, piece by piece, whenever they are used.

    Args:
        task_vectors: The models, opened lazily.
        name: The tensor.
        start: First flat index of the shard.

    Cost: reads base and models, T + 1 values an entry, for each call; memory holds one piece.
    """

    def __init__(self, task_vectors: TaskVectors, name: str, start: int = 0) -> None:
        self.task_vectors, self.name, self.start = task_vectors, name, start
        self.count = len(task_vectors)

    def add_to(self, out: Tensor, values: Tensor) -> None:
        """Add the weighted sum."""
        for start, stop in ranges(out.numel()):
            TaskDirections(self.read(start, stop)).add_to(out[start:stop], values)

    def contract(self, gradient: Tensor) -> Tensor:
        """Return the inner products; sums over pieces are added in fp64."""
        total = torch.zeros(self.count, dtype=torch.float64, device=gradient.device)
        for start, stop in ranges(gradient.numel()):
            total += TaskDirections(self.read(start, stop)).contract(gradient[start:stop])
        return total

    def read(self, start: int, stop: int) -> Tensor:
        """Return a piece of the task vectors, ``(T, stop - start)``."""
        return self.task_vectors.view(self.name, self.start + start, self.start + stop).deltas


def chunks(numel: int, device: str) -> Iterator[tuple[int, int]]:
    """Yield the ranges in which ``numel`` entries are handled on a kind of device."""
    return ranges(numel, CHUNK_ON_HOST if device == "cpu" else CHUNK_ON_DEVICE)


def ranges(numel: int, size: int = CHUNK) -> Iterator[tuple[int, int]]:
    """Yield ranges of at most ``size`` entries; by default those in which files are read."""
    for start in range(0, numel, size):
        yield start, min(start + size, numel)
