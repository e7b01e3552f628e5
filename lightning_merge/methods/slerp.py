"""Spherical linear interpolation between two models (Shoemake, 1985, Animating rotation with quaternion curves).

No paper proposes it for weights; it is the custom of model merging, and its form here is that of mergekit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_merge.methods.base import PerTensor, hyperparameter, per_model
from lightning_merge.methods.gram import OPPOSITE, Array, GramMerge, cosines, norms
from lightning_merge.tensor_view import TensorView


def arc(cosine: Array, t: float, linear: Array) -> Array:
    """Return the coefficients of two vectors at t of the arc between them, ``(R,)`` to ``(2, R)``.

    sin((1 − t) θ) / sin θ and sin(t θ) / sin θ; 1 − t and t where ``linear`` holds, and where θ is 0.
    """
    angle = np.arccos(cosine)
    linear = linear | (angle == 0)
    angle = np.where(linear, np.pi / 2, angle)
    ends = np.stack([np.sin((1 - t) * angle), np.sin(t * angle)]) / np.sin(angle)
    return np.where(linear, np.array([[1 - t], [t]]), ends)


def slerp(gram: Array, t: float) -> Array:
    """Return the coefficients ``(2, R)`` of slerp from inner products ``(2, 2, R)``.

    They go with the vectors themselves, so that the norms of the ends blend as the directions do. Where a vector is 0,
    or the two are opposite, there is no arc: linear.
    """
    cosine = cosines(gram)[0, 1]
    return arc(cosine, t, (norms(gram) == 0).any(axis=0) | (cosine < OPPOSITE - 1))


@dataclass(frozen=True)
class Slerp(GramMerge):
    """Interpolate between the base and one model along the arc between them, tensor by tensor.

    With θ the angle between the two flattened tensors: sin((1 − t)θ)/sin θ · θ₀ + sin(tθ)/sin θ · θ₁. Parallel,
    opposite and zero tensors are interpolated linearly. mergekit also takes the line where |cos θ| > 0.9995 and treats
    norms up to 1e-8 as 1 (``compat="mergekit"``).

    Args:
        t: Where between the base (0) and the model (1), in [0, 1]; 0.5 by default.
        compat: ``paper``, or ``mergekit`` for its thresholds.

    Cost: one pass over the base and the model for the angles, one to combine.
    Reference: Shoemake, 1985, Animating rotation with quaternion curves, SIGGRAPH, section 3.3.

    Example:
        >>> import torch
        >>> from lightning_merge import TaskVectors
        >>> base = {"weight": torch.tensor([1.0, 0.0])}
        >>> model = {"weight": torch.tensor([0.0, 2.0])}
        >>> Slerp(t=0.5)(TaskVectors.open(base, {"a": model}, check=False))["weight"]
        tensor([0.7071, 1.4142])
    """

    t: PerTensor = hyperparameter(0.5, "[0, 1]")
    compat: Literal["paper", "mergekit"] = "paper"

    paper: ClassVar[str] = "Animating rotation with quaternion curves (Shoemake, 1985), SIGGRAPH 19(3)"
    max_models: ClassVar[int | None] = 1

    def vectors(self, view: TensorView) -> Sequence[Tensor]:
        """Return θ₀ and θ₁."""
        return [view.base, view.finetuned[0]]

    def coefficients(self, gram: Array, models: Sequence[str]) -> Array:
        """Return the share of each end."""
        (t,) = per_model("Slerp: t", self.t, models)
        if self.compat == "paper":
            return slerp(gram, t)
        lengths = norms(gram)
        lengths = np.where(lengths > 1e-8, lengths, 1.0)
        cosine = np.clip(gram[0, 1] / (lengths[0] * lengths[1]), -1, 1)
        return arc(cosine, t, np.abs(cosine) > 0.9995)

    def _combined(self, view: TensorView, coefficients: Sequence[float]) -> Tensor:
        merged = super()._combined(view, coefficients)
        first, second = coefficients
        if not first or not second or abs(first + second - 1) > 1e-12:
            return merged
        # On a line, entries that agree stay as they are.
        base, model = self.vectors(view)
        return torch.where(base == model, base, merged)
