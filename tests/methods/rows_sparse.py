"""Rows of the methods that trim, drop and elect signs: what goes beyond the papers' forms in test_contract.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

import numpy as np
from contract import SEED, SHAPES, Arrays, Row

from lightning_merge.methods import Breadcrumbs, Dare, Della, ElectSign, Sce, TaskArithmetic, Ties
from lightning_merge.methods.random import keep_mask, uniform

NAMES = sorted(SHAPES)
Setting = float | Mapping[str, float]


def of(setting: Setting, model: str) -> float:
    return setting[model] if isinstance(setting, Mapping) else setting


def written(fraction: float, count: int) -> int:
    """⌊fraction · count⌋ with the fraction as written, in decimals."""
    return math.floor(Decimal(str(fraction)) * count)


def largest(values: np.ndarray, start: int, stop: int) -> np.ndarray:
    """The flat entries from rank ``start`` to ``stop`` by magnitude, of equal ones the first; else 0."""
    flat = values.ravel()
    kept = np.zeros_like(flat)
    chosen = np.argsort(-np.abs(flat), kind="stable")[start:stop]
    kept[chosen] = flat[chosen]
    return kept.reshape(values.shape)


def restored(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """mergekit's rescaling: to the norm from before, unless one of the norms is tiny."""
    norms = np.abs(before).sum(), np.abs(after).sum()
    return after * (norms[0] / norms[1]) if min(norms) >= 1e-7 else after


def merged_tensors(change: Callable[[str, dict[str, np.ndarray]], np.ndarray]) -> Callable:
    """A reference from what one tensor's task vectors by model become: the change of the base."""

    def reference(base: Arrays, models: dict[str, Arrays]) -> Arrays:
        taus = {name: {t: models[t][name] - base[name] for t in models} for name in NAMES}
        return {name: base[name] + change(name, taus[name]) for name in NAMES}

    return reference


def summed(thin: Callable[[str, str, np.ndarray], np.ndarray]) -> Callable:
    """What a transform used as a method means: 0.3 times the sum of the thinned task vectors."""
    return merged_tensors(lambda name, tau: 0.3 * sum(thin(name, t, tau[t]) for t in tau))


def arithmetic(scale: Setting, weights: Setting, normalize: bool) -> Callable:
    def change(name: str, tau: dict[str, np.ndarray]) -> np.ndarray:
        total = sum(of(weights, t) for t in tau)
        divisor = (total if abs(total) >= 1e-8 else 1.0) if normalize else 1.0
        return sum(of(scale, t) * of(weights, t) * tau[t] for t in tau) / divisor

    return merged_tensors(change)


def mergekit_ties(
    density: Setting, weights: Setting = 1.0, scale: float = 1.0, normalize: bool = True, rescale: bool = False
) -> Callable:
    def change(name: str, tau: dict[str, np.ndarray]) -> np.ndarray:
        weighted = []
        for t, values in tau.items():
            share = of(density, t)
            trimmed = values if share == 1 else largest(values, 0, max(1, int(share * values.size)))
            weighted.append(of(weights, t) * (restored(values, trimmed) if rescale and share < 1 else trimmed))
        stack = np.stack(weighted)
        elected = np.where(stack.sum(0) >= 0, 1, -1)
        agrees = np.sign(stack) == elected
        divisor = sum(of(weights, t) * mask for t, mask in zip(tau, agrees, strict=True))
        return scale * (stack * agrees).sum(0) / (np.where(divisor == 0, 1, divisor) if normalize else 1)

    return merged_tensors(change)


def ties_by_model(density: Mapping[str, float]) -> Callable:
    """The paper's form, tensor by tensor, with a density for each model."""

    def change(name: str, tau: dict[str, np.ndarray]) -> np.ndarray:
        stack = np.stack([largest(v, 0, max(1, written(density[t], v.size))) for t, v in tau.items()])
        total = stack.sum(0)
        sign = np.where(total == 0, np.sign(np.sign(total).sum()), np.sign(total))
        agrees = (np.sign(stack) == sign) & (stack != 0)
        return (stack * agrees).sum(0) / np.maximum(agrees.sum(0), 1)

    return merged_tensors(change)


def agreeing(density: Setting, scope: str = "model", elect: bool = True) -> Callable:
    """TIES' trim and election, each task's own entries kept; of them 0.3 times the sum."""

    def kept(values: np.ndarray, count: int) -> np.ndarray:
        return largest(values, 0, max(1, count))

    def reference(base: Arrays, models: dict[str, Arrays]) -> Arrays:
        parts = [NAMES] if scope == "model" else [[name] for name in NAMES]
        merged: Arrays = {}
        for names in parts:
            whole = {t: np.concatenate([(models[t][n] - base[n]).ravel() for n in names]) for t in models}
            stack = np.stack([kept(tau, written(of(density, t), tau.size)) for t, tau in whole.items()])
            if elect:
                total = stack.sum(0)
                sign = np.where(total == 0, np.sign(np.sign(total).sum()), np.sign(total))
                stack = np.where(np.sign(stack) == sign, stack, 0)
            change = 0.3 * stack.sum(0)
            for name in names:
                here, change = change[: base[name].size], change[base[name].size :]
                merged[name] = base[name] + here.reshape(base[name].shape)
        return merged

    return reference


def dare(rate: Setting, mergekit: bool) -> Callable:
    def thin(name: str, t: str, tau: np.ndarray) -> np.ndarray:
        mask = keep_mask(1 - of(rate, t), SEED, t, name, 0, tau.size).numpy().reshape(tau.shape)
        return restored(tau, tau * mask) if mergekit else tau * mask / (1 - of(rate, t))

    return summed(thin)


def mergekit_breadcrumbs(density: Setting, gamma: Setting, rescale: bool = False) -> Callable:
    def thin(name: str, t: str, tau: np.ndarray) -> np.ndarray:
        if of(density, t) == 1:
            return tau
        count, top = int(of(density, t) * tau.size), int(of(gamma, t) * tau.size)
        bottom = max(0, tau.size - count - top)
        middle = largest(tau, tau.size - count - bottom, tau.size - bottom)
        return restored(tau, middle) if rescale else middle

    return summed(thin)


def breadcrumbs_by_model(density: Mapping[str, float], gamma: float) -> Callable:
    def thin(name: str, t: str, tau: np.ndarray) -> np.ndarray:
        outliers = written(gamma, tau.size)
        return largest(tau, outliers, outliers + written(density[t], tau.size))

    return summed(thin)


def della(density: Setting, epsilon: Setting, rescale: bool = True, mergekit: bool = False) -> Callable:
    def thin(name: str, t: str, tau: np.ndarray) -> np.ndarray:
        share, reach = of(density, t), of(epsilon, t)
        if share == 1:
            return tau
        if tau.ndim < 2:
            rows = tau.reshape(1, -1)
        elif mergekit:
            rows = np.moveaxis(tau, 1, -1).reshape(-1, tau.shape[1])
        else:
            rows = tau.reshape(len(tau), math.prod(tau.shape[1:]))
        draws = uniform(SEED, t, name, 0, tau.size).double().numpy()
        out = np.zeros_like(rows)
        count = rows.shape[1]
        for number, row in enumerate(rows):
            for rank, column in enumerate(np.argsort(-np.abs(row), kind="stable")):
                p = share if count == 1 else share + reach - 2 * reach * rank / (count - 1)
                if draws[number * count + rank] < p:
                    out[number, column] = row[column] / (p if rescale and not mergekit else 1)
        if mergekit and tau.ndim > 1:
            out = np.moveaxis(out.reshape(tau.shape[0], *tau.shape[2:], tau.shape[1]), -1, 1)
        out = out.reshape(tau.shape)
        return restored(tau, out) if rescale and mergekit else out

    return summed(thin)


def sce(density: float, mergekit: bool = False) -> Callable:
    def change(name: str, tau: dict[str, np.ndarray]) -> np.ndarray:
        stack = np.stack(list(tau.values()))
        # T² times the variance: exact here, and then ranked as fp32 holds it.
        variance = (len(stack) * np.square(stack).sum(0) - np.square(stack.sum(0))).astype(np.float32)
        chosen = np.ones(stack.shape[1:], dtype=bool)
        if density < 1:
            differ = int(np.count_nonzero(variance))
            count = int(density * differ) if mergekit else written(density, differ)
            chosen = largest(variance, 0, count) != 0
        stack = stack * chosen if mergekit else stack
        squares = np.array([np.square(row * chosen).sum() for row in stack])
        if mergekit:
            squares /= max(chosen.size, 1)
        alike = squares.sum() < 1e-6 if mergekit else squares.sum() == 0
        weights = np.full(len(stack), 1 / len(stack)) if alike else squares / squares.sum()
        agrees = np.sign(stack) == np.where(stack.sum(0) >= 0, 1, -1)
        shares = np.stack([w * mask for w, mask in zip(weights, agrees, strict=True)])
        total = shares.sum(0)
        return (shares * stack).sum(0) / (np.maximum(total, 1e-6) if mergekit else np.where(total == 0, 1, total))

    return merged_tensors(change)


def row(method: type, reference: Callable, label: str, settings: dict[str, Any], **rest: Any) -> Row:
    return Row(method, reference, settings, label=label, **rest)


THEIRS = {"compat": "mergekit"}
WEIGHTS = {"a": 0.5, "b": 1.5, "c": -0.25}  # products with the tests' task vectors are exact
MIXED = {"a": 0.2, "b": 1.0, "c": 0.55}

ROWS = [
    row(TaskArithmetic, arithmetic(0.5, WEIGHTS, True), "normalized", {"scale": 0.5, "weights": WEIGHTS,
        "normalize": True}, copies={"scale": 1.0, "normalize": True}, copies_exact=False, tolerance=2),
    row(TaskArithmetic, arithmetic(0.4, WEIGHTS, False), "mergekit", {"scale": 0.4, "weights": WEIGHTS, **THEIRS},
        to_base={"scale": 0.0, **THEIRS}),
    row(TaskArithmetic, arithmetic(1.0, {"a": 1.0, "b": -1.0, "c": 0.0}, True), "mergekit-balanced",
        {"scale": 1.0, "weights": {"a": 1.0, "b": -1.0, "c": 0.0}, "normalize": True, **THEIRS}),
    row(Ties, ties_by_model(MIXED), "by-model", {"density": MIXED, "scope": "tensor"}),
    row(Ties, mergekit_ties(0.2), "mergekit", THEIRS, to_base={"scale": 0.0, **THEIRS},
        copies={"density": 1.0, **THEIRS}, copies_exact=False),
    row(Ties, mergekit_ties(MIXED, WEIGHTS, 0.7), "mergekit-weights",
        {"density": MIXED, "weights": WEIGHTS, "scale": 0.7, **THEIRS}),
    row(Ties, mergekit_ties(0.35, WEIGHTS, normalize=False), "mergekit-sum",
        {"density": 0.35, "weights": WEIGHTS, "operation": "sum", **THEIRS}),
    row(Ties, mergekit_ties(0.5, 0.5, rescale=True), "mergekit-rescale",
        {"density": 0.5, "weights": 0.5, "rescale": True, **THEIRS}, tolerance=3),
    row(Ties, mergekit_ties(1.0, WEIGHTS), "mergekit-election", {"density": 1.0, "weights": WEIGHTS, **THEIRS}),
    row(ElectSign, agreeing(0.2), "", {}, alone={"density": 1.0}, neutral={"density": 1.0, "elect": False}),
    row(ElectSign, agreeing(MIXED, "tensor"), "by-model", {"density": MIXED, "scope": "tensor"},
        alone={"density": 1.0, "scope": "tensor"}, neutral={"density": 1.0, "scope": "tensor", "elect": False}),
    row(ElectSign, agreeing(1.0), "untrimmed", {"density": 1.0}, neutral={"density": 1.0, "elect": False}),
    row(ElectSign, agreeing(0.4, elect=False), "trim", {"density": 0.4, "elect": False},
        neutral={"density": 1.0, "elect": False}),
    row(Dare, dare({"a": 0.9, "b": 0.0, "c": 0.5}, False), "by-model", {"drop_rate": {"a": 0.9, "b": 0.0, "c": 0.5}},
        random=True, neutral={"drop_rate": 0.0}),
    row(Dare, dare(0.6, True), "mergekit", {"drop_rate": 0.6, **THEIRS}, random=True,
        neutral={"drop_rate": 0.0, **THEIRS}),
    row(Breadcrumbs, breadcrumbs_by_model({"a": 0.143, "b": 0.9, "c": 0.5}, 0.1), "by-model",
        {"density": {"a": 0.143, "b": 0.9, "c": 0.5}, "gamma": 0.1}, neutral={"density": 1.0, "gamma": 0.0}),
    row(Breadcrumbs, mergekit_breadcrumbs(0.9, 0.2), "mergekit", {"density": 0.9, "gamma": 0.2, **THEIRS},
        neutral={"density": 1.0, "gamma": 0.3, **THEIRS}),
    row(Breadcrumbs, mergekit_breadcrumbs(MIXED, {"a": 0.01, "b": 0.5, "c": 0.6}, True), "mergekit-rescale",
        {"density": MIXED, "gamma": {"a": 0.01, "b": 0.5, "c": 0.6}, "rescale": True, **THEIRS}, tolerance=2,
        neutral={"density": 1.0, "rescale": True, **THEIRS}),
    row(Della, della(0.7, 0.07), "", {}, random=True, alone={"density": 1.0}, neutral={"density": 1.0}),
    row(Della, della({"a": 0.5, "b": 1.0, "c": 0.3}, {"a": 0.4, "b": 0.1, "c": 0.0}, False), "by-model",
        {"density": {"a": 0.5, "b": 1.0, "c": 0.3}, "epsilon": {"a": 0.4, "b": 0.1, "c": 0.0}, "rescale": False},
        random=True, neutral={"density": 1.0, "epsilon": 0.4}),
    row(Della, della(0.4, 0.15, True, True), "mergekit", {"density": 0.4, "epsilon": 0.15, **THEIRS}, random=True,
        neutral={"density": 1.0, **THEIRS}),
    row(Sce, sce(0.1), "", {}, copies={}, copies_exact=False, alone={}, tolerance=4),
    row(Sce, sce(0.6), "0.6", {"density": 0.6}, tolerance=4),
    row(Sce, sce(1.0), "all", {"density": 1.0}, tolerance=4),
    row(Sce, sce(0.3, True), "mergekit", {"density": 0.3, **THEIRS}, tolerance=4),
    row(Sce, sce(1.0, True), "mergekit-all", {"density": 1.0, **THEIRS}, tolerance=4),
]  # fmt: skip
