"""Merges that go by inner products of the models: references on whole vectors, by the formulas."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from contract import SHAPES, Arrays, Row

from lightning_merge.methods import Karcher, ModelStock, MultiSlerp, NuSlerp, Slerp, WeightedAverage

Vectors = Sequence[np.ndarray]  # flat, one for each model
Merge = Callable[[Vectors], np.ndarray]


def over(merge: Merge, along: str, tensors: Vectors) -> np.ndarray:
    """Apply ``merge`` to tensors as vectors: whole, each row, each column, or each vector along the last axis."""
    shape = tensors[0].shape
    if not tensors[0].size:
        return tensors[0].copy()
    if along == "tensor" or len(shape) < 2:
        return merge([tensor.ravel() for tensor in tensors]).reshape(shape)
    rows = shape[0] if along in ("row", "column") else tensors[0].size // shape[-1]
    matrices = [tensor.reshape(rows, -1) for tensor in tensors]
    if along == "column":
        merged = np.stack([merge([m[:, i] for m in matrices]) for i in range(matrices[0].shape[1])], axis=1)
    else:
        merged = np.stack([merge([m[i] for m in matrices]) for i in range(rows)])
    return merged.reshape(shape)


def of_weights(merge: Merge, along: str = "tensor", from_base: bool = False) -> Callable:
    """Merge the models' weights, after the base's where that takes part."""

    def reference(base: Arrays, models: dict[str, Arrays]) -> Arrays:
        first = [base] if from_base else []
        return {name: over(merge, along, [s[name] for s in [*first, *models.values()]]) for name in SHAPES}

    return reference


def of_task_vectors(merge: Merge, along: str = "tensor") -> Callable:
    """Merge what the models changed."""

    def reference(base: Arrays, models: dict[str, Arrays]) -> Arrays:
        return {
            name: base[name] + over(merge, along, [s[name] - base[name] for s in models.values()]) for name in SHAPES
        }

    return reference


def angle(a: np.ndarray, b: np.ndarray) -> float:
    """Angle by its half's tangent: exact near 0 and near 180 degrees, where arccos is not."""
    u, v = a / np.linalg.norm(a), b / np.linalg.norm(b)
    return 2 * np.arctan2(np.linalg.norm(u - v), np.linalg.norm(u + v))


def slerp(t: float, line_above: float = 2.0, right_angle_with_zero: bool = False) -> Merge:
    def merge(vectors: Vectors) -> np.ndarray:
        a, b = vectors
        if not a.any() or not b.any():
            if right_angle_with_zero:
                return np.cos(t * np.pi / 2) * a + np.sin(t * np.pi / 2) * b
            return (1 - t) * a + t * b
        theta = angle(a, b)
        # A single number, or equal directions: no arc, whatever rounding says of the angle.
        if min(theta, np.pi - theta) < 1e-7 or abs(np.cos(theta)) > line_above:
            return (1 - t) * a + t * b
        return (np.sin((1 - t) * theta) * a + np.sin(t * theta) * b) / np.sin(theta)

    return merge


def multislerp(weights: Sequence[float], normalize: bool = True) -> Merge:
    """By tangent vectors and the exponential map, as mergekit describes it."""

    def merge(vectors: Vectors) -> np.ndarray:
        w = np.array(weights) / (sum(weights) if normalize else 1)
        norms = np.array([np.linalg.norm(x) for x in vectors])
        units = [x / n if n else x for x, n in zip(vectors, norms, strict=True)]
        mean = sum(wt * u for wt, u in zip(w, units, strict=True))
        if np.linalg.norm(mean) < 1e-7 * abs(w).sum():
            return sum(wt * x for wt, x in zip(w, vectors, strict=True))
        mean = mean / np.linalg.norm(mean)
        tangent = sum(wt * (u - (u @ mean) * mean) for wt, u in zip(w, units, strict=True))
        length = np.linalg.norm(tangent)
        point = np.cos(length) * mean + (np.sin(length) / length * tangent if length else 0)
        return point * (w @ norms)

    return merge


def karcher(weights: Sequence[float], iterations: int, tolerance: float) -> Merge:
    def merge(vectors: Vectors) -> np.ndarray:
        kept = [(w, x) for w, x in zip(weights, vectors, strict=True) if w and x.any()]
        if not kept:
            return np.zeros_like(vectors[0])
        w = np.array([w for w, _ in kept]) / sum(w for w, _ in kept)
        units = [x / np.linalg.norm(x) for _, x in kept]
        straight = sum(wt * x for wt, (_, x) in zip(w, kept, strict=True))
        mean = sum(wt * u for wt, u in zip(w, units, strict=True))
        if np.linalg.norm(mean) < 1e-7:
            return straight
        mean = mean / np.linalg.norm(mean)
        for _ in range(iterations):
            thetas = [angle(mean, u) for u in units]
            if max(thetas) > np.pi - 1e-7:
                return straight
            tangent = np.zeros_like(mean)
            for wt, u, theta in zip(w, units, thetas, strict=True):
                side = u - (u @ mean) * mean
                if theta > 1e-9:
                    tangent += wt * theta / np.sin(theta) * side
            length = np.linalg.norm(tangent)
            if length < tolerance:
                break
            mean = np.cos(length) * mean + np.sin(length) / length * tangent
            mean /= np.linalg.norm(mean)
        return mean * sum(wt * np.linalg.norm(x) for wt, (_, x) in zip(w, kept, strict=True))

    return merge


def stock(clamp: bool = True, floor: float = 0.0) -> Merge:
    def merge(vectors: Vectors) -> np.ndarray:
        found = []
        for i, a in enumerate(vectors):
            for b in vectors[:i]:
                product = max(np.linalg.norm(a) * np.linalg.norm(b), floor)
                found.append(a @ b / product if product else 0.0)
        count, cosine = len(vectors), np.clip(np.mean(found), -1, 1)
        below = 1 + (count - 1) * cosine
        t = count * cosine / below if abs(below) > 1e-7 else 0.0
        if clamp:
            t = min(max(t, 0.0), 1.0)
        return t * sum(vectors) / count

    return merge


def average(weights: Sequence[float]) -> Merge:
    def merge(vectors: Vectors) -> np.ndarray:
        return sum(w * x for w, x in zip(weights, vectors, strict=True)) / sum(weights)

    return merge


UNEVEN = {"a": 1.0, "b": 0.25, "c": 2.0}
TWO = {"a": 0.25, "c": 1.0}  # the models of a row with count=2
THEIRS = {"compat": "mergekit"}

ROWS = [
    Row(
        Slerp, of_weights(slerp(0.5), from_base=True), count=1, tolerance=2, copies={"t": 1.0}, alone={"t": 1.0},
        to_base={"t": 0.0},
    ),
    Row(
        Slerp, of_weights(slerp(0.3, 0.9995, True), from_base=True), {"t": 0.3, **THEIRS}, label="mergekit", count=1,
        tolerance=2, copies={"t": 1.0, **THEIRS}, alone={"t": 1.0, **THEIRS}, to_base={"t": 0.0, **THEIRS},
    ),
    Row(NuSlerp, of_task_vectors(slerp(0.5)), count=2, tolerance=2, base_changes=True, copies={}),
    Row(
        NuSlerp, of_task_vectors(slerp(0.8), "row"), {"weights": TWO, "along": "row"}, label="row", count=2,
        tolerance=4, base_changes=True, copies={"along": "row"}, copies_exact=False,
    ),
    Row(
        # Among 43,890 columns of three entries some are nearly opposite: there 1 / sin θ multiplies rounding.
        NuSlerp, of_task_vectors(slerp(0.5), "column"), {"along": "column"}, label="column", count=2, tolerance=1000,
        base_changes=True, copies={"along": "column"}, copies_exact=False,
    ),
    Row(
        NuSlerp, of_task_vectors(slerp(0.5, right_angle_with_zero=True), "last"), {"along": "row", **THEIRS},
        label="mergekit", count=2, tolerance=64, base_changes=True, copies={"along": "row", **THEIRS},
        copies_exact=False,
    ),
    Row(
        MultiSlerp, of_task_vectors(multislerp([1, 1, 1])), three_only=True, tolerance=4, base_changes=True, copies={},
        alone={},
    ),
    Row(
        MultiSlerp, of_task_vectors(multislerp([1, 0.25, 2], normalize=False)), {"weights": UNEVEN, "normalize": False},
        label="not-normalized", tolerance=8, base_changes=True, alone={"weights": 1.0, "normalize": False},
    ),
    Row(Karcher, of_weights(karcher([1, 1, 1], 10, 1e-5)), three_only=True, tolerance=2, copies={}, alone={}),
    Row(
        Karcher, of_weights(karcher([1, 0.25, 2], 100, 1e-12)),
        {"weights": UNEVEN, "max_iterations": 100, "tolerance": 1e-12}, label="by-name", tolerance=2,
        copies={"weights": UNEVEN}, alone={"weights": {"c": 0.7}},
    ),
    Row(
        Karcher, of_weights(karcher([1, 1, 1], 10, 1e-5)), THEIRS, label="mergekit", three_only=True, tolerance=2,
        copies=THEIRS, alone=THEIRS,
    ),
    Row(ModelStock, of_task_vectors(stock()), tolerance=2, copies={}),
    Row(
        ModelStock, of_task_vectors(stock(clamp=False)), {"clamp": False}, label="unclamped", tolerance=8, count=2,
        copies={"clamp": False},
    ),
    Row(
        ModelStock, of_task_vectors(stock(), "row"), {"per_row": True}, label="row", tolerance=4,
        copies={"per_row": True}, copies_exact=False,
    ),
    Row(
        ModelStock, of_task_vectors(stock(False, 1e-6), "last"), {"per_row": True, **THEIRS}, label="mergekit-row",
        tolerance=8, count=2,
    ),
    Row(
        WeightedAverage, of_weights(average([1, 0.25, 2])), {"weights": UNEVEN, **THEIRS}, label="mergekit",
        tolerance=2, copies={"weights": UNEVEN, **THEIRS}, copies_exact=False, alone={"weights": 1.0, **THEIRS},
    ),
]  # fmt: skip
