"""Slerp, NuSLERP, multi-slerp, Karcher mean, model stock and linear merges by mergekit 0.1.5, in memory.

Agreement is to fp32's rounding; where the paper's form differs from theirs on purpose, a test shows by how much.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_merge import TaskVectors
from lightning_merge.methods import Karcher, MergeMethod, ModelStock, MultiSlerp, NuSlerp, Slerp, WeightedAverage

pytest.importorskip("mergekit")
from mergekit.merge_methods.api import merge_state_dicts

State = dict[str, Tensor]
SHAPES = {
    "embed.weight": (300, 64),
    "block.0.weight": (40, 25),
    "block.0.bias": (37,),
    "block.1.weight": (30, 4, 3),
    "column.weight": (9, 1),
    "temperature": (),
}


def draw(seed: int, scale: float) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def near(base: State, scale: float) -> dict[str, State]:
    """Three models that share a part of what they changed, so that their task vectors lean the same way."""
    shared = draw(9, scale)
    return {
        name: {key: base[key] + 0.5 * shared[key] + change for key, change in draw(seed, scale).items()}
        for seed, name in enumerate("abc", 1)
    }


@pytest.fixture
def base() -> State:
    return draw(0, 1.0)


def theirs(base: State | None, models: dict[str, State], method: str, **parameters: Any) -> State:
    every = models if base is None else {"base": base, **models}
    return merge_state_dicts(every, method, parameters=parameters, base=None if base is None else "base")


def ours(base: State | None, models: dict[str, State], method: MergeMethod) -> State:
    return method(TaskVectors.open(base=base, models=models, check=False))


def agree(one: State, other: State, atol: float = 1e-6) -> None:
    assert set(one) == set(other)
    for name in SHAPES:
        torch.testing.assert_close(one[name], other[name], rtol=atol, atol=atol)


def furthest(one: State, other: State) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in SHAPES)


# 0.01: cos above their threshold, so that they take the line; 0.3 and 3: an arc.
@pytest.mark.parametrize("scale", [0.01, 0.3, 3.0])
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp(base: State, scale: float, t: float) -> None:
    one = {"a": near(base, scale)["a"]}
    reference = theirs(base, one, "slerp", t=t)
    agree(ours(base, one, Slerp(t=t, compat="mergekit")), reference, 3e-6)
    # Between the thresholds the arc and the line are 1e-4 of a norm apart at most.
    agree(ours(base, one, Slerp(t=t)), reference, 1e-3)


def test_slerp_near_parallel_is_a_line_there_and_an_arc_here() -> None:
    base, model = {"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([math.cos(0.03), math.sin(0.03)])}
    line = merge_state_dicts({"base": base, "a": model}, "slerp", parameters={"t": 0.5}, base="base")["w"]
    assert float(line.norm()) == pytest.approx(math.cos(0.015), abs=1e-7)
    assert float(ours(base, {"a": model}, Slerp(t=0.5))["w"].norm()) == pytest.approx(1, abs=1e-7)


def test_slerp_of_a_zero_model(base: State) -> None:
    """There a zero tensor stands at a right angle to everything; here the way to it is the line."""
    one = {"a": {name: torch.zeros(shape) for name, shape in SHAPES.items()}}
    agree(ours(base, one, Slerp(t=0.25, compat="mergekit")), theirs(base, one, "slerp", t=0.25))
    agree(ours(base, one, Slerp(t=0.25)), {name: 0.75 * value for name, value in base.items()})


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize(
    ("along", "flatten", "row_wise"), [("tensor", True, False), ("row", False, False), ("column", False, True)]
)
def test_nuslerp(base: State, with_base: bool, along: Any, flatten: bool, row_wise: bool) -> None:
    """Theirs: rows where ``nuslerp_row_wise`` is false, columns where it is true."""
    two = {name: state for name, state in near(base, 0.3).items() if name != "c"}
    weights = {"a": 1.0, "b": 0.4}
    start = base if with_base else None
    options = {"nuslerp_flatten": flatten, "nuslerp_row_wise": row_wise}
    reference = theirs(start, two, "nuslerp", weight=weights, **options)
    agree(ours(start, two, NuSlerp(weights=weights, along=along, compat="mergekit")), reference, 1e-5)
    paper = ours(start, two, NuSlerp(weights=weights, along=along))
    for name in SHAPES:
        if along != "row" or len(SHAPES[name]) < 3:
            torch.testing.assert_close(paper[name], reference[name], rtol=1e-5, atol=1e-5)
        else:  # a filter here, its last axis there
            assert (paper[name] - reference[name]).abs().max() > 1e-3


def test_nuslerp_without_a_total_weight(base: State) -> None:
    two = {name: state for name, state in near(base, 0.3).items() if name != "c"}
    weights = {"a": 1.0, "b": -1.0}
    agree(ours(base, two, NuSlerp(weights=weights, compat="mergekit")), theirs(base, two, "nuslerp", weight=weights))


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("normalize", [True, False])
def test_multislerp(base: State, with_base: bool, normalize: bool) -> None:
    """Their tangent vectors add up to 0, so that ours, without them, is the same."""
    models, weights, start = near(base, 0.3), {"a": 1.0, "b": 0.4, "c": 2.0}, base if with_base else None
    reference = theirs(start, models, "multislerp", weight=weights, normalize_weights=normalize)
    agree(ours(start, models, MultiSlerp(weights=weights, normalize=normalize)), reference, 3e-6)


def test_multislerp_of_unchanged_models_is_the_base_here_and_an_error_there(base: State) -> None:
    copies = {name: dict(base) for name in "abc"}
    agree(ours(base, copies, MultiSlerp()), base, 0)
    with pytest.raises(Exception, match="weighted sum of the input tensors is zero"):
        theirs(base, copies, "multislerp", weight=1.0)


@pytest.mark.parametrize("scale", [0.01, 0.5, 2.0])
@pytest.mark.parametrize("steps", [1, 10])
def test_karcher(base: State, scale: float, steps: int) -> None:
    models = near(base, scale)
    reference = theirs(None, models, "karcher", max_iter=steps, tol=1e-5)
    agree(ours(None, models, Karcher(max_iterations=steps, compat="mergekit")), reference, 1e-5)
    found = ours(None, models, Karcher(max_iterations=steps))
    for name in SHAPES:
        if SHAPES[name]:  # the sphere of a single number is two points: theirs is the first, not the average
            torch.testing.assert_close(found[name], reference[name], rtol=1e-5, atol=1e-5)


def test_karcher_with_a_zero_model(base: State) -> None:
    models = {**near(base, 0.5), "c": {name: torch.zeros(shape) for name, shape in SHAPES.items()}}
    reference = theirs(None, models, "karcher")
    agree(ours(None, models, Karcher(compat="mergekit")), reference, 1e-5)
    # Here it drops out with its weight: no third of the norm is lost.
    two = {name: models[name] for name in "ab"}
    agree(ours(None, models, Karcher()), ours(None, two, Karcher()), 1e-6)
    assert furthest(ours(None, models, Karcher()), reference) > 0.1


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("scale", [0.3, 1e-4])
def test_model_stock(base: State, count: int, per_row: bool, scale: float) -> None:
    models = {name: near(base, scale)[name] for name in "abc"[:count]}
    reference = theirs(base, models, "model_stock", filter_wise=per_row)
    agree(ours(base, models, ModelStock(per_row=per_row, compat="mergekit")), reference, 1e-5)


def test_model_stock_beyond_a_right_angle(base: State) -> None:
    """At 120 degrees t = −2 there, away from both models; clamped here."""
    turned = [torch.tensor([1.0, 0.0]), torch.tensor([-0.5, math.sqrt(0.75)])]
    start = {"w": torch.zeros(2)}
    two = {name: {"w": value} for name, value in zip("ab", turned, strict=True)}
    reference = merge_state_dicts({"base": start, **two}, "model_stock", base="base")["w"]
    torch.testing.assert_close(reference, -2 * (turned[0] + turned[1]) / 2)
    torch.testing.assert_close(ours(start, two, ModelStock(compat="mergekit"))["w"], reference)
    torch.testing.assert_close(ours(start, two, ModelStock(clamp=False))["w"], reference)
    assert ours(start, two, ModelStock())["w"].tolist() == [0, 0]


def test_linear(base: State) -> None:
    models, weights = near(base, 0.3), {"a": 0.5, "b": 0.2, "c": 1.1}
    for normalize in (True, False):
        found = ours(None, models, WeightedAverage(weights=weights, normalize=normalize, compat="mergekit"))
        agree(found, theirs(None, models, "linear", weight=weights, normalize=normalize), 3e-7)
