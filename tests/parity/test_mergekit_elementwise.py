"""The methods that go entry by entry against mergekit 0.1.5, in memory (``pip install -e '.[parity]'``)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_merge import TaskVectors
from lightning_merge.methods import ArceeFusion, MergeMethod, NearSwap, Passthrough, Ram, RamPlus

pytest.importorskip("mergekit")
from mergekit.merge_methods.api import merge_state_dicts

State = dict[str, Tensor]
SHAPES = {
    "embed.weight": (300, 64), "block.0.weight": (40, 25), "block.0.bias": (37,), "block.1.weight": (30, 4, 3),
    "column.weight": (6, 1), "temperature": (),
}  # fmt: skip


def draw(seed: int, scale: float, dtype: torch.dtype = torch.float32) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=generator, dtype=dtype) for name, shape in SHAPES.items()}


def tuned(base: State, count: int, scale: float, sparse: bool = False) -> dict[str, State]:
    """Models around a base; sparse ones changed a third of the entries."""
    models = {}
    for seed, name in enumerate("abc"[:count], 1):
        keep = {key: (draw(seed + 10, 1.0)[key] > 0.4) if sparse else True for key in base}
        change = draw(seed, scale, base["temperature"].dtype)
        models[name] = {
            key: torch.where(torch.as_tensor(keep[key]), base[key] + change[key], base[key]) for key in base
        }
    return models


def theirs(base: State | None, models: dict[str, State], method: str, **parameters: Any) -> State:
    every = models if base is None else {"base": base, **models}
    return merge_state_dicts(every, method, parameters=parameters, base=None if base is None else "base")


def ours(base: State | None, models: dict[str, State], method: MergeMethod) -> State:
    return method(TaskVectors.open(base=base, models=models, check=False))


def agree(one: State, other: State, atol: float = 1e-6) -> None:
    assert set(one) == set(other) == set(SHAPES)
    for name in SHAPES:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=atol, msg=lambda text, at=name: f"{at}: {text}")


@pytest.mark.parametrize("t", [1e-6, 0.0001, 0.05, 10.0])
def test_nearswap(t: float) -> None:
    base = draw(0, 1.0)
    models = tuned(base, 1, 0.1)
    agree(ours(base, models, NearSwap(t=t)), theirs(base, models, "nearswap", t=t))


def test_nearswap_below_their_smallest_difference() -> None:
    """There a difference of 1e-8 counts as 1e-6, so that t = 1e-7 takes a tenth of it; here it is within t: all."""
    base, models = {"w": torch.zeros(1)}, {"a": {"w": torch.tensor([1e-8])}}
    assert theirs(base, models, "nearswap", t=1e-7)["w"].item() == pytest.approx(1e-9)
    assert ours(base, models, NearSwap(t=1e-7))["w"].item() == pytest.approx(1e-8)


@pytest.mark.parametrize("epsilon", [1e-5, 0.05])
@pytest.mark.parametrize("sparse", [True, False])
def test_ram(epsilon: float, sparse: bool) -> None:
    base = draw(0, 1.0)
    models = tuned(base, 3, 0.1, sparse)
    reference = theirs(base, models, "ram", epsilon=epsilon)
    agree(ours(base, models, Ram(epsilon=epsilon, compat="mergekit")), reference)


@pytest.mark.parametrize(("r", "alpha", "epsilon"), [(0.1, 0.2, 1e-5), (0.5, 5.0, 1e-5), (2.0, 0.7, 0.05)])
@pytest.mark.parametrize("sparse", [True, False])
def test_ram_plus(r: float, alpha: float, epsilon: float, sparse: bool) -> None:
    base = draw(0, 1.0)
    models = tuned(base, 3, 0.1, sparse)
    reference = theirs(base, models, "ramplus_tl", r=r, alpha=alpha, epsilon=epsilon)
    found = ours(base, models, RamPlus(r=r, alpha=alpha, epsilon=epsilon, compat="mergekit"))
    agree(found, reference)
    if sparse and alpha > 1:
        assert (found["embed.weight"] - ours(base, models, Ram())["embed.weight"]).abs().max() > 0.01


def test_ram_of_small_changes_is_kept_here_and_lost_there() -> None:
    base = draw(0, 1e-3)
    models = tuned(base, 3, 1e-6, sparse=True)
    lost = theirs(base, models, "ram", epsilon=1e-5)
    agree(lost, base, atol=0)
    assert (ours(base, models, Ram())["embed.weight"] != base["embed.weight"]).double().mean() > 0.5


@pytest.mark.parametrize("scale", [1.0, 0.5, -2.0])
def test_passthrough(scale: float) -> None:
    models = {"a": draw(0, 1.0)}
    agree(ours(None, models, Passthrough(scale=scale)), theirs(None, models, "passthrough", scale=scale), atol=0)


def test_arcee_fusion() -> None:
    """In fp64: their divergence of fp32 rows is mostly rounding. What they add to probabilities may tip an entry."""
    base = draw(0, 1.0, torch.float64)
    models = tuned(base, 1, 0.05)
    found, reference = ours(base, models, ArceeFusion()), theirs(base, models, "arcee_fusion")
    for name in SHAPES:
        model = models["a"][name]
        here, there = found[name] == model, (reference[name] - model).abs() < 1e-12
        assert (here != there).sum() <= 0.001 * here.numel(), name
        if here.numel() > 10:
            assert 0.01 < here.double().mean() < 0.4
    assert found["temperature"] == models["a"]["temperature"]


def test_arcee_fusion_of_bf16_stays_bf16_and_near_the_exact_choice() -> None:
    """There the result is fp32 and rounding decides what is important; here it is the base's dtype."""
    base = {name: value.bfloat16() for name, value in draw(0, 1.0).items()}
    models = {"a": {key: (base[key].float() + change).bfloat16() for key, change in draw(1, 0.05).items()}}
    found = ours(base, models, ArceeFusion())["embed.weight"]
    assert found.dtype == torch.bfloat16
    exact = theirs(
        {name: value.double() for name, value in base.items()},
        {"a": {name: value.double() for name, value in models["a"].items()}},
        "arcee_fusion",
    )["embed.weight"]
    rounded = theirs(base, models, "arcee_fusion")["embed.weight"]
    assert rounded.dtype == torch.float32
    moved = exact != base["embed.weight"]
    assert ((found != base["embed.weight"]) != moved).double().mean() < 0.001
    assert ((rounded != base["embed.weight"]) != moved).double().mean() > 0.02
