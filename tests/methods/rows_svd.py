"""Rows of the merges by singular value decomposition, with references from the papers' formulas in numpy."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from contract import SHAPES, Arrays, Row

from lightning_merge.methods import IsoC, IsoCts, SimpleAverage, Svc, TaskArithmetic, TsvM, Wudi

Matrices = list[np.ndarray]

# Written by hand, so that the rule that finds matrices is checked too.
MATRICES = {
    "embed.weight": SHAPES["embed.weight"],
    "block.0.weight": (7, 5),
    "block.1.weight": (4, 6),
    "block.2.weight": (40, 3),
    "conv.weight": (4, 12),
}


def by_matrix(
    merge: Callable[[Matrices], np.ndarray], scale: float = 1.0, skipped: tuple[str, ...] = ()
) -> Callable[[Arrays, dict[str, Arrays]], Arrays]:
    """Merge the task vectors of every matrix by ``merge``; the mean for everything else."""

    def reference(base: Arrays, models: dict[str, Arrays]) -> Arrays:
        merged = {}
        for name in SHAPES:
            taus = [state[name] - base[name] for state in models.values()]
            if name in MATRICES and name not in skipped:
                delta = merge([tau.reshape(MATRICES[name]) for tau in taus]).reshape(SHAPES[name])
            else:
                delta = sum(taus) / len(taus)
            merged[name] = base[name] + scale * delta
        return merged

    return reference


def nearest_orthonormal(x: np.ndarray) -> np.ndarray:
    """X (XᵀX)^(-1/2) by way of the smaller of the two Gram matrices, of full rank here."""
    wide = x.shape[1] > x.shape[0]
    values, vectors = np.linalg.eigh(x @ x.T if wide else x.T @ x)
    root = (vectors / np.sqrt(values)) @ vectors.T
    return root @ x if wide else x @ root


def tsv_m(taus: Matrices) -> np.ndarray:
    left, right, middle = [], [], []
    for tau in taus:
        u, s, vh = np.linalg.svd(tau, full_matrices=False)
        for index in range(len(s) // len(taus)):
            left.append(u[:, index])
            right.append(vh[index])
            middle.append(s[index])
    u, v = (nearest_orthonormal(np.stack(columns, axis=1)) for columns in (left, right))
    return u @ np.diag(middle) @ v.T


def iso_c(taus: Matrices) -> np.ndarray:
    total = np.sum(taus, axis=0)
    return np.linalg.norm(total, "nuc") / min(total.shape) * nearest_orthonormal(total)


def iso_cts(fraction: float) -> Callable[[Matrices], np.ndarray]:
    def reference(taus: Matrices) -> np.ndarray:
        u, s, vh = np.linalg.svd(np.sum(taus, axis=0), full_matrices=False)
        r, t = len(s), len(taus)
        each = min(round((r - math.floor(fraction * r + 1e-9)) / t), r // t)
        k = r - t * each
        left, right, middle = [u[:, :k]], [vh[:k]], list(s[:k])
        for tau in taus:
            own_u, own_s, own_vh = np.linalg.svd((np.eye(len(u)) - u[:, :k] @ u[:, :k].T) @ tau, full_matrices=False)
            left.append(own_u[:, :each])
            right.append(own_vh[:each])
            middle += list(own_s[:each])
        return (
            np.mean(middle)
            * nearest_orthonormal(np.concatenate(left, axis=1))
            @ nearest_orthonormal(np.concatenate(right, axis=0))
        )

    return reference


def wudi_closed(taus: Matrices) -> np.ndarray:
    """Least squares S τᵀ = [(τ_t / ‖τ_t‖) τ_tᵀ], of least norm."""
    rows = np.concatenate([tau / np.linalg.norm(tau) for tau in taus])
    wanted = np.concatenate([tau @ tau.T / np.linalg.norm(tau) for tau in taus])
    return np.linalg.lstsq(rows, wanted, rcond=None)[0].T


def wudi_adam(iterations: int, learning_rate: float) -> Callable[[Matrices], np.ndarray]:
    def reference(taus: Matrices) -> np.ndarray:
        x = np.sum(taus, axis=0)
        m, v = np.zeros_like(x), np.zeros_like(x)
        for step in range(1, iterations + 1):
            g = sum(2 * (x - tau) @ tau.T @ tau / np.square(tau).sum() for tau in taus)
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            x = x - learning_rate * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
        return x

    return reference


def svc(
    combine: Callable[[Matrices], np.ndarray], alpha: float, others: Callable[[Matrices], np.ndarray] | None = None
) -> Callable[[Arrays, dict[str, Arrays]], Arrays]:
    """Calibrate what ``combine`` makes of matrices; everything else stays what the method makes of it."""
    others = others or combine

    def calibrated(taus: Matrices) -> np.ndarray:
        merged = combine(taus)
        u, s, vh = np.linalg.svd(merged, full_matrices=False)
        gamma = []
        for r in range(len(s)):
            shares = [(u[:, r] @ merged) @ (u[:, r] @ tau) / np.square(u[:, r] @ tau).sum() for tau in taus]
            gamma.append(len(taus) / sum(max(alpha, share) for share in shares))
        return u @ np.diag(gamma * s) @ vh

    def reference(base: Arrays, models: dict[str, Arrays]) -> Arrays:
        taus = {name: [state[name] - base[name] for state in models.values()] for name in SHAPES}
        merged = {name: base[name] + others(taus[name]) for name in SHAPES}
        for name, shape in MATRICES.items():
            delta = calibrated([tau.reshape(shape) for tau in taus[name]])
            merged[name] = base[name] + delta.reshape(SHAPES[name])
        return merged

    return reference


def weighted_sum(scale: float) -> Callable[[Matrices], np.ndarray]:
    return lambda taus: scale * np.sum(taus, axis=0)


ROWS = [
    Row(TsvM, by_matrix(tsv_m), tolerance=2, alone={}, to_base={"scale": 0.0}),
    Row(TsvM, by_matrix(tsv_m, 0.4), {"scale": 0.4}, label="two", count=2, tolerance=2),
    Row(IsoC, by_matrix(iso_c), tolerance=2, to_base={"scale": 0.0}),
    Row(IsoC, by_matrix(iso_c, -1.5), {"scale": -1.5}, label="negation", count=2, tolerance=2),
    Row(IsoCts, by_matrix(iso_cts(0.8)), tolerance=2, to_base={"scale": 0.0}),
    Row(IsoCts, by_matrix(iso_cts(0.3), 0.7), {"common_space_fraction": 0.3, "scale": 0.7}, label="0.3", tolerance=2),
    Row(IsoCts, by_matrix(iso_cts(0.0)), {"common_space_fraction": 0.0}, label="0", tolerance=2),
    Row(Wudi, by_matrix(wudi_closed, skipped=("embed.weight",)), tolerance=2, copies={}, copies_exact=False),
    Row(Wudi, by_matrix(wudi_closed), {"exclude": []}, label="all", count=2, tolerance=2),
    Row(
        Wudi, by_matrix(wudi_adam(60, 2e-5)),
        {"solver": "adam", "iterations": 60, "learning_rate": 2e-5, "exclude": []}, label="adam", tolerance=12,
    ),
    Row(
        Svc, svc(weighted_sum(0.3), 0.1), {"method": TaskArithmetic(scale=0.3)}, tolerance=2,
        copies={"method": SimpleAverage()}, copies_exact=False,
    ),
    Row(
        Svc, svc(weighted_sum(1.0), 0.6), {"method": TaskArithmetic(scale=1.0), "alpha": 0.6}, label="0.6", count=2,
        tolerance=2,
    ),
    Row(
        Svc, svc(tsv_m, 1.0, others=weighted_sum(1 / 3)), {"method": TsvM(), "alpha": 1.0}, label="tsv", tolerance=2,
        three_only=True,
    ),
]  # fmt: skip
