"""Coefficients as fine as they are cheap: one for each task, tensor and output row.

No paper of its own; between AdaMerging's coefficient for each tensor (arXiv 2310.02575) and a mask for each entry. A
row of a matrix feeds one output unit, so a task may claim units instead of layers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_merge.coefficients import Coefficients
from lightning_merge.components import Components
from lightning_merge.directions import Directions


class RowDirections(Directions):
    """The rows of T matrices: D_{t,i} is row i of τ_t, and 0 elsewhere.

    Args:
        deltas: ``(T, m, n)``, the rows that this process holds, in the dtype and on the device where they are kept.
        rows: Where they stand among all.
        height: How many rows the whole matrix has.

    Cost: memory is that of the task vectors, time one pass over them; each call holds one of them in fp32.
    """

    def __init__(self, deltas: Tensor, rows: slice, height: int) -> None:
        self.deltas, self.rows, self.height = deltas, rows, height
        self.count = len(deltas) * height
        self.nbytes = deltas.numel() * deltas.element_size()

    def add_to(self, out: Tensor, values: Tensor) -> None:
        """Add every task's rows, each times its value."""
        matrix = out.view(self.deltas.shape[1:])
        for delta, mine in zip(self.deltas, values.view(-1, self.height)[:, self.rows], strict=True):
            matrix.addcmul_(delta.to(out.device, out.dtype), mine[:, None].to(out.dtype))

    def contract(self, gradient: Tensor) -> Tensor:
        """Return the inner products row by row; 0 for rows of other processes."""
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        matrix = gradient.to(dtype).view(self.deltas.shape[1:])
        found = torch.zeros(len(self.deltas), self.height, dtype=torch.float64, device=gradient.device)
        for row, delta in zip(found, self.deltas, strict=True):
            row[self.rows] = (delta.to(gradient.device, dtype) * matrix).sum(dim=1)
        return found.view(-1)


class RowCoefficients(Components):
    """λ times a free factor for each output row of each task's matrices, from 1.

    Args:
        models: The models, in the order of the task vectors (sorted names).
        shapes: The tensors that are merged, with their shapes; :meth:`of` takes both from task vectors.
        coefficients: λ; by default one for each model and tensor, from ``initial``.
        initial: Where λ starts: a number, one for each model, or a file that :meth:`save` wrote.
        learn_coefficients: Learn λ too; otherwise only the factors.
        whole: Patterns of matrices that are not taken apart; of an embedding, for example, whose rows are words.
        prior: Strength of ½ · prior · Σ (f − 1)², added to what is minimised.

    Raises:
        UserError: No tensor is a matrix, coefficients of other models or tensors, a setting out of range.

    Cost: memory and time as for coefficients, see :class:`RowDirections`.
    """

    def __init__(
        self,
        models: Sequence[str],
        shapes: Mapping[str, Sequence[int]],
        coefficients: Coefficients | None = None,
        initial: float | Mapping[str, float] | str | os.PathLike[str] = 0.3,
        learn_coefficients: bool = True,
        whole: Sequence[str] = (),
        prior: float = 0.0,
    ) -> None:
        super().__init__(models, shapes, coefficients, initial, learn_coefficients, whole, prior)

    def count(self, rows: int, columns: int) -> int:
        """Return how many rows there are."""
        return rows

    def start(self, count: int) -> Tensor:
        """Begin where coefficients alone would."""
        return torch.ones(count)

    def take_apart(self, matrices: Tensor, count: int, rows: slice) -> Directions:
        """Keep this process's rows."""
        return RowDirections(matrices[:, rows].contiguous(), rows, count)
