"""Sources over other sources: tensors under other names, in another declared dtype, with other rows.

Nothing is read before a piece is asked for, and no more of it than that piece needs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path

import torch
from torch import Tensor

from lightning_merge.weights.source import WeightSource
from lightning_merge.weights.tensor_info import TensorInfo

# Rows of a source read at once when they are averaged: a few MiB.
ROWS_AT_ONCE = 4096


class LazyTensor(ABC):
    """One tensor that is read when asked for.

    Attributes:
        info: Its shape and dtype.
        nominal: The dtype that a result without a dtype of its own takes from it.
        sources: Where its values come from.
    """

    info: TensorInfo
    nominal: torch.dtype
    sources: tuple[WeightSource, ...]

    @abstractmethod
    def read_flat(self, start: int, stop: int) -> Tensor:
        """Return the entries ``start:stop`` of the flattened tensor; to read, not to write to."""

    def read(self) -> Tensor:
        """Return the whole tensor."""
        return self.read_flat(0, self.info.numel).reshape(self.info.shape)


class StoredTensor(LazyTensor):
    """A tensor as a source stores it; ``nominal`` where the source computes in another dtype than it stands for."""

    def __init__(self, source: WeightSource, name: str, nominal: torch.dtype | None = None) -> None:
        stored = source.stored_name(name)
        if stored is None:
            raise KeyError(name)
        self.name, self.info, self.sources = stored, source.tensors[stored], (source,)
        self.nominal = nominal or self.info.dtype

    def read_flat(self, start: int, stop: int) -> Tensor:
        """Pass the request through."""
        return self.sources[0].read_flat(self.name, start, stop)

    def read(self) -> Tensor:
        """Pass the request through."""
        return self.sources[0].read(self.name)


class CastTensor(LazyTensor):
    """A tensor that is read in another dtype."""

    def __init__(self, tensor: LazyTensor, dtype: torch.dtype) -> None:
        self.tensor, self.sources = tensor, tensor.sources
        self.info, self.nominal = TensorInfo(tensor.info.shape, dtype), dtype

    def read_flat(self, start: int, stop: int) -> Tensor:
        """Convert a piece."""
        return self.tensor.read_flat(start, stop).to(self.info.dtype)


@dataclass(frozen=True)
class Rows:
    """From where each row of a tensor comes.

    Attributes:
        donor: For each row the position of the tensor it is copied from, or −1 for a row of zeros.
        row: For each row its number in that tensor.
        averages: Rows that are the mean of several: by row, the ``(donor, row)`` that are averaged.
        padding: So many last rows are the mean of all rows before them.
    """

    donor: Tensor
    row: Tensor
    averages: Mapping[int, Sequence[tuple[int, int]]]
    padding: int = 0

    def __len__(self) -> int:
        return len(self.donor)


class GatheredRows(LazyTensor):
    """A tensor whose rows (slices along the first axis) are gathered from those of other tensors.

    Where a row is a mean it is taken in fp32, so the tensor then is fp32 too: rounding is left to the end of a merge.

    Cost: a piece reads the rows it touches; padding rows read the whole tensor once.
    """

    def __init__(self, tensors: Sequence[LazyTensor], rows: Rows) -> None:
        self.tensors, self.rows = tuple(tensors), rows
        self.sources = tuple(dict.fromkeys(source for tensor in tensors for source in tensor.sources))
        # Of the tensors only those in use have a say.
        used = {int(donor) for donor in rows.donor.unique()} - {-1}
        used |= {donor for mean in rows.averages.values() for donor, _ in mean}
        chosen = [tensor for position, tensor in enumerate(tensors) if position in used] or list(tensors[:1])
        means = [torch.float32] if rows.averages or rows.padding else []
        dtype = reduce(torch.promote_types, [*(tensor.info.dtype for tensor in chosen), *means])
        self.nominal = reduce(torch.promote_types, [tensor.nominal for tensor in chosen])
        self.info = TensorInfo((len(rows), *tensors[0].info.shape[1:]), dtype)

    def read_flat(self, start: int, stop: int) -> Tensor:
        """Gather the rows that the piece touches."""
        width = self.info.numel // len(self.rows)
        if not width or start == stop:
            return torch.empty(0, dtype=self.info.dtype)
        first, last = start // width, -(-stop // width)
        gathered = self._gather(first, last, width)
        return gathered.reshape(-1)[start - first * width : stop - first * width]

    def _gather(self, first: int, last: int, width: int) -> Tensor:
        out = torch.zeros(last - first, width, dtype=self.info.dtype)
        donors, rows = self.rows.donor[first:last], self.rows.row[first:last]
        for position, tensor in enumerate(self.tensors):
            places = torch.nonzero(donors == position).reshape(-1)
            if len(places):
                out[places] = self._rows_of(tensor, rows[places], width).to(out.dtype)
        self._add_averages(out, first, last, width)
        padded = len(self.rows) - self.rows.padding
        if last > padded:
            out[max(padded - first, 0) :] = self._mean_row.to(out.dtype)
        return out

    def _add_averages(self, out: Tensor, first: int, last: int, width: int) -> None:
        touched = self._averaged[bisect_left(self._averaged, first) : bisect_left(self._averaged, last)]
        if not touched:
            return
        parts = [(i, donor, row) for i, at in enumerate(touched) for donor, row in self.rows.averages[at]]
        total = torch.zeros(len(touched), width, dtype=torch.float64)
        for position in sorted({donor for _, donor, _ in parts}):
            into = torch.tensor([i for i, donor, _ in parts if donor == position])
            rows = torch.tensor([row for _, donor, row in parts if donor == position])
            total.index_add_(0, into, self._rows_of(self.tensors[position], rows, width).double())
        counts = torch.tensor([len(self.rows.averages[at]) for at in touched], dtype=torch.float64)
        out[torch.tensor(touched) - first] = (total / counts[:, None]).to(out.dtype)

    @cached_property
    def _averaged(self) -> list[int]:
        return sorted(self.rows.averages)

    @staticmethod
    def _rows_of(tensor: LazyTensor, rows: Tensor, width: int) -> Tensor:
        low, high = int(rows.min()), int(rows.max()) + 1
        # Rows that lie together are read together; scattered ones are picked from the memory-mapped tensor.
        if high - low <= 2 * len(rows):
            return tensor.read_flat(low * width, high * width).reshape(-1, width)[rows - low]
        return tensor.read().reshape(-1, width)[rows]

    @cached_property
    def _mean_row(self) -> Tensor:
        count, width = len(self.rows) - self.rows.padding, self.info.numel // len(self.rows)
        total = torch.zeros(width, dtype=torch.float64)
        for start in range(0, count, ROWS_AT_ONCE):
            total += self._gather(start, min(start + ROWS_AT_ONCE, count), width).double().sum(0)
        return total / max(count, 1)


class ViewSource(WeightSource):
    """Lazy tensors under the names they are given here; the files are those of the sources behind them."""

    def __init__(self, label: str, entries: Mapping[str, LazyTensor]) -> None:
        self.label = label
        self.entries = dict(entries)
        self.tensors = {name: entry.info for name, entry in self.entries.items()}
        self.aliases = {}
        self.inner = tuple(dict.fromkeys(source for entry in entries.values() for source in entry.sources))

    @property
    def files(self) -> tuple[Path, ...]:  # type: ignore[override]
        """The files that hold the values; asked for late, since a source may be written after it was planned."""
        return tuple(dict.fromkeys(file for source in self.inner for file in source.files))

    @property
    def bytes_read(self) -> int:
        """Bytes read through this view; other views may read from the same sources."""
        return self._bytes_read

    def read(self, name: str) -> Tensor:
        """Return the tensor called ``name``."""
        return self.entries[name].read()

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        """Return the entries ``start:stop`` of the flattened tensor."""
        self._bytes_read += (stop - start) * self.tensors[name].dtype.itemsize
        return self.entries[name].read_flat(start, stop)


def renamed(source: WeightSource, names: Mapping[str, str], label: str | None = None) -> ViewSource:
    """Return a source's tensors under other names: ``{new name: name in the source}``; one may stand under several."""
    return ViewSource(label or source.label, {new: StoredTensor(source, old) for new, old in names.items()})
