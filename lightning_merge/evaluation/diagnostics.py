"""How task vectors lie to one another: cosines, sign conflict, norms by block. Streams one tensor at a time."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lightning_merge.errors import UserError

CHUNK = 2**18  # entries of every task held in fp64 at a time


class DeltaSource(Protocol):
    """What the diagnostics need of a ``TaskVectors`` object."""

    @property
    def names(self) -> Sequence[str]:
        """Names of the models."""

    @property
    def tensor_names(self) -> Sequence[str]:
        """Names of the tensors."""

    def delta(self, model: str, name: str) -> Tensor:
        """Difference of a model's tensor to the base's, fp32."""

    def base_tensor(self, name: str) -> Tensor:
        """Tensor of the base."""


@dataclass(frozen=True)
class TaskVectorStatistics:
    """Geometry of T task vectors over B blocks of the model.

    Args:
        names: (T,) names of the models.
        cosine: (T, T) cosine of the whole task vectors; nan where one of the two is zero.
        norms: (T,) Euclidean norm of each task vector.
        conflict_counts: (bins,) int64, compared entries in each bin of sign conflict.
        conflict_edges: (bins + 1,) from 0 to 1.
        conflict_mean: mean conflict over the compared entries; nan where there are none.
        compared: number of entries where at least two tasks are not zero.
        entries: number of entries in all.
        blocks: (B,) names of the blocks, from the input to the output where the names tell.
        block_norms: (T, B) Euclidean norm of each task vector within each block.
        base_block_norms: (B,) the same of the base.
    """

    names: tuple[str, ...]
    cosine: np.ndarray
    norms: np.ndarray
    conflict_counts: np.ndarray
    conflict_edges: np.ndarray
    conflict_mean: float
    compared: int
    entries: int
    blocks: tuple[str, ...]
    block_norms: np.ndarray
    base_block_norms: np.ndarray

    @property
    def relative_block_norms(self) -> np.ndarray:
        """(T, B) norm of the task vector over the norm of the base; nan where the base is zero."""
        base = np.where(self.base_block_norms > 0, self.base_block_norms, np.nan)
        return self.block_norms / base


def sign_conflict(deltas: Tensor) -> Tensor:
    """Conflict 1 - |sum over tasks| / (sum over tasks of the magnitude), entry by entry.

    0 where all tasks push the entry the same way, 1 where they cancel; it is twice the minority sign's share of the
    magnitude.

    Args:
        deltas: (T, N) task vectors.

    Returns:
        (M,) in [0, 1], for the M entries where at least two tasks are not zero, in their order.
    """
    compared = deltas[:, (deltas != 0).sum(dim=0) >= 2].double()
    magnitude = compared.abs().sum(dim=0)
    return (1.0 - compared.sum(dim=0).abs() / magnitude).clamp(0.0, 1.0)


def blocks_of(tensor_names: Sequence[str]) -> dict[str, str]:
    """Name the block of each tensor: up to the first number (``encoder.layer.3``), else the first part (``pooler``).

    Leading parts that all names share (``vit.``) are dropped first.
    """
    split = {name: name.split(".") for name in tensor_names}
    shared = 0
    while split and len({tuple(parts[: shared + 1]) for parts in split.values()}) == 1:
        if min(len(parts) for parts in split.values()) <= shared + 1:
            break  # the last part of a name always stays
        shared += 1
    blocks = {}
    for name, parts in split.items():
        own = parts[shared:]
        number = next((place for place, part in enumerate(own) if part.isdigit()), 0)
        blocks[name] = ".".join(own[: number + 1])
    return blocks


def task_vector_statistics(task_vectors: DeltaSource, bins: int = 20) -> TaskVectorStatistics:
    """Measure task vectors in one pass that holds one tensor of all tasks; sums are accumulated in fp64.

    Args:
        task_vectors: names, tensor names, deltas and base.
        bins: bins of the conflict histogram, at least 1.

    Raises:
        UserError: a delta that is not finite (names model and tensor), or no model.
    """
    names = tuple(task_vectors.names)
    if not names:
        raise UserError("There are no task vectors to measure. Accepted is at least one model.")
    gram = torch.zeros(len(names), len(names), dtype=torch.float64)
    counts = torch.zeros(bins, dtype=torch.int64)
    total_conflict, compared, entries = 0.0, 0, 0
    squares: dict[str, Tensor] = {}  # block -> (T,)
    base_squares: dict[str, float] = {}
    block_of = blocks_of(task_vectors.tensor_names)
    for tensor_name in task_vectors.tensor_names:
        deltas = torch.stack([task_vectors.delta(name, tensor_name).detach().cpu().flatten() for name in names])
        base = task_vectors.base_tensor(tensor_name).detach().cpu().flatten()
        block = block_of[tensor_name]
        square = squares.setdefault(block, torch.zeros(len(names), dtype=torch.float64))
        base_squares.setdefault(block, 0.0)
        entries += deltas.shape[1]
        for start in range(0, deltas.shape[1], CHUNK):
            chunk = deltas[:, start : start + CHUNK].double()  # (T, n)
            part = chunk @ chunk.T
            finite = torch.isfinite(part.diagonal())
            if not bool(finite.all()):
                model = names[int((~finite).nonzero()[0])]
                raise UserError(f"The tensor '{tensor_name}' of '{model}' holds NaN or infinity.")
            gram += part
            square += part.diagonal()
            base_squares[block] += float(base[start : start + CHUNK].double().square().sum())
            conflict = sign_conflict(chunk)
            counts += torch.bincount((conflict * bins).long().clamp(max=bins - 1), minlength=bins)
            total_conflict += float(conflict.sum())
            compared += conflict.numel()
    norms = gram.diagonal().sqrt()
    scale = norms.where(norms > 0, torch.tensor(float("nan"), dtype=torch.float64))
    cosine = (gram / scale[:, None] / scale[None, :]).clamp(-1.0, 1.0)
    blocks = _ordered(squares)
    return TaskVectorStatistics(
        names=names,
        cosine=cosine.numpy(),
        norms=norms.numpy(),
        conflict_counts=counts.numpy(),
        conflict_edges=np.linspace(0.0, 1.0, bins + 1),
        conflict_mean=total_conflict / compared if compared else float("nan"),
        compared=compared,
        entries=entries,
        blocks=blocks,
        block_norms=np.stack([squares[block].sqrt().numpy() for block in blocks], axis=1)
        if blocks
        else np.zeros((len(names), 0)),
        base_block_norms=np.sqrt(np.array([base_squares[block] for block in blocks], dtype=np.float64)),
    )


def _ordered(blocks: Sequence[str] | dict[str, Tensor]) -> tuple[str, ...]:
    """Order blocks as a forward pass meets them: embeddings, numbered blocks by number, then the rest by name."""

    def rank(block: str) -> tuple[int, list[tuple[bool, int, str]]]:
        numbered = re.search(r"(^|\.)\d+$", block) is not None
        place = 1 if numbered else 0 if re.search(r"embed|stem|patch", block, re.IGNORECASE) else 2
        pieces = [(not piece.isdigit(), int(piece) if piece.isdigit() else 0, piece) for piece in block.split(".")]
        return place, pieces

    return tuple(sorted(blocks, key=rank))
