"""A piece of one tensor in the base and in all models, as merge kernels see it, and sums that no chunking changes."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning_merge.task_vectors import TaskVectors

# Sums over entries are taken block by block and then exactly, so that no chunking ever changes them.
GRID = 1 << 16
# Entries of one tensor handled at once: half a MiB a model, so that a piece of a few models stays in the cache.
CHUNK = 2 * GRID


class TensorView:
    """A piece of one tensor in the base and in all T models, as merge kernels see it; each part is made when asked for.

    Attributes:
        name: The tensor's name.
        start: First flat index of the piece.
        stop: One past its last flat index.
        info: Shape and dtype of the whole tensor.
        models: Names of the T models in sorted order, the order of the first axis below.
        merged: For a refinement, what the method before it made of the piece, flat ``(n,)``.
    """

    def __init__(self, space: TaskVectors, name: str, start: int, stop: int) -> None:
        self.name, self.start, self.stop = name, start, stop
        self.info = space.info(name)
        self.models = space.names
        self._space = space
        self.merged: Tensor | None = None
        self._deltas: Tensor | None = None
        self._original: TensorView | None = None

    @cached_property
    def base(self) -> Tensor:
        """θ₀, flat ``(n,)`` in the computing dtype."""
        return self._space.read_base(*self._at)

    @cached_property
    def finetuned(self) -> Tensor:
        """θ_t, ``(T, n)`` in the computing dtype; as stored wherever no transform changed the task vectors."""
        if self._deltas is not None:
            original = self.original
            kept = self._deltas == original.deltas
            return torch.where(kept, original.finetuned, add_delta(self.base, self._deltas))
        out = torch.empty(len(self.models), self.stop - self.start, dtype=self._space.compute_dtype(self.name))
        for row, model in zip(out, self.models, strict=True):
            self._space.read_finetuned_into(row, model, *self._at)
        self._space.refuse_infinite(out, *self._at)
        return out

    @cached_property
    def deltas(self) -> Tensor:
        """τ_t, ``(T, n)`` in the computing dtype."""
        if self._deltas is not None:
            return self._deltas
        out = torch.empty(len(self.models), self.stop - self.start, dtype=self._space.compute_dtype(self.name))
        base = self._unchecked_base()
        for row, model in zip(out, self.models, strict=True):
            self._space.read_delta_into(row, model, *self._at, base)
        # A difference with a base that is not finite is not finite either.
        self._space.refuse_infinite(out, *self._at)
        return out

    def delta_rows(self) -> Iterator[Tensor]:
        """Yield τ_t, ``(n,)``, one model after another; a row is valid until the next one is asked for."""
        if self._deltas is not None or "deltas" in self.__dict__:
            yield from self.deltas
            return
        row = torch.empty(self.stop - self.start, dtype=self._space.compute_dtype(self.name))
        base = self._unchecked_base()
        for model in self.models:
            self._space.read_delta_into(row, model, *self._at, base)
            self._space.refuse_infinite(row, *self._at)
            yield row

    def _unchecked_base(self) -> Tensor:
        if "base" not in self.__dict__:
            self.__dict__["base"] = self._space.read_base_unchecked(*self._at)
        return self.base

    @property
    def _at(self) -> tuple[str, int, int]:
        return self.name, self.start, self.stop

    def sampled_deltas(self, stride: int) -> Iterator[Tensor]:
        """Yield every ``stride``-th entry of τ_t, one model after another."""
        if self._deltas is not None:
            yield from self._deltas[:, ::stride]
        else:
            for model in self.models:
                yield self._space.sample_delta(model, self.name, self.start, self.stop, stride)

    @property
    def original(self) -> TensorView:
        """The piece as the models have it, before any transform."""
        return self if self._original is None else self._original

    def with_deltas(self, deltas: Tensor) -> TensorView:
        """Return the same piece with other task vectors ``(T, n)``."""
        view = TensorView(self._space, self.name, self.start, self.stop)
        if "base" in self.__dict__:
            view.__dict__["base"] = self.base
        view._deltas, view._original = deltas, self.original
        return view

    def with_merged(self, merged: Tensor) -> TensorView:
        """Return the same piece with what a method has made of it, ``(n,)``."""
        view = copy(self)
        view.merged = merged
        return view

    @property
    def has_base(self) -> bool:
        """Whether there is a base."""
        return self._space.base is not None

    def on(self, device: torch.device) -> TensorView:
        """Return the same piece with its tensors on ``device``; what is read passes the host."""
        return _ViewOnDevice(self, device)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the piece: whole rows where it holds some, else flat."""
        row = self.info.numel // self.info.shape[0] if self.info.shape and self.info.shape[0] else 0
        if self.stop - self.start == self.info.numel:
            return self.info.shape
        if row and self.start % row == 0 and self.stop % row == 0:
            return ((self.stop - self.start) // row, *self.info.shape[1:])
        return (self.stop - self.start,)

    def __repr__(self) -> str:
        return f"TensorView('{self.name}', {self.start}:{self.stop}, models={self.models})"


class _ViewOnDevice(TensorView):
    """A piece whose tensors are copied to a device when asked for."""

    def __init__(self, host: TensorView, device: torch.device) -> None:
        self.__dict__.update({key: value for key, value in host.__dict__.items() if key in _IDENTITY})
        self._host, self._device = host, device
        self.merged = None if host.merged is None else host.merged.to(device)

    @cached_property
    def base(self) -> Tensor:
        return self._host.base.to(self._device)

    @cached_property
    def finetuned(self) -> Tensor:
        return self._host.finetuned.to(self._device)

    @cached_property
    def deltas(self) -> Tensor:
        return self._host.deltas.to(self._device)

    def delta_rows(self) -> Iterator[Tensor]:
        yield from self.deltas

    @property
    def original(self) -> TensorView:
        return self if self._host.original is self._host else self._host.original.on(self._device)


_IDENTITY = ("name", "start", "stop", "info", "models", "_space")


def add_delta(base: Tensor, delta: Tensor) -> Tensor:
    """Return θ₀ + δ, and the base's own entry where δ is 0: adding +0 would turn a −0 of the base into +0."""
    # Taking away +0 leaves −0 as it is, and 0 − δ is +0 for a δ of either zero: no comparison, no choice.
    negated = torch.rsub(delta, 0.0)
    return torch.sub(base, negated, out=negated)


def block_sums(values: Tensor) -> list[float]:
    """Sum flat fp64 values over each grid block of 2¹⁶; ``math.fsum`` over blocks is then exact in any order."""
    array = values.numpy()
    whole = len(array) // GRID * GRID
    # numpy sums in one thread and a fixed order, so that the number of threads never changes a bit.
    sums = array[:whole].reshape(-1, GRID).sum(axis=1).tolist()
    return sums + ([float(array[whole:].sum())] if whole < len(array) else [])
