"""Every method of the package, each with a reference written from its paper's formula."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
from contract import SEED, SHAPES, Arrays, MethodContract, Row, State, missing_rows

from lightning_merge.methods import (
    Breadcrumbs,
    Dare,
    GreedySoup,
    LwPTV,
    SimpleAverage,
    TaskArithmetic,
    Ties,
    WeightedAverage,
    WiseFT,
    available_methods,
)
from lightning_merge.methods.random import keep_mask

NAMES = sorted(SHAPES)


def count_of(fraction: float, n: int) -> int:
    """⌊fraction · n⌋ with the fraction as written, in decimals."""
    return math.floor(Decimal(str(fraction)) * n)


def task_vectors(base: Arrays, models: dict[str, Arrays]) -> dict[str, Arrays]:
    return {model: {name: state[name] - base[name] for name in NAMES} for model, state in models.items()}


def average(weights: dict[str, float] | None = None, normalize: bool = True) -> Callable:
    def reference(base: Arrays, models: dict[str, Arrays]) -> Arrays:
        w = weights or dict.fromkeys(models, 1.0)
        total = sum(w.values()) if normalize else 1.0
        return {name: sum(w[t] * models[t][name] for t in models) / total for name in NAMES}

    return reference


def arithmetic(scale: float | dict[str, float]) -> Callable:
    def reference(base: Arrays, models: dict[str, Arrays]) -> Arrays:
        tau = task_vectors(base, models)
        scales = scale if isinstance(scale, dict) else dict.fromkeys(models, scale)
        return {name: base[name] + sum(scales[t] * tau[t][name] for t in tau) for name in NAMES}

    return reference


def wise(alpha: float) -> Callable:
    def reference(base: Arrays, models: dict[str, Arrays]) -> Arrays:
        end = {name: sum(state[name] for state in models.values()) / len(models) for name in NAMES}
        return {name: (1 - alpha) * base[name] + alpha * end[name] for name in NAMES}

    return reference


def descending(values: np.ndarray) -> np.ndarray:
    """Flat indices from the largest magnitude down; equal ones in the order of their index."""
    return np.argsort(-np.abs(values), kind="stable")


def over_scope(scope: str, vector: Arrays, change: Callable[[np.ndarray], np.ndarray]) -> Arrays:
    """Apply ``change`` to each flat tensor, or to all of them in the order of their names as one vector."""
    groups = [NAMES] if scope == "model" else [[name] for name in NAMES]
    out: Arrays = {}
    for group in groups:
        changed = change(np.concatenate([vector[name].ravel() for name in group]))
        for name in group:
            size = vector[name].size
            out[name], changed = changed[:size].reshape(vector[name].shape), changed[size:]
    return out


def ties(density: float, scale: float, operation: str, scope: str) -> Callable:
    def trim(values: np.ndarray) -> np.ndarray:
        kept = np.zeros_like(values)
        chosen = descending(values)[: max(1, count_of(density, values.size))]
        kept[chosen] = values[chosen]
        return kept

    def reference(base: Arrays, models: dict[str, Arrays]) -> Arrays:
        trimmed = {t: over_scope(scope, vector, trim) for t, vector in task_vectors(base, models).items()}
        merged: Arrays = {}
        total = {name: sum(trimmed[t][name] for t in trimmed) for name in NAMES}
        for name in NAMES:
            within = NAMES if scope == "model" else [name]
            majority = np.sign(sum(np.sign(total[other]).sum() for other in within))
            sign = np.where(total[name] == 0, majority, np.sign(total[name]))
            stack = np.stack([trimmed[t][name] for t in trimmed])
            agrees = (np.sign(stack) == sign) & (stack != 0)
            summed, count = (stack * agrees).sum(0), agrees.sum(0)
            merged[name] = summed / np.maximum(count, 1) if operation == "mean" else summed
        return {name: base[name] + scale * merged[name] for name in NAMES}

    return reference


def dare(drop_rate: float, rescale: bool = True) -> Callable:
    def reference(base: Arrays, models: dict[str, Arrays]) -> Arrays:
        thinned = {}
        for t, vector in task_vectors(base, models).items():
            thinned[t] = {}
            for name, values in vector.items():
                # The draws themselves are tested in test_random.py.
                mask = keep_mask(1 - drop_rate, SEED, t, name, 0, values.size).numpy().reshape(values.shape)
                thinned[t][name] = values * mask / ((1 - drop_rate) if rescale else 1.0)
        return {name: base[name] + 0.3 * sum(thinned[t][name] for t in thinned) for name in NAMES}

    return reference


def breadcrumbs(density: float, gamma: float, scope: str) -> Callable:
    def middle(values: np.ndarray) -> np.ndarray:
        outliers, kept = count_of(gamma, values.size), count_of(density, values.size)
        chosen = descending(values)[outliers : outliers + kept]
        out = np.zeros_like(values)
        out[chosen] = values[chosen]
        return out

    def reference(base: Arrays, models: dict[str, Arrays]) -> Arrays:
        crumbs = [over_scope(scope, vector, middle) for vector in task_vectors(base, models).values()]
        return {name: base[name] + 0.3 * sum(vector[name] for vector in crumbs) for name in NAMES}

    return reference


# Written by hand, so that the rule that finds layers is checked too; an empty tensor is no layer.
LAYERS = {
    "block": [
        ["block.0.bias", "block.0.weight"], ["block.1.bias", "block.1.weight"], ["block.2.weight"], ["column.weight"],
        ["conv.weight"], ["embed.weight"], ["norm.weight"], ["temperature"],
    ],
    "tensor": [[name] for name in NAMES if name != "nothing.weight"],
}  # fmt: skip
LAYERS["module"] = LAYERS["block"]


def lwptv(
    eta: float, saliency: str = "magnitude", granularity: str = "block", rescale: str = "none", ranking: str = "task",
    protected: tuple[str, ...] = (),
) -> Callable:  # fmt: skip
    layers = [[name for name in layer if name not in protected] for layer in LAYERS[granularity]]
    layers = [layer for layer in layers if layer]

    def flat(state: Arrays, layer: list[str]) -> np.ndarray:
        return np.concatenate([state[name].ravel() for name in layer])

    def reference(base: Arrays, models: dict[str, Arrays]) -> Arrays:
        tau = task_vectors(base, models)
        scores: dict[tuple[str, int], float] = {}
        for t, vector in tau.items():
            for number, layer in enumerate(layers):
                delta = flat(vector, layer)
                if saliency == "drift":
                    scores[t, number] = np.linalg.norm(delta) / np.linalg.norm(flat(base, layer))
                else:
                    shared = sum(flat(other, layer) for other in tau.values()) / len(tau)
                    scores[t, number] = np.abs(delta - (shared if saliency == "distance" else 0)).mean()
        pruned: set[tuple[str, int]] = set()
        for group in [list(models)] if ranking == "global" else [[t] for t in models]:
            ranked = sorted((key for key in scores if key[0] in group), key=lambda key: scores[key])
            pruned |= set(ranked[: count_of(eta, len(ranked))])
        merged = {name: base[name].copy() for name in NAMES}
        for t, vector in tau.items():
            kept = {name for number, layer in enumerate(layers) if (t, number) not in pruned for name in layer}
            square = {name: np.square(vector[name]).sum() for layer in layers for name in layer}
            factor = 1.0
            if rescale == "inverse_keep":
                factor = 1 / (1 - eta)
            elif rescale == "norm" and kept:
                factor = math.sqrt(sum(square.values()) / sum(square[name] for name in kept))
            for name in NAMES:
                merged[name] += 0.3 * vector[name] * (1.0 if name in protected else factor if name in kept else 0.0)
        return merged

    return reference


def lwptv_entries(eta: float, granularity: str) -> Callable:
    """Prune the smallest entries inside each layer; of equal ones those that come last."""

    def reference(base: Arrays, models: dict[str, Arrays]) -> Arrays:
        merged = {name: base[name].copy() for name in NAMES}
        for vector in task_vectors(base, models).values():
            for layer in LAYERS[granularity]:
                values = np.concatenate([vector[name].ravel() for name in layer])
                kept = np.zeros_like(values)
                chosen = descending(values)[: values.size - count_of(eta, values.size)]
                kept[chosen] = values[chosen]
                for name in layer:
                    size = vector[name].size
                    merged[name] += 0.3 * kept[:size].reshape(vector[name].shape)
                    kept = kept[size:]
        return merged

    return reference


def score(state: State) -> float:
    """Prefer weights near a point, judged on one small tensor and coarsely enough that equal models tie."""
    return -round(float((state["block.0.weight"].double() - 0.01).square().sum()), 12)


def greedy(base: Arrays, models: dict[str, Arrays]) -> Arrays:
    def mean(names: list[str]) -> Arrays:
        return {name: sum(models[t][name] for t in names) / len(names) for name in NAMES}

    def value(names: list[str]) -> float:
        return -float(np.square(mean(names)["block.0.weight"] - 0.01).sum())

    ranked = sorted(models, key=lambda t: value([t]), reverse=True)
    soup = ranked[:1]
    for candidate in ranked[1:]:
        if value([*soup, candidate]) >= value(soup):
            soup.append(candidate)
    return mean(soup)


ROWS = [
    Row(SimpleAverage, average(), copies={}, alone={}),
    Row(WeightedAverage, average(), label="equal", copies={"weights": 0.3}, alone={"weights": 0.7}),
    Row(
        WeightedAverage,
        average({"a": 1.0, "b": 0.25, "c": -0.5}),
        {"weights": {"a": 1.0, "b": 0.25, "c": -0.5}},
        label="by-name",
        copies={"weights": {"a": 1.0, "b": 0.25, "c": -0.5}},
        alone={"weights": {"c": 3.0}},
    ),
    Row(
        WeightedAverage,
        average({"a": 0.5, "b": 0.0, "c": 0.25}, normalize=False),
        {"weights": {"a": 0.5, "b": 0.0, "c": 0.25}, "normalize": False},
        label="not-normalized",
        alone={"weights": 1.0, "normalize": False},
    ),
    Row(
        GreedySoup, greedy, score=score, copies={}, alone={},
    ),
    Row(WiseFT, wise(0.5), copies={"alpha": 1.0}, alone={"alpha": 1.0}, to_base={"alpha": 0.0}),
    Row(WiseFT, wise(0.3), {"alpha": 0.3}, label="0.3"),
    Row(TaskArithmetic, arithmetic(0.3), alone={"scale": 1.0}, to_base={"scale": 0.0}),
    Row(TaskArithmetic, arithmetic(-1.0), {"scale": -1.0}, label="negation"),
    Row(
        TaskArithmetic,
        arithmetic({"a": 0.4, "b": -0.1, "c": 1.5}),
        {"scale": {"a": 0.4, "b": -0.1, "c": 1.5}},
        label="by-name",
    ),
    Row(
        Ties, ties(0.2, 1.0, "mean", "model"), copies={"density": 1.0}, copies_exact=False, alone={"density": 1.0},
        to_base={"scale": 0.0},
    ),
    Row(Ties, ties(0.35, 0.3, "sum", "model"), {"density": 0.35, "scale": 0.3, "operation": "sum"}, label="sum"),
    Row(
        Ties, ties(0.5, 0.7, "mean", "tensor"), {"density": 0.5, "scale": 0.7, "scope": "tensor"}, label="tensor",
        alone={"density": 1.0, "scope": "tensor"},
    ),
    Row(Ties, ties(1.0, 0.4, "sum", "model"), {"density": 1.0, "scale": 0.4, "operation": "sum"}, label="untrimmed"),
    Row(Dare, dare(0.9), random=True, alone={"drop_rate": 0.0}, neutral={"drop_rate": 0.0}),
    Row(Dare, dare(0.3, False), {"drop_rate": 0.3, "rescale": False}, label="no-rescale", random=True,
        neutral={"drop_rate": 0.0, "rescale": False}),
    Row(
        Breadcrumbs, breadcrumbs(0.143, 0.007, "tensor"), alone={"density": 1.0, "gamma": 0.0},
        neutral={"density": 1.0, "gamma": 0.0},
    ),
    Row(
        Breadcrumbs, breadcrumbs(0.5, 0.1, "model"), {"density": 0.5, "gamma": 0.1, "scope": "model"}, label="model",
        neutral={"density": 1.0, "gamma": 0.0, "scope": "model"},
    ),
    Row(LwPTV, lwptv(0.2), alone={"eta": 0.0}, to_base={"eta": 1.0}, neutral={"eta": 0.0}),
    Row(
        LwPTV, lwptv(0.5, "distance", "tensor", "inverse_keep"),
        {"eta": 0.5, "saliency": "distance", "granularity": "tensor", "rescale": "inverse_keep"}, label="distance",
        to_base={"eta": 1.0, "saliency": "distance", "granularity": "tensor"},
        neutral={"eta": 0.0, "saliency": "distance"},
    ),
    Row(
        LwPTV, lwptv(0.6, "drift", "module", "norm", protected=("embed.weight", "temperature")),
        {"eta": 0.6, "saliency": "drift", "granularity": "module", "rescale": "norm", "protect": ["^embed", "temp"]},
        label="drift", neutral={"eta": 0.5, "protect": ["."]},
    ),
    Row(
        LwPTV, lwptv(0.4, ranking="global"), {"eta": 0.4, "ranking": "global"}, label="global",
        neutral={"eta": 0.0, "ranking": "global"},
    ),
    Row(
        LwPTV, lwptv_entries(0.7, "block"), {"eta": 0.7, "saliency": "entry"}, label="entry",
        to_base={"eta": 1.0, "saliency": "entry"}, neutral={"eta": 0.0, "saliency": "entry"},
    ),
    Row(
        LwPTV, lwptv_entries(0.3, "tensor"), {"eta": 0.3, "saliency": "entry", "granularity": "tensor"},
        label="entry-tensor", to_base={"eta": 1.0, "saliency": "entry", "granularity": "tensor"},
        neutral={"eta": 0.0, "saliency": "entry", "granularity": "tensor"},
    ),
]  # fmt: skip


# Families of methods keep their rows in files of their own.
for _path in sorted(Path(__file__).parent.glob("rows_*.py")):
    ROWS += importlib.import_module(_path.stem).ROWS


def test_every_method_has_a_row() -> None:
    assert missing_rows(ROWS, available_methods()) == [], "a new method needs a row in ROWS"


def test_a_method_without_a_row_is_noticed() -> None:
    new = type("Newcomer", (), {"__module__": "lightning_merge.methods.newcomer"})
    plugin = type("Elsewhere", (), {"__module__": "somebody.elses"})
    assert missing_rows(ROWS, {**available_methods(), "Newcomer": new, "Elsewhere": plugin}) == ["Newcomer"]


@pytest.mark.parametrize("row", ROWS, ids=str)
class TestContract(MethodContract):
    """See :class:`contract.MethodContract`."""
