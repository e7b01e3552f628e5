"""Learned scalars that are finer than one for each task and tensor: one for each component of a task vector.

A task vector of a tensor is taken apart, τ = Σ_i D_i; the merge is θ₀ + Σ λ_t Σ_i f_{t,i} D_{t,i}, where λ are ordinary
coefficients and every factor f is learned. What a component is, subclasses say: a singular direction, an output row.
"""

from __future__ import annotations

import json
import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_merge.coefficients import Coefficients
from lightning_merge.directions import Directions, TaskDirections
from lightning_merge.errors import UserError
from lightning_merge.methods.matrices import matrix_shape
from lightning_merge.task_vectors import TaskVectors

Own = TypeVar("Own", bound="Components")


class Components(nn.Module, ABC):
    """λ times a factor for each component, in place of :class:`lightning_merge.coefficients.Coefficients`.

    Biases, norms and what ``whole`` names have no components: λ alone multiplies them.

    Args:
        models: The models, in the order of the task vectors (sorted names).
        shapes: The tensors that are merged, with their shapes.
        coefficients: λ; by default one for each model and tensor, from ``initial``.
        initial: Where λ starts: a number, one for each model, or a file that :meth:`save` wrote.
        learn_coefficients: Learn λ too; otherwise only the factors.
        whole: Patterns of matrices that are not taken apart (of an embedding, for example).
        prior: Strength of ½ · prior · Σ (s − s₀)², added to what is minimised, s what factors are made of.

    Raises:
        UserError: Nothing has components, coefficients of other models or tensors, a setting out of range.
    """

    needs_whole_tensors = True
    _of: Tensor
    _at: Tensor
    _first: Tensor
    _initial: Tensor

    def __init__(
        self,
        models: Sequence[str],
        shapes: Mapping[str, Sequence[int]],
        coefficients: Coefficients | None,
        initial: float | Mapping[str, float] | str | os.PathLike[str],
        learn_coefficients: bool,
        whole: Sequence[str],
        prior: float,
    ) -> None:
        super().__init__()
        if not (math.isfinite(prior) and prior >= 0):
            raise UserError(f"A prior must be at least 0, got {prior}.")
        if isinstance(whole, str):
            raise UserError(f"'whole' is a list of patterns, got '{whole}'. Expected ['{whole}'].")
        for pattern in whole:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(
                    f"The pattern '{pattern}' of matrices to leave whole is no regular expression ({error}). "
                    "Expected one such as 'embeddings'."
                ) from error
        self.models, self.tensor_names = tuple(models), tuple(shapes)
        self.prior, self.learn_coefficients = float(prior), learn_coefficients
        self.coefficients = coefficients or Coefficients(models, self.tensor_names, initial=initial)
        if self.coefficients.models != self.models or set(self.coefficients.tensor_names) != set(self.tensor_names):
            raise UserError(f"The coefficients given to {type(self).__name__} are of other models or tensors.")
        self.coefficients.requires_grad_(learn_coefficients)
        # How many components one model's task vector has in each tensor; 0 where only λ multiplies it.
        self.counts: dict[str, int] = {}
        self._spans: dict[str, slice] = {}
        of: list[Tensor] = []
        at: list[Tensor] = []
        start: list[Tensor] = []
        place, tasks = 0, len(self.models)
        for name, shape in shapes.items():
            apart = not any(re.search(pattern, name) for pattern in whole)
            found = matrix_shape(tuple(shape)) if apart else None
            count = self.count(*found) if found else 0
            self.counts[name] = count
            own = self.coefficients.span(name)
            of.append(torch.arange(own.start, own.stop).repeat_interleave(count or 1))
            if count:
                at.append(torch.arange(place, place + tasks * count))
                start.append(self.start(count).repeat(tasks))
            self._spans[name] = slice(place, place + tasks * (count or 1))
            place += tasks * (count or 1)
        if not at:
            raise UserError(
                f"None of {len(self.tensor_names)} tensors is a matrix that {type(self).__name__} take apart."
            )
        self.raw = nn.Parameter(torch.cat(start))
        # Which λ multiplies each scalar, and which scalars have a factor.
        self.register_buffer("_of", torch.cat(of), persistent=False)
        self.register_buffer("_at", torch.cat(at), persistent=False)
        self.register_buffer("_first", self.raw.detach().clone(), persistent=False)
        self.register_buffer("_initial", self().detach().clone(), persistent=False)

    @classmethod
    def of(cls: type[Own], task_vectors: TaskVectors, **settings: Any) -> Own:
        """Make the scalars of task vectors, with the settings of the class."""
        names = task_vectors.tensor_names
        return cls(task_vectors.names, {name: task_vectors.shape(name) for name in names}, **settings)

    # --- what subclasses say ----------------------------------------------------------------------------------------

    @abstractmethod
    def count(self, rows: int, columns: int) -> int:
        """How many components one model's task vector of a matrix has."""

    @abstractmethod
    def start(self, count: int) -> Tensor:
        """What the factors of so many components are made of at the start, ``(count,)``."""

    @abstractmethod
    def take_apart(self, matrices: Tensor, count: int, rows: slice) -> Directions:
        """Return the directions of T whole matrices ``(T, m, n)``, for the rows that this process holds."""

    def link(self, raw: Tensor) -> Tensor:
        """From what is learned to the factors."""
        return raw

    # --- what MergedWeights asks ------------------------------------------------------------------------------------

    def forward(self) -> Tensor:
        """Return λ · f for every tensor, model and component, flat, fp32."""
        values = self.coefficients()
        # Whoever trains may ask all parameters for gradients.
        values = (values if self.learn_coefficients else values.detach())[self._of]
        return values * torch.ones_like(values).index_copy(0, self._at, self.link(self.raw))

    def span(self, tensor: str) -> slice:
        """Where the scalars of one tensor stand in what :meth:`forward` gives: T times its components."""
        return self._spans[tensor]

    def tie(self, tensor: str, owner: str) -> None:
        """Give a tensor the scalars of another: the two are one parameter of the live module."""
        self.coefficients.tie(tensor, owner)
        self._spans[tensor] = self._spans[owner]

    def decompose(self, tensor: str, deltas: Tensor, rows: slice | None = None) -> Directions:
        """Return the directions that the scalars of a tensor multiply.

        Args:
            tensor: Its name.
            deltas: ``(T, *shape)``, the whole task vectors of the tensor.
            rows: The rows that this process holds; all by default.

        Raises:
            UserError: A task vector is not finite.
        """
        count, tasks = self.counts[tensor], len(deltas)
        if not count:
            mine = deltas if rows is None or deltas.dim() == 1 else deltas[:, rows]  # a scalar has no rows
            return TaskDirections(mine.reshape(tasks, math.prod(mine.shape[1:])))
        if not bool(deltas.isfinite().all()):
            raise UserError(
                f"The task vectors of tensor '{tensor}' hold NaN or infinity, which cannot be decomposed. "
                "Expected finite weights; leave a tensor out with ignore."
            )
        size = deltas.shape[1]
        return self.take_apart(deltas.reshape(tasks, size, -1), count, slice(0, size) if rows is None else rows)

    # --- for people -------------------------------------------------------------------------------------------------

    def table(self) -> dict[str, dict[str, float]]:
        """Return by model and tensor the mean of λ · f over the components."""
        values = self().detach().cpu()
        tasks = len(self.models)
        means = {name: values[self.span(name)].reshape(tasks, -1).mean(dim=1).tolist() for name in self.tensor_names}
        return {model: {name: means[name][row] for name in means} for row, model in enumerate(self.models)}

    def drift(self) -> float:
        """Return the root mean square by which λ · f have moved."""
        return (self().detach() - self._initial).square().mean().sqrt().item()

    def penalty(self) -> Tensor:
        """Return the prior's ½ Σ prior · (s − s₀)², with that of the coefficients; a scalar."""
        own = 0.5 * self.prior * (self.raw - self._first).square().sum() if self.prior else self.raw.new_zeros(())
        return own + self.coefficients.penalty()

    def save(self, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
        """Write λ by model and group, and what factors are made of, to a small safetensors file."""
        from lightning_merge.weights import save_safetensors

        described = {**self._described(), "groups": self.coefficients.groups}
        save_safetensors(
            {
                "coefficients": self.coefficients.by_group().detach().cpu().contiguous(),
                "components": self.raw.detach().cpu().contiguous(),
            },
            Path(path),
            {key: json.dumps(value) for key, value in described.items()} | dict(metadata or {}),
        )

    def load(self, path: str | os.PathLike[str]) -> None:
        """Go on from a file that :meth:`save` wrote; it becomes the start, from which :meth:`drift` counts.

        Raises:
            UserError: The file is of other models, groups, tensors or components.
        """
        from lightning_merge.weights import open_weights

        source = open_weights(Path(path))
        described = {key: source.metadata.get(key) for key in self._described()}
        if described != {key: json.dumps(value) for key, value in self._described().items()}:
            raise UserError(
                f"'{path}' holds no {type(self).__name__} of these models and tensors with these settings. "
                "Expected a file that such an adaptation wrote."
            )
        own = self.coefficients
        found = Coefficients(own.models, own.tensor_names, own.by, Path(path), own.constraint)
        with torch.no_grad():
            own.raw.copy_(found.raw)
            self.raw.copy_(source.read("components"))
            self._first.copy_(self.raw)
            self._initial.copy_(self())

    def _described(self) -> dict[str, Any]:
        """What a file must agree in, for its scores to belong here."""
        return {"kind": type(self).__name__, "models": self.models, "components": self.counts}
