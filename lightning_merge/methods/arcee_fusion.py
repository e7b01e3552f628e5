"""Arcee Fusion: take over the entries of one model that matter unusually much; mergekit's ``arcee_fusion``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_merge.methods.base import Context, Header, Partial, TensorMerge
from lightning_merge.methods.magmax import mask_for, put_where
from lightning_merge.methods.top_k import LargestEntries
from lightning_merge.tensor_view import GRID, TensorView


def softmax_moments(finetuned: Tensor, delta: Tensor) -> np.ndarray:
    """Return what each row's KL(softmax θ ‖ softmax θ₀) is made of; fp64 ``(R, n)`` twice, to ``(R, 4)``.

    With p = softmax θ, μ = Σ p τ and u = τ − μ, the divergence is log(1 + Σ p (e⁻ᵘ − 1 + u)): no difference of large
    numbers, so that it is exact for changes of any size. The columns are the largest θ, Σ e^(θ − largest), μ and the
    sum inside the logarithm.
    """
    largest = finetuned.amax(1, keepdim=True)
    weight = torch.exp(finetuned - largest)
    # numpy sums each row by itself and in a fixed order, however many rows a piece holds.
    mass = weight.numpy().sum(1)
    mean = (weight * delta).numpy().sum(1) / mass
    u = delta - torch.from_numpy(mean)[:, None]
    excess = (weight * (torch.expm1(-u) + u)).numpy().sum(1) / mass
    return np.stack([largest[:, 0].numpy(), mass, mean, excess], axis=1)


def joined(parts: np.ndarray) -> float:
    """Return the KL divergence of one row from the moments of its parts ``(P, 4)``."""
    largest, mass, mean, excess = parts.T
    share = mass * np.exp(largest - largest.max())
    share /= share.sum()
    v = mean - (share * mean).sum()
    return float(np.log1p((share * (np.expm1(-v) + v + excess * np.exp(-v))).sum()))


class ScoreView:
    """A piece with scores ``(S, n)`` in the place of task vectors, so that they can be ranked."""

    def __init__(self, view: TensorView, scores: Tensor) -> None:
        self.name, self.start, self.stop, self.info = view.name, view.start, view.stop, view.info
        self.deltas = scores

    def delta_rows(self) -> Iterator[Tensor]:
        """Yield one row of scores after another."""
        yield from self.deltas

    def sampled_deltas(self, stride: int) -> Iterator[Tensor]:
        """Yield every ``stride``-th score of each row."""
        yield from self.deltas[:, ::stride]


def thresholds(largest: LargestEntries) -> list[list[float]] | None:
    """Return for each row the magnitudes at the wanted ranks, as fp32 has them, or ``None`` before all are known."""
    cuts = [cuts for group in largest.groups.values() for cuts in group.cuts]
    if not cuts or any(cut.bits is None for row in cuts for cut in row):
        return None
    return [[float(np.int32(cut.bits or 0).view(np.float32)) for cut in row] for row in cuts]


@dataclass
class _Importance(Context):
    """Each row's divergence by piece, then the quartiles of the scores, then the threshold."""

    divergences: dict[int, np.ndarray] = field(default_factory=dict)  # first flat index -> (R,), or (1,) for all
    largest: LargestEntries | None = None
    threshold: float = 0.0


@dataclass(frozen=True)
class ArceeFusion(TensorMerge):
    """Take the one model's entries whose importance stands out, and leave the base's elsewhere.

    Importance is |τ| · KL(softmax θ ‖ softmax θ₀), the divergence taken along the last axis; an entry is taken, bit for
    bit, where it reaches the median + 1.5 · the interquartile range of its tensor. Quartiles are the exact entries at
    ⌊q (n − 1)⌋ in ascending order, ranked in fp32; mergekit samples a million entries of larger tensors, computes in
    the stored dtype and adds 1e-8 to the probabilities.

    Cost: two passes over the base and the model for divergences and a sample, one to rank and one to apply; fp64
        exponentials of every entry in the first.
    Reference: mergekit's ``arcee_fusion``; there is no paper.

    Example:
        >>> import torch
        >>> from lightning_merge import TaskVectors
        >>> base = {"weight": torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]])}
        >>> model = {"weight": torch.tensor([[1.5, 2.0, 3.25, 3.0], [1.0, 2.0, 3.0, 4.25]])}
        >>> ArceeFusion()(TaskVectors.open(base, {"model": model}))["weight"]
        tensor([[1.5000, 2.0000, 3.0000, 3.0000],
                [1.0000, 2.0000, 3.0000, 4.0000]])
    """

    paper: ClassVar[str] = "no paper; mergekit's arcee_fusion"
    max_models: ClassVar[int | None] = 1

    @property
    def measuring_passes(self) -> float:
        """The magnitudes, then the quartiles of the scores."""
        return 4.0

    @property
    def layout(self) -> Literal["pieces", "rows", "tensor"]:
        """Whole rows, over which the softmax goes."""
        return "rows"

    def begin(self, header: Header) -> Context:
        """Ask for the divergences, then for the quartiles."""

        def quartiles(count: int) -> list[int]:
            # The i-th in ascending order is the (count − i)-th largest.
            return [count - part * max(count - 1, 0) // 4 for part in (1, 2, 3)]

        return _Importance(complete=False, largest=LargestEntries(tensors=header.tensors, ranks=quartiles))

    def measure(self, view: TensorView, context: _Importance) -> Partial:
        """Measure the rows' divergences, then rank the scores."""
        assert context.largest is not None
        if context.divergences:
            return context.largest.measure(ScoreView(view, _scores(view, context)[None]))  # type: ignore[arg-type]
        finetuned, delta = view.finetuned[0].double(), view.deltas[0].double()
        if len(view.info.shape) > 1:
            row = view.info.shape[-1]
            moments = softmax_moments(finetuned.reshape(-1, row), delta.reshape(-1, row))
            return {view.start: bytearray(np.log1p(moments[:, 3]).tobytes())}
        # A vector is one row, which may come in several pieces: its parts are the grid's blocks.
        blocks = zip(finetuned.split(GRID), delta.split(GRID), strict=True)
        moments = np.concatenate([softmax_moments(theta[None], tau[None]) for theta, tau in blocks])
        return {("vector", view.start): bytearray(moments.tobytes())}

    def conclude(self, partial: Partial, context: _Importance) -> Context:
        """Keep the divergences, then narrow the quartiles, then set the threshold."""
        assert context.largest is not None
        if not partial:
            return _Importance()
        if not context.divergences:
            context.divergences = _divergences(partial)
            return context
        context.largest.conclude(partial)
        found = thresholds(context.largest)
        if found is None:
            return context
        ((first, median, third),) = found
        return _Importance(divergences=context.divergences, threshold=median + 1.5 * (third - first))

    def apply(self, view: TensorView, context: _Importance) -> Tensor:
        """Return the model's entries where the score reaches the threshold, else the base's."""
        # The threshold is rounded as the scores are, so that equal quartiles are reached.
        scores, finetuned = _scores(view, context), view.finetuned[0]
        return put_where(view.base.clone(), finetuned, torch.ge(scores, context.threshold, out=mask_for(finetuned)))


def _divergences(partial: Partial) -> dict[int, np.ndarray]:
    """Return the divergences by piece, in units of the largest: only their ratios matter, and none underflows."""
    measured = {key: np.frombuffer(values) for key, values in partial.items()}
    if any(isinstance(key, tuple) for key in measured):
        parts = np.concatenate([measured[key].reshape(-1, 4) for key in sorted(measured)])  # type: ignore[type-var]
        measured = {0: np.array([joined(parts)])}
    most = max(float(values.max()) for values in measured.values())
    return {start: values / most if most > 0 else values for start, values in measured.items()}  # type: ignore[misc]


def _scores(view: TensorView, context: _Importance) -> Tensor:
    """Return |τ| · KL of each entry of a piece, in fp32."""
    divergence = torch.from_numpy(context.divergences[view.start if view.start in context.divergences else 0])
    rows: Any = view.deltas[0].abs().double().reshape(len(divergence), -1)
    return (rows * divergence[:, None]).to(torch.float32).reshape(-1)
