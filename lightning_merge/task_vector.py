"""One task vector, τ = θ − θ₀, as a rule that reads a piece of a tensor when asked (arXiv 2212.04089)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_merge.errors import UserError
from lightning_merge.tensor_view import add_delta, block_sums

if TYPE_CHECKING:
    from lightning_merge.task_vectors import TaskVectors

Read = Callable[[str, int, int], Tensor]  # (tensor name, start, stop) -> flat values


class TaskVector:
    """One task vector, lazily: supports ``+``, ``-``, ``*``, unary ``-``, ``dot``, ``norm`` and ``project_out``."""

    def __init__(self, space: TaskVectors, read: Read, finetuned: Read | None = None) -> None:
        self.space = space
        self.read = read
        # A model's own weights, exact where the difference would round.
        self.finetuned = finetuned

    def __add__(self, other: TaskVector) -> TaskVector:
        self._require_same_base(other)
        return TaskVector(self.space, lambda *at: self.read(*at) + other.read(*at))

    def __sub__(self, other: TaskVector) -> TaskVector:
        self._require_same_base(other)
        return TaskVector(self.space, lambda *at: self.read(*at) - other.read(*at))

    def __mul__(self, factor: float) -> TaskVector:
        return TaskVector(self.space, lambda *at: self.read(*at) * factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> TaskVector:
        return TaskVector(self.space, lambda *at: self.read(*at) / divisor)

    def __neg__(self) -> TaskVector:
        return self.negate()

    def negate(self) -> TaskVector:
        """Return −τ: added to the base, it removes what fine-tuning learned."""
        return TaskVector(self.space, lambda *at: -self.read(*at))

    def delta(self, name: str) -> Tensor:
        """Return τ of one tensor in its own shape and the computing dtype."""
        info = self.space.info(name)
        return self.read(name, 0, info.numel).reshape(info.shape)

    def dot(self, other: TaskVector) -> float:
        """Return ⟨τ, τ'⟩ over all tensors; fp64, independent of chunking. Cost: one pass over both."""
        self._require_same_base(other)
        return math.fsum(part for name in self.space.tensor_names for part in self._block_dots(other, name))

    def norm(self) -> float:
        """Return ‖τ‖₂ over all tensors."""
        return math.sqrt(self.dot(self))

    def cosine(self, other: TaskVector) -> float:
        """Return the cosine between two task vectors; 0 where one of them is 0."""
        scale = self.norm() * other.norm()
        return max(-1.0, min(1.0, self.dot(other) / scale)) if scale else 0.0

    def project_out(self, other: TaskVector) -> TaskVector:
        """Return what is left of τ, tensor by tensor, without its component along ``other`` (arXiv 2302.12480).

        Per tensor τ − (⟨τ', τ⟩ / ‖τ'‖²) τ'; a tensor in which τ' is 0 stays. Cost: one pass for the products.
        """
        self._require_same_base(other)
        shares: dict[str, float] = {}
        for name in self.space.tensor_names:
            square = math.fsum(other._block_dots(other, name))
            shares[name] = math.fsum(self._block_dots(other, name)) / square if square else 0.0
        return TaskVector(self.space, lambda name, *at: self.read(name, *at) - shares[name] * other.read(name, *at))

    def apply(self, scale: float = 1.0) -> dict[str, Tensor]:
        """Return the state dict θ₀ + scale · τ, in the base's dtypes; tied tensors stay one tensor.

        Averaged buffers (BatchNorm statistics) are the model's own, or the base's where algebra made τ.
        """
        space = self.space
        merged: dict[str, Tensor] = {}
        averaged, merges = set(space.averaged_names), set(space.tensor_names)
        for name, info in space.template.tensors.items():
            at = (name, 0, info.numel)
            if self.finetuned is not None and (name in averaged or (name in merges and scale == 1)):
                values = self.finetuned(*at)
            elif name in merges:
                values = add_delta(space.read_base(*at), scale * self.read(*at))
            else:
                values = space.template.read(name)
            merged[name] = values.to("cpu", info.dtype, copy=True).reshape(info.shape)
        return space.with_tied_names(merged)

    def _block_dots(self, other: TaskVector, name: str) -> Iterator[float]:
        for start, stop in self.space.chunks(name):
            mine = self.read(name, start, stop)
            theirs = mine if other is self else other.read(name, start, stop)
            yield from block_sums(mine.double() * theirs.double())

    def _require_same_base(self, other: TaskVector) -> None:
        if other.space.template is not self.space.template:
            raise UserError(
                f"Task vectors over different bases cannot be combined ('{self.space.template.label}' and "
                f"'{other.space.template.label}'). Expected both from one TaskVectors.open(base=...)."
            )
