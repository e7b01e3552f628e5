"""Rows of the contract for methods that go entry by entry; references in numpy and fp64, over whole models."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from contract import SHAPES, Arrays, Row

from lightning_merge.methods import (
    ArceeFusion,
    Consensus,
    Emr,
    Expo,
    MagMax,
    NearSwap,
    Passthrough,
    Pcb,
    Ram,
    RamPlus,
    TallMask,
)

NAMES = sorted(SHAPES)
Reference = Callable[[Arrays, dict[str, Arrays]], Arrays]


def stack(base: Arrays, models: dict[str, Arrays], name: str) -> np.ndarray:
    """Task vectors of one tensor, ``(T, *shape)``."""
    return np.stack([models[t][name] - base[name] for t in sorted(models)])


def flat(base: Arrays, models: dict[str, Arrays]) -> np.ndarray:
    """Task vectors of the whole model in the order of its tensors' names, ``(T, D)``."""
    return np.stack([np.concatenate([(models[t][n] - base[n]).ravel() for n in NAMES]) for t in sorted(models)])


def added(base: Arrays, vector: np.ndarray) -> Arrays:
    """The base plus one vector over the whole model."""
    merged: Arrays = {}
    for name in NAMES:
        size = base[name].size
        merged[name], vector = base[name] + vector[:size].reshape(base[name].shape), vector[size:]
    return merged


def magmax(scale: float) -> Reference:
    def reference(base: Arrays, models: dict[str, Arrays]) -> Arrays:
        merged = {}
        for name in NAMES:
            tau = stack(base, models, name)
            first = np.argmax(np.abs(tau), axis=0)  # the first of equal ones
            merged[name] = base[name] + scale * np.take_along_axis(tau, first[None], 0)[0]
        return merged

    return reference


def expo(alpha: float) -> Reference:
    def reference(base: Arrays, models: dict[str, Arrays]) -> Arrays:
        (aligned,) = models.values()
        return {name: aligned[name] + alpha * (aligned[name] - base[name]) for name in NAMES}

    return reference


def passthrough(scale: float) -> Reference:
    def reference(base: Arrays, models: dict[str, Arrays]) -> Arrays:
        (model,) = models.values()
        return {name: scale * model[name] for name in NAMES}

    return reference


def nearswap(t: float) -> Reference:
    def reference(base: Arrays, models: dict[str, Arrays]) -> Arrays:
        (model,) = models.values()
        merged = {}
        for name in NAMES:
            far = np.abs(model[name] - base[name])
            weight = np.minimum(t / np.maximum(far, 1e-30), 1.0)
            merged[name] = weight * model[name] + (1 - weight) * base[name]
        return merged

    return reference


def masks(
    base: Arrays, models: dict[str, Arrays], name: str, lambdas: dict[str, float]
) -> tuple[np.ndarray, np.ndarray]:
    """As the paper writes it, on weights: |θ₀ − θ_t| > λ_t |θ_mt − θ_t|; with the summed task vector."""
    total = stack(base, models, name).sum(0)
    multi = base[name] + total
    mask = [np.abs(base[name] - models[t][name]) > lambdas[t] * np.abs(multi - models[t][name]) for t in sorted(models)]
    return np.stack(mask), total


def tall(task: str, threshold: float) -> Reference:
    def reference(base: Arrays, models: dict[str, Arrays]) -> Arrays:
        merged = {}
        for name in NAMES:
            mask, total = masks(base, models, name, dict.fromkeys(models, threshold))
            merged[name] = base[name] + mask[sorted(models).index(task)] * total
        return merged

    return reference


def consensus(k: int, threshold: float | dict[str, float], scale: float) -> Reference:
    def reference(base: Arrays, models: dict[str, Arrays]) -> Arrays:
        lambdas = threshold if isinstance(threshold, dict) else dict.fromkeys(models, threshold)
        merged = {}
        for name in NAMES:
            mask, total = masks(base, models, name, lambdas)
            merged[name] = base[name] + scale * (mask.sum(0) >= k) * total
        return merged

    return reference


def emr(task: str, scope: str) -> Reference:
    def reference(base: Arrays, models: dict[str, Arrays]) -> Arrays:
        position = sorted(models).index(task)
        own, masked = {}, {}
        for name in NAMES:
            tau = stack(base, models, name)
            sign = np.sign(tau.sum(0))
            unified = sign * np.where(np.sign(tau) == sign, np.abs(tau), 0).max(0, initial=0)
            own[name], masked[name] = tau[position], unified * (tau[position] * unified > 0)
        merged = {}
        for name in NAMES:
            within = NAMES if scope == "model" else [name]
            below = sum(np.abs(masked[other]).sum() for other in within)
            factor = sum(np.abs(own[other]).sum() for other in within) / below if below else 0.0
            merged[name] = base[name] + factor * masked[name]
        return merged

    return reference


def ram(epsilon: float, relative: bool, r: float = 0.0, alpha: float = 0.0, whole: bool = True) -> Reference:
    def reference(base: Arrays, models: dict[str, Arrays]) -> Arrays:
        tau = {name: stack(base, models, name) for name in NAMES}
        active = {}
        for name in NAMES:
            unit = np.sqrt(np.square(tau[name]).mean()) if relative and tau[name].size else 1.0
            active[name] = np.abs(tau[name]) > epsilon * unit
        merged = {}
        for name in NAMES:
            count = active[name].sum(0)
            mean = (tau[name] * active[name]).sum(0) / np.maximum(count, 1)
            for t in range(len(models)):
                within = NAMES if whole else [name]
                shared = sum((active[n][t] & (active[n].sum(0) > 1)).sum() for n in within)
                unique = sum((active[n][t] & (active[n].sum(0) == 1)).sum() for n in within)
                ratio = shared / unique if unique else np.inf if shared else 0.0
                own = active[name][t] & (count == 1)
                mean = mean + np.where(own, r * min(ratio, alpha) * tau[name][t], 0.0)
            merged[name] = base[name] + mean
        return merged

    return reference


def softmax(values: np.ndarray) -> np.ndarray:
    e = np.exp(values - values.max())
    return e / e.sum()


def scaled(values: np.ndarray) -> np.ndarray:
    width = values.max() - values.min()
    return (values - values.min()) / width if width else np.zeros_like(values)


def largest(score: np.ndarray, kept: int) -> np.ndarray:
    """Mask of the largest scores as fp32 has them; of equal ones the first."""
    mask = np.zeros(score.size, dtype=bool)
    mask[np.argsort(-score.astype(np.float32), kind="stable")[:kept]] = True
    return mask


def pcb(ratio: float, scale: dict[str, float] | float) -> Reference:
    def reference(base: Arrays, models: dict[str, Arrays]) -> Arrays:
        tau = flat(base, models)
        lambdas = [scale[t] if isinstance(scale, dict) else scale for t in sorted(models)]
        weights, moved = np.zeros_like(tau), [i for i, row in enumerate(tau) if row.any()]
        for i in moved:
            beta = softmax(len(moved) * scaled(tau[i] * tau[i])) * sum(softmax(scaled(tau[i] * tau[j])) for j in moved)
            weights[i] = beta * largest(beta * tau.shape[1] ** 2, max(1, int(ratio * tau.shape[1])))
        total = weights.sum(0)
        above = sum(weight * coefficient * row for weight, coefficient, row in zip(weights, lambdas, tau, strict=True))
        return added(base, np.divide(above, total, out=np.zeros_like(total), where=total > 0))

    return reference


def pcb_code(ratio: float, scale: float) -> Reference:
    def reference(base: Arrays, models: dict[str, Arrays]) -> Arrays:
        tau = flat(base, models)
        count, d = tau.shape
        clamped, weights = np.zeros_like(tau), np.zeros_like(tau)
        for i, row in enumerate(tau):
            ordered = np.sort(np.abs(row))
            size = np.clip(np.abs(row), ordered[int(d * 0.0001)], ordered[int(d * (1 - 0.0001) - 1)])
            clamped[i] = np.sign(row) * size
            score = np.exp(count * scaled(size) ** 2) * np.tanh(row * tau.sum(0))
            ordered = np.sort(np.maximum(score, 0)).astype(np.float32).astype(np.float64)
            low, high = ordered[int(d * (1 - ratio))], ordered[-1]
            above = score.astype(np.float32) > low
            weights[i] = np.where(above, np.clip((score - low) / (high - low), 0, 1), 0) if high > low else 0
        total = weights.sum(0)
        weighted = scale * (weights * clamped).sum(0)
        return added(base, np.divide(weighted, total, out=np.zeros_like(total), where=total > 0))

    return reference


def fusion(base: Arrays, models: dict[str, Arrays]) -> Arrays:
    (model,) = models.values()
    merged = {}
    for name in NAMES:
        ours, theirs = np.atleast_1d(model[name]), np.atleast_1d(base[name])
        if not ours.size:
            merged[name] = base[name]
            continue
        p, q = (np.exp(w - w.max(-1, keepdims=True)) for w in (ours, theirs))
        p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
        divergence = (p * np.log(p / q)).sum(-1, keepdims=True)
        if ours.shape[-1] == 1:
            divergence = np.zeros_like(divergence)
        score = np.abs(ours - theirs) * divergence
        ordered = np.sort(score.ravel())
        first, median, third = (ordered[int(part * (score.size - 1))] for part in (0.25, 0.5, 0.75))
        taken = score >= (median + 1.5 * (third - first)) * (1 - 1e-9)
        merged[name] = np.where(taken, ours, theirs).reshape(base[name].shape)
    return merged


ROWS = [
    # Of equal magnitudes the first name stays: renaming may change the sign of an entry.
    Row(MagMax, magmax(0.5), random=True, copies={"scale": 1.0}, alone={"scale": 1.0}, to_base={"scale": 0.0}),
    Row(MagMax, magmax(1.0), {"scale": 1.0}, label="selection", random=True),
    Row(MagMax, magmax(-1.5), {"scale": -1.5}, label="negated", random=True),
    Row(Expo, expo(0.3), count=1, alone={"alpha": 0.0}, to_base={"alpha": -1.0}, copies={"alpha": 0.0}),
    Row(Expo, expo(1.5), {"alpha": 1.5}, label="far", count=1),
    Row(Passthrough, passthrough(1.0), count=1, alone={}, copies={}),
    Row(Passthrough, passthrough(-0.3), {"scale": -0.3}, label="scaled", count=1),
    Row(NearSwap, nearswap(0.0001), count=1, alone={"t": 100.0}, copies={"t": 1.0}, to_base={"t": 0.0}),
    Row(NearSwap, nearswap(0.001), {"t": 0.001}, label="wide", count=1),
    # The task's name is a model's: renaming the models would leave the setting behind.
    Row(TallMask, tall("b", 0.4), {"task": "b"}, random=True, alone={"task": "c"}),
    Row(TallMask, tall("c", 1.5), {"task": "c", "threshold": 1.5}, label="strict", random=True),
    Row(Consensus, consensus(2, 0.4, 0.3), alone={"k": 1, "scale": 1.0}, to_base={"scale": 0.0}),
    Row(
        Consensus,
        consensus(3, {"a": 0.2, "b": 1.0, "c": 0.7}, 1.0),
        {"k": 3, "threshold": {"a": 0.2, "b": 1.0, "c": 0.7}, "scale": 1.0},
        label="by-name",
    ),
    Row(Consensus, consensus(1, 0.9, 0.5), {"k": 1, "threshold": 0.9, "scale": 0.5}, label="catastrophic"),
    Row(Emr, emr("b", "model"), {"task": "b"}, random=True, alone={"task": "c"}, copies={"task": "a"}),
    Row(Emr, emr("c", "tensor"), {"task": "c", "scope": "tensor"}, label="tensor", random=True,
        alone={"task": "c", "scope": "tensor"}, copies={"task": "b", "scope": "tensor"}),
    Row(Ram, ram(1e-5, True), alone={"epsilon": 0.0}, copies={}),
    Row(Ram, ram(0.9, True), {"epsilon": 0.9}, label="sparse"),
    Row(Ram, ram(2e-3, False), {"epsilon": 2e-3, "compat": "mergekit"}, label="mergekit",
        copies={"epsilon": 0.0, "compat": "mergekit"}),
    Row(RamPlus, ram(1e-5, True, 0.1, 0.2), alone={"epsilon": 0.0}, copies={}),
    Row(
        RamPlus, ram(1.0, True, 0.5, 2.0), {"epsilon": 1.0, "r": 0.5, "alpha": 2.0}, label="sparse",
    ),
    Row(
        RamPlus, ram(1e-3, False, 0.7, 3.0, whole=False),
        {"epsilon": 1e-3, "r": 0.7, "alpha": 3.0, "compat": "mergekit"}, label="mergekit",
    ),
    Row(
        Pcb, pcb(0.1, 1.0), copies={"ratio": 1.0}, copies_exact=False, alone={"ratio": 1.0}, to_base={"scale": 0.0},
    ),
    Row(
        Pcb, pcb(0.45, {"a": 1.3, "b": 0.8, "c": -0.5}), {"ratio": 0.45, "scale": {"a": 1.3, "b": 0.8, "c": -0.5}},
        label="by-name",
    ),
    Row(Pcb, pcb_code(0.1, 1.0), {"variant": "code"}, label="code", to_base={"scale": 0.0, "variant": "code"}),
    Row(Pcb, pcb_code(0.5, 1.2), {"variant": "code", "ratio": 0.5, "scale": 1.2}, label="code-half"),
    Row(ArceeFusion, fusion, count=1),
]  # fmt: skip
